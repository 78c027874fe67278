"""The Triton kernels against plain PyTorch on the device at hand, every operation of a layer, forward and backward.

A kernel that was compiled for a GPU that its compiler hardly knows may run and give wrong numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from tritonmoe.config.activations import ClampedSwiGLU, FusedActivation
from tritonmoe.config.formats import WeightFormat
from tritonmoe.config.layer import ExpertLayout, KernelOptions
from tritonmoe.ops.backends import reference as reference_module
from tritonmoe.ops.backends.layer_case import LayerCase
from tritonmoe.ops.backends.ops import CalledLayer, Operations

__all__ = [
    "CASES",
    "SMALL_CASES",
    "Checked",
    "CheckedLayer",
    "Distance",
    "cases_like",
    "check_ids",
    "check_layer",
    "distances",
]


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
    activation: FusedActivation | None = "silu"
    hidden_size: int = 512
    intermediate_size: int = 384
    num_experts: int = 8
    top_k: int = 2
    bias: bool = False
    options: KernelOptions = KernelOptions()
    weight_formats: tuple[WeightFormat | None, WeightFormat | None] = (None, None)

    @property
    def weight_format(self) -> WeightFormat | None:
        """The format of both weights, where they have one."""
        up, down = self.weight_formats
        assert up == down, self.weight_formats
        return up


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
    CheckedLayer("mxfp4", torch.bfloat16, 1024, weight_formats=("mxfp4", "mxfp4")),
    CheckedLayer("fp8", torch.bfloat16, 1024, weight_formats=("fp8", "fp8")),
    CheckedLayer("nf4, transposed", torch.bfloat16, 1024, ExpertLayout(transposed=True), weight_formats=("nf4", "nf4")),
    CheckedLayer("mxfp4, few tokens", torch.bfloat16, 40, weight_formats=("mxfp4", "mxfp4")),
)
"""Every kind of tile, and every way in which weights lie, in seconds on a GPU."""
SMALL_CASES = tuple(
    replace(case, num_tokens=min(case.num_tokens, 20), hidden_size=33, intermediate_size=12, num_experts=5, top_k=2)
    for case in CASES
    if case.dtype != torch.bfloat16 or not case.layout.gated
)
"""For Triton's interpreter."""


LARGE = 1024
"""A multiple of every side of a tile: a longer product has the code of one that is longer than it by less than 128."""
FEW_EXPERTS = 8


def _large_enough(size: int) -> int:
    return size if size < LARGE + 128 else LARGE + size % 128


def cases_like(
    layer: CalledLayer, dtype: torch.dtype, options: KernelOptions, num_experts: int, top_k: int
) -> list[CheckedLayer]:
    """Return layers that have the kernels of a call's own, with many pairs per expert and with few.

    They are smaller where that makes no other code. A callable activation stands outside of the kernels, and silu for
    what follows it.
    """
    hidden_size, intermediate_size = _large_enough(layer.hidden_size), _large_enough(layer.intermediate_size)
    experts = max(2, min(num_experts, FEW_EXPERTS))
    names = ", ".join(name for name, value in vars(layer.layout).items() if value is True)
    activation = "a callable" if layer.activation is None else str(layer.activation)
    name = f"{hidden_size} x {intermediate_size}, K {top_k}, {activation}, {names or 'ungated'}"
    name += (", biases" if layer.has_bias else "") + (f", {options}" if options != KernelOptions() else "")
    if any(layer.weight_formats):
        name += f", weights in {' and '.join(one or 'bf16' for one in dict.fromkeys(layer.weight_formats))}"
    of_call = CheckedLayer(
        name,
        dtype,
        -(-256 * experts // top_k),
        layer.layout,
        layer.activation or "silu",
        hidden_size,
        intermediate_size,
        experts,
        top_k,
        layer.has_bias,
        options,
        layer.weight_formats,
    )
    cases = [of_call, replace(of_call, num_tokens=-(-12 * experts // top_k))]
    if options.num_sms is None:  # a program that begins a tile while it stores another one
        cases.append(replace(of_call, name=f"{name}, two multiprocessors", options=options._replace(num_sms=2)))
    return cases if layer.activation is not None else [replace(of_call, activation=None), *cases]


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


def _case(layer: CheckedLayer, device: torch.device) -> LayerCase:
    """Return the layer's operands; ids have a hot expert, an empty one, and skipped pairs."""
    generator = torch.Generator().manual_seed(0)
    shape = layer.num_tokens, layer.top_k
    ids = torch.randint(-1, layer.num_experts - 1, shape, generator=generator, device="cpu")
    ids[: layer.num_tokens // 4, 0] = 1
    case = LayerCase(
        ids.to(device),
        layer.num_experts,
        layer.layout,
        layer.dtype,
        sizes=(layer.hidden_size, layer.intermediate_size),
        bias=layer.bias,
    )
    return case.packed(layer.weight_formats)


def check_layer(layer: CheckedLayer, ops: Operations, device: torch.device) -> Iterator[Checked]:
    """Run every operation of `ops`, each on operands that plain PyTorch made, and compare with fp64."""
    case, reference = _case(layer, device), cast(Operations, reference_module)
    expected = reference.group(case.ids, layer.num_experts)
    grouping = ops.group(case.ids, layer.num_experts)
    for name in ("expert_offsets", "inverse", "pair_index"):
        found, right = getattr(grouping, name), getattr(expected, name)
        yield check_ids(layer.name, f"group: {name}", found[: len(right)], right)
    plain = case.run(reference, expected, layer.activation)
    exact = case.double().run(reference, expected, layer.activation, plain)
    actual = case.run(ops, grouping, layer.activation, plain, layer.options)
    for name, value in actual.items():
        if value.numel():
            yield Checked(layer.name, name, distances(value, plain[name], exact[name], value.dtype))
