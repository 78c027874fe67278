"""One device that trains on the mean of the ranks' losses, in plain PyTorch; and how ranks are compared with it."""

import functools
import hashlib
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from table_forms import Form, Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

import tritonmoe as tm

sys.path.insert(0, str(Path(__file__).parents[3] / "support"))
from same_bits import assert_same_bits as assert_same_bits
from tolerance import assert_close_to_exact

# Adam's first steps are signs of gradients, which rounding turns around; with a large eps they are none.
ADAMW = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1}
SGD = {"lr": 0.1, "momentum": 0.9}


@dataclass(frozen=True)
class Plan:
    """What is trained, however it is done."""

    num_ranks: tuple[int, ...] = ()
    """Of every step."""
    num_micro: int = 1
    """Batches of a rank whose gradients are accumulated before a step."""
    optimizer: str = "adamw"
    max_norm: float | None = None
    norm_type: float = 2.0
    autocast: bool = False

    def make_optimizer(self, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), **SGD, **settings)
        return torch.optim.AdamW(model.parameters(), **ADAMW, **settings)

    def autocasting(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    def clip(self, model: nn.Module, **settings: Any) -> Tensor | None:
        if self.max_norm is None:
            return None
        return nn.utils.clip_grad_norm_(model.parameters(), self.max_norm, self.norm_type, **settings)


@dataclass
class Step:
    """What one step gave: gradients as the optimizer took them, weights as it left them."""

    outputs: list[Tensor]
    norm: Tensor | None
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class InDouble(TorchFunctionMode):
    """Lets a model of transformers in fp64 stay there where it asks for fp32, as its norms and its router do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


def run_one_device(form: Form, plan: Plan, dtype: torch.dtype) -> list[Step]:
    model = form.one_device().to(dtype)
    for module in model.modules():
        if isinstance(module, tm.GroupedExperts):
            module.spec = replace(module.spec, backend="reference")
    optimizer = plan.make_optimizer(model)
    steps = []
    for step, num_ranks in enumerate(plan.num_ranks):
        optimizer.zero_grad()
        outputs, losses = [], []
        with InDouble() if dtype == torch.float64 else plan.autocasting():
            for rank in range(num_ranks):
                for micro in range(plan.num_micro):
                    output, loss = form.loss(model, model, form.batch(step, rank, micro))
                    losses.append(loss)
                outputs.append(output.detach())
        (torch.stack(losses).sum() / num_ranks).backward()
        norm = plan.clip(model)
        grads = gradients(model)
        optimizer.step()
        steps.append(Step(outputs, norm, grads, weights(model)))
    return steps


@functools.cache
def one_device(form: Form, plan: Plan) -> tuple[list[Step], list[Step]]:
    """Return the steps in fp32, or as autocast does them, and in fp64."""
    return run_one_device(form, plan, torch.float32), run_one_device(form, plan, torch.float64)


def compare(actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], what: str) -> None:
    """Raise AssertionError with every tensor that breaks the tolerance rule, the worst numbers of three."""
    assert actual.keys() == exact.keys(), f"{what}: {sorted(actual.keys() ^ exact.keys())}"
    problems = []
    for name, tensor in actual.items():
        try:
            assert_close_to_exact(name, tensor, plain[name], exact[name])
        except AssertionError as error:
            problems.append(str(error))
    assert not problems, f"{what}: {len(problems)} of {len(actual)} differ: {'; '.join(problems[:3])}"


def compare_step(actual: Step, form: Form, ranks: Ranks, plan: Plan, step: int, what: str) -> None:
    """Compare one step of this rank with one device's."""
    plain, exact = (steps[step] for steps in one_device(form, plan))
    what = f"{what}, step {step}"
    compare({"output": actual.outputs[0]}, *({"output": s.outputs[ranks.rank]} for s in (plain, exact)), what)
    if plan.max_norm is not None:
        compare({"norm": actual.norm}, {"norm": plain.norm}, {"norm": exact.norm}, what)  # type: ignore[dict-item]
    compare(actual.gradients, plain.gradients, exact.gradients, f"{what}, gradients")
    compare(actual.weights, plain.weights, exact.weights, f"{what}, weights")


def assert_same_on_every_rank(tensors: dict[str, Tensor], what: str) -> None:
    """Raise AssertionError on every rank where ranks hold other bits."""
    if not dist.is_initialized():
        return
    own = {name: hashlib.sha1(t.contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    different = [name for name in own if len({other.get(name) for other in everyone}) > 1]
    assert not different, f"{what}: ranks disagree on {len(different)} of {len(own)}: {different[:6]}"
