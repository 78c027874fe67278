"""The Triton kernels against plain PyTorch on the device at hand, every operation of a layer, forward and backward.

A kernel that was compiled for a GPU that its compiler hardly knows may run and give wrong numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from tritonmoe.backends import reference as reference_module
from tritonmoe.backends.ops import NO_GRADIENTS, GradientOperands, Operations
from tritonmoe.config.activations import ClampedSwiGLU, FusedActivation
from tritonmoe.config.layer import ExpertLayout, Projection
from tritonmoe.grouping import Grouping

__all__ = ["CASES", "SMALL_CASES", "Checked", "CheckedLayer", "Distance", "check_ids", "check_layer", "distances"]


class Distance(NamedTuple):
    """How far values are off fp64's, in one measure."""

    error: float
    allowed: float

    @property
    def is_small(self) -> bool:
        return self.error <= self.allowed  # not where it is NaN


def distances(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> dict[str, Distance]:
    """Return the largest error of `found`, for a wrong element, and the root mean square, for sums that are all wrong.

    Twice the error of plain PyTorch is allowed, and some units in the last place of `dtype`: of the largest value four,
    of the root mean square one; in fp32 16 times as many, since tensor cores cut sums off where others round.
    """
    eps = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)
    errors = [(values.double() - exact).abs() for values in (found, plain)]
    (largest, plain_largest), size = (error.max().item() for error in errors), exact.abs().max().item()
    (mean, plain_mean, mean_size) = (values.square().mean().sqrt().item() for values in (*errors, exact))
    return {
        "largest": Distance(largest, 2 * plain_largest + 4 * eps * size),
        "root mean square": Distance(mean, 2 * plain_mean + eps * mean_size),
    }


@dataclass(frozen=True)
class CheckedLayer:
    """A layer whose operations are checked; its sizes decide which tiles its kernels have."""

    name: str
    dtype: torch.dtype
    num_tokens: int
    layout: ExpertLayout = field(default_factory=ExpertLayout)
    activation: FusedActivation = "silu"
    hidden_size: int = 512
    intermediate_size: int = 384
    num_experts: int = 8
    top_k: int = 2
    bias: bool = False


_CLAMPED = ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0)
CASES = (
    CheckedLayer("bf16", torch.bfloat16, 4096),
    CheckedLayer("bf16, many experts", torch.bfloat16, 2048, num_experts=60, top_k=6),
    CheckedLayer("bf16, few tokens", torch.bfloat16, 40),
    CheckedLayer("bf16, one token", torch.bfloat16, 1),
    CheckedLayer("bf16, odd sizes", torch.bfloat16, 777, hidden_size=515, intermediate_size=131, bias=True),
    CheckedLayer("bf16, interleaved", torch.bfloat16, 1024, ExpertLayout(interleaved=True), _CLAMPED, bias=True),
    CheckedLayer("fp16, transposed", torch.float16, 1024, ExpertLayout(transposed=True), "gelu"),
    CheckedLayer("bf16, ungated", torch.bfloat16, 1024, ExpertLayout(gated=False), "relu2"),
    CheckedLayer("fp32", torch.float32, 1024, activation="gelu_tanh"),
)
"""Every kind of tile, and every way in which weights lie, in seconds on a GPU."""
SMALL_CASES = tuple(
    replace(case, num_tokens=min(case.num_tokens, 20), hidden_size=33, intermediate_size=12, num_experts=5, top_k=2)
    for case in CASES
    if case.dtype != torch.bfloat16 or not case.layout.gated
)
"""For Triton's interpreter."""


@dataclass(frozen=True)
class Checked:
    """How far one result of one operation is off, by measure: "largest", "root mean square", or the share of ids."""

    layer: str
    operation: str
    distances: dict[str, Distance]

    @property
    def is_right(self) -> bool:
        return all(distance.is_small for distance in self.distances.values())

    def __str__(self) -> str:
        """Name the operation and every distance that is too large."""
        large = [(measure, one) for measure, one in self.distances.items() if not one.is_small]
        parts = [f"{measure} error {one.error:.2g}, {one.allowed:.2g} is allowed" for measure, one in large]
        return f"{self.operation}: {'; '.join(parts)}"


def check_ids(layer: str, operation: str, found: Tensor, right: Tensor) -> Checked:
    """Compare integers, which are to be equal."""
    different = (found != right).sum().item() if found.shape == right.shape else float("inf")
    return Checked(layer, operation, {"number of different ids": Distance(different, 0.0)})


