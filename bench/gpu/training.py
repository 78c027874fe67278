"""Whole steps of training, with the optimizer, of a Qwen3-MoE model under three implementations of its experts."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.gpu.setting import HEADLINE, Setting
from bench.gpu.workbench import Workbench, times_of
from tritonmoe.integrations.transformers.bench_model import ModelSizes, peer_unusable_reason, qwen3_moe_model
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.step_memory import kept_for_backward_mb, peak_mb
from tritonmoe.tools.benchmarks.timing import interleave

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["IMPLEMENTATIONS", "measure_training"]

IMPLEMENTATIONS = ("tritonmoe", "grouped_mm", "eager")
"""Values of experts_implementation; grouped_mm is PyTorch's operation, eager a loop over the experts."""
NUM_LAYERS = 4
LARGEST_DIFFERENCE = 0.3
"""Between two implementations' gradients of the first layer's experts, relative: in bf16 some tokens of later layers go
to other experts. Gradients that have nothing in common differ by 1.4."""


def measure_training(bench: Workbench, num_tokens: int, sequence_length: int) -> Json:
    """Time forward, backward and AdamW of one model in turn under every implementation, in the setting's dtype.

    Returns:
        "times" with "tokens_per_s"; "held_mb", the weights and the optimizer's states; "memory", by implementation what
        a forward keeps for backward and the most that a step holds beside "held_mb"; "losses" and "differences" of
        gradients to the first implementation's, on the same weights and tokens; "passed" where these are small;
        "runs_kernels", whether "auto" has taken the Triton kernels.
    """
    reason = peer_unusable_reason("grouped_mm", bench.setting.device, plain=True)
    if reason is not None:
        return {"left_out": reason}
    bench.forget()
    with measured_tiles.using({}):
        return _measure(bench, _Job(bench.setting, num_tokens, sequence_length))


def _measure(bench: Workbench, job: "_Job") -> Json:
    left_out: dict[str, str] = {}
    found: Json = {"losses": {}, "differences": {}, "memory": {}}
    gradients: list[Tensor] = []
    for name in IMPLEMENTATIONS:  # all on the same weights: no step is made yet
        with _leaving_out(name, left_out):
            found["losses"][name], gradient = job.loss_and_gradient(name)
            gradients = [*gradients[:1], gradient]
            found["differences"][name] = float((gradients[-1] - gradients[0]).norm() / gradients[0].norm())
            del gradient
        job.forget_gradients()
    gradients.clear()
    for name in IMPLEMENTATIONS:
        if name in left_out:
            continue
        # The first call has made its comparison of the kernels, which asks for tiles whatever comes of it.
        with measured_tiles.asked() as asked, _leaving_out(name, left_out):
            found["memory"][name] = job.memory(name)
        if name == IMPLEMENTATIONS[0]:
            found["runs_kernels"] = bool(asked)
        job.forget_gradients()
    steps = {name: job.step_of(name) for name in IMPLEMENTATIONS if name not in left_out}
    samples = interleave(steps, bench.setting.rounds, slice_s=0.0)
    return {
        **found,
        "times": {name: _times(seconds, job.ids.numel()) for name, seconds in samples.items()},
        "held_mb": job.held_mb(),
        "left_out": left_out,
        "passed": all(difference <= LARGEST_DIFFERENCE for difference in found["differences"].values()),
    }


@contextlib.contextmanager
def _leaving_out(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Note why an implementation can't run, where it isn't ours."""
    try:
        yield
    except Exception as error:
        if name == IMPLEMENTATIONS[0]:
            raise
        left_out[name] = f"{type(error).__name__}: {error}"[:300]


def _times(seconds: list[float], num_tokens: int) -> Json:
    return {**times_of(seconds, "clock"), "tokens_per_s": round(num_tokens / statistics.median(seconds), 1)}


class _Job:
    """A random model with the headline's layers, its optimizer, and one batch."""

    def __init__(self, setting: Setting, num_tokens: int, sequence_length: int) -> None:
        shape, device = setting.shapes[HEADLINE], setting.device
        sizes = ModelSizes(NUM_LAYERS, shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
        with device:  # a CPU would take minutes to draw the weights
            self.model: PreTrainedModel = qwen3_moe_model(sizes, dtype=setting.dtype, device=device.type)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        generator = torch.Generator().manual_seed(1)
        batch = num_tokens // sequence_length, sequence_length
        self.ids = torch.randint(2, sizes.vocab_size, batch, generator=generator).to(device)

    def _loss(self) -> Tensor:
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def loss_and_gradient(self, name: str) -> tuple[float, Tensor]:
        """Return the loss and the gradient of the first layer's up-projection, (E, 2F, D) in fp32."""
        self.model.set_experts_implementation(name)
        loss = self._loss()
        loss.backward()
        return loss.item(), self.model.model.layers[0].mlp.experts.gate_up_proj.grad.float()

    def memory(self, name: str) -> Json:
        """Return what a forward keeps for backward, and the most that a step holds, in megabytes."""
        step = self.step_of(name)
        kept = kept_for_backward_mb(self._loss, self.model.parameters())
        step()  # the optimizer's states are held from here on
        return {"kept_mb": kept, "peak_mb": peak_mb(step)}

    def step_of(self, name: str) -> Callable[[], None]:
        def step() -> None:
            self.model.set_experts_implementation(name)
            self._loss().backward()
            self.optimizer.step()
            self.forget_gradients()

        self.model.set_experts_implementation(name)
        return step

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def held_mb(self) -> float:
        """Return the megabytes of the weights and the optimizer's states."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *filter(torch.is_tensor, states)]
        return round(sum(tensor.untyped_storage().nbytes() for tensor in tensors) / 1e6, 3)
