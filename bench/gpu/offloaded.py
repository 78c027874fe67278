"""Experts in host memory or in files beside experts on the GPU: the time of a step, what it waits for, and its bits."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from bench.gpu.workbench import Call, Workbench
from tritonmoe.config.layer import MoEConfig
from tritonmoe.layer import GroupedExperts
from tritonmoe.layer.offloading import offload_experts
from tritonmoe.placement.offloaded import Offload
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.shapes import LayerInputs

__all__ = ["measure_offloaded"]

RESIDENT, KERNELS, COPIES = "experts on the GPU", "experts on the GPU, kernels", "copies alone"
PLACES = {"host memory": "cpu", "files": "folder"}
NUM_STEPS = 3
"""So many steps are compared in bits: from the second one on, experts are copied before their pass begins."""


def measure_offloaded(bench: Workbench, shape: str, num_tokens: int, resident_share: float) -> Json:
    """Time a forward and the gradient of x with frozen experts on the GPU, in pinned host memory and in files.

    Args:
        resident_share: of the experts, that stays on the GPU.

    Returns:
        What Workbench.time does, with the bits of y, dx and dtopk_weights compared ("passed"), the tokens of an expert,
        and what the offloads say of themselves.
    """
    inputs, setting = bench.inputs(shape, num_tokens, "uniform"), bench.setting
    layer = inputs.shape
    config = MoEConfig(layer.hidden_size, layer.intermediate_size, layer.num_experts, layer.top_k)
    resident = GroupedExperts(config, backend="torch", dtype=setting.dtype).requires_grad_(False)
    places = PLACES if setting.device.type == "cuda" else {"files": "folder"}
    total_bytes = sum(parameter.nbytes for parameter in resident.parameters())
    with ExitStack() as stack:
        modules, offloads = {}, {}
        for name, place in places.items():
            found = _offloaded(resident, place, int(resident_share * total_bytes))
            modules[name], offloads[name] = stack.enter_context(found)
            modules[name].to(setting.device)
        resident.to(setting.device)
        steps = {name: _step(inputs, module) for name, module in {RESIDENT: resident, **modules}.items()}
        expected = steps[RESIDENT]()
        is_right = {
            name: all(all(map(torch.equal, expected, steps[name]())) for _ in range(NUM_STEPS)) for name in modules
        }
        kernels = copy.copy(resident)
        kernels.spec = copy.copy(resident.spec)
        object.__setattr__(kernels.spec, "backend", setting.layer_backend)
        variants: dict[str, Call] = {**steps, KERNELS: _step(inputs, kernels), COPIES: _copies(resident)}
        for offload in offloads.values():
            offload.reset()
        timed = bench.time(variants, RESIDENT, tuple(steps))
        return {
            **timed,
            "passed": all(is_right.values()),
            "same_bits": is_right,
            "tokens_per_expert": num_tokens * layer.top_k / layer.num_experts,
            "experts_mb": round(total_bytes / 1e6, 3),
            "said": {name: str(offload) for name, offload in offloads.items()},
        }


@contextmanager
def _offloaded(resident: GroupedExperts, place: str, resident_bytes: int) -> Iterator[tuple[nn.Module, Offload]]:
    module = copy.deepcopy(resident)
    object.__setattr__(module.spec, "backend", "auto")
    with tempfile.TemporaryDirectory() as folder:
        yield module, offload_experts(module, place if place == "cpu" else folder, resident_bytes=resident_bytes)


def _step(inputs: LayerInputs, experts: nn.Module) -> Callable[[], list[Tensor]]:
    """Return a call that gives y, and the gradients of x and of topk_weights."""
    leaves = inputs.x, inputs.topk_weights

    def run() -> list[Tensor]:
        y = experts(inputs.x, inputs.topk_ids, inputs.topk_weights)
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dout)]

    return run


def _copies(experts: GroupedExperts) -> Call:
    """Return a call that copies every expert from pinned memory once, one after the other."""
    weights = [parameter.detach() for parameter in experts.parameters()]
    on_gpu = weights[0].is_cuda
    sources = [torch.empty_like(weight[0], device="cpu", pin_memory=on_gpu) for weight in weights]

    def run() -> None:
        for source, weight in zip(sources, weights, strict=True):
            target = torch.empty_like(weight[0])
            for _ in range(weight.shape[0]):
                target.copy_(source, non_blocking=True)

    return run