class _Operands:
    """One layer's random operands, the same numbers in every dtype."""

    def __init__(self, layer: CheckedLayer, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device="cpu") * scale).to(device, layer.dtype)

        experts, model_width, inner = layer.num_experts, layer.hidden_size, layer.intermediate_size
        width = 2 * inner if layer.layout.gated else inner
        w1, w2 = (
            draw(experts, width, model_width, scale=model_width**-0.5),
            draw(experts, model_width, inner, scale=inner**-0.5),
        )
        if layer.layout.transposed:
            w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
        b1, b2 = (draw(experts, width), draw(experts, model_width)) if layer.bias else (None, None)
        self.layer, self.gate_up, self.down = layer, Projection(w1, b1, layer.layout), Projection(w2, b2, layer.layout)
        self.x, self.dout = draw(layer.num_tokens, model_width), draw(layer.num_tokens, model_width)
        # a hot expert, an empty one, and skipped pairs
        ids = torch.randint(-1, experts - 1, (layer.num_tokens, layer.top_k), generator=generator, device="cpu")
        ids[: layer.num_tokens // 4, 0] = 1
        self.ids = ids.to(device)
        self.topk_weights = torch.rand(ids.shape, generator=generator, device="cpu").to(device)

    def double(self) -> "_Operands":
        twin = object.__new__(_Operands)
        for name, value in vars(self).items():
            if isinstance(value, Projection):
                value = value._replace(
                    weight=value.weight.double(), bias=None if value.bias is None else value.bias.double()
                )
            elif isinstance(value, Tensor) and value.is_floating_point():
                value = value.double()
            setattr(twin, name, value)
        return twin


def check_layer(layer: CheckedLayer, ops: Operations, device: torch.device) -> Iterator[Checked]:
    """Run every operation of `ops`, each on operands that plain PyTorch made, and compare with fp64."""
    operands, reference = _Operands(layer, device), cast(Operations, reference_module)
    expected = reference.group(operands.ids, layer.num_experts)
    grouping = ops.group(operands.ids, layer.num_experts)
    for name in ("expert_offsets", "inverse", "pair_index"):
        found, right = getattr(grouping, name), getattr(expected, name)
        yield check_ids(layer.name, f"group: {name}", found[: len(right)], right)
    plain = _results(reference, operands, expected, {})
    exact = _results(reference, operands.double(), expected, plain)
    actual = _results(ops, operands, grouping, plain)
    for name, value in actual.items():
        right = exact[name]
        found, near = (values[: len(right)] for values in (value, plain[name]))
        if right.numel():
            yield Checked(layer.name, name, distances(found, near, right, found.dtype))


def _results(ops: Operations, operands: _Operands, grouping: Grouping, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run every operation once, on the results in `given` of earlier ones; by name, those of pairs in storage order."""
    layer, gate_up, down, weights = operands.layer, operands.gate_up, operands.down, operands.topk_weights
    found: dict[str, Tensor] = {}

    def operand(name: str) -> Tensor:
        """Return the result, in this run's dtype and number of pairs."""
        value = given.get(name, found[name])
        padded = torch.zeros(grouping.num_pairs, *value.shape[1:], device=value.device, dtype=operands.x.dtype)
        padded[: len(value)] = value
        return padded

    found["up: h"], found["up: a"] = ops.up(operands.x, gate_up, grouping, layer.activation)
    found["down"] = ops.down(operand("up: a"), down, grouping)
    found["gather_sum"] = ops.gather_sum(operand("down"), grouping.inverse, weights)
    hidden = operand("up: h")
    dh, scaled_a, dweights = ops.down_grad(operands.dout, down, hidden, weights, grouping, layer.activation)
    found |= {"down_grad: dh": dh, "down_grad: s*a": scaled_a, "down_grad: gate weights": dweights}
    found["up_grad"] = ops.up_grad(operand("down_grad: dh"), gate_up, grouping)
    rows = GradientOperands(operands.x, operand("down_grad: dh"), operands.dout, operand("down_grad: s*a"), weights)
    needs = NO_GRADIENTS._replace(gate_up_proj=True, down_proj=True, gate_up_bias=layer.bias, down_bias=layer.bias)
    grads = ops.weight_grad(grouping, layer.layout, rows, needs)
    found |= {f"weight_grad: {name}": grad for name, grad in grads._asdict().items() if grad is not None}
    return found
