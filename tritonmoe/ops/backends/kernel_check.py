"""The Triton kernels against plain PyTorch on the device at hand, every operation of a layer, forward and backward.

A kernel that was compiled for a GPU that its compiler hardly knows may run and give wrong numbers.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from tritonmoe.config.activations import ClampedSwiGLU, FusedActivation
from tritonmoe.config.formats import WeightFormat, find_format
from tritonmoe.config.layer import ExpertLayout, KernelOptions, PerWeight, Projection
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.ops.backends import reference as reference_module
from tritonmoe.ops.backends.decoding import decoded
from tritonmoe.ops.backends.ops import CalledLayer, GradientOperands, Operations
from tritonmoe.ops.backends.rounded import Directions, RoundedOperations
from tritonmoe.ops.grouping import Grouping

__all__ = [
    "CASES",
    "SMALL_CASES",
    "Checked",
    "CheckedLayer",
    "Distance",
    "LayerCase",
    "cases_like",
    "check_ids",
    "check_layer",
    "distances",
]

IN_STORAGE_ORDER = (
    *("up: h", "up: a", "down", "down_grad: dh", "down_grad: s*a", "down_grad: gate weights", "up_grad"),
)


class LayerCase:
    """Random weights and rows of one layer, in one dtype, on the device of its ids.

    R rows of D columns with K experts each out of E, which are F wide. The same seed gives the same numbers in every
    dtype.
    """

    def __init__(
        self,
        ids: Tensor,
        num_experts: int,
        layout: ExpertLayout,
        dtype: torch.dtype = torch.float32,
        *,
        sizes: tuple[int, int] = (20, 12),
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        """Draw the operands. ids: (R, K). sizes: D and F."""
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype
        hidden, intermediate = sizes
        width = 2 * intermediate if layout.gated else intermediate
        self.layout, self.ids, self.num_experts = layout, ids, num_experts
        self.hidden, self.intermediate, self.width = hidden, intermediate, width
        self.w1 = self.draw(num_experts, width, hidden, scale=hidden**-0.5)
        self.w2 = self.draw(num_experts, hidden, intermediate, scale=intermediate**-0.5)
        if layout.transposed:
            self.w1, self.w2 = self.w1.mT.contiguous(), self.w2.mT.contiguous()
        self.w1_scales: Tensor | None = None
        self.w2_scales: Tensor | None = None
        self.b1 = self.draw(num_experts, width, scale=0.5) if bias else None
        self.b2 = self.draw(num_experts, hidden, scale=0.5) if bias else None
        self.x, self.dout = self.draw(ids.shape[0], hidden), self.draw(ids.shape[0], hidden)
        self.weights = torch.rand(ids.shape, generator=self._generator, device="cpu").to(ids.device)
        """(R, K) fp32: the gate weights."""
        self.addends: dict[str, Tensor] = {}

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Return normally distributed numbers in the layer's dtype."""
        drawn = torch.randn(*shape, generator=self._generator, device="cpu")
        return (drawn * scale).to(self.ids.device, self._dtype)

    def packed(self, formats: tuple[WeightFormat | None, WeightFormat | None]) -> "LayerCase":
        """Draw other weights, random bytes in these formats; None: the weight stays. Return this case."""
        for name, weight_format, depth in zip(("w1", "w2"), formats, (self.hidden, self.intermediate), strict=True):
            if weight_format is not None:
                values, scales = self._random_bytes(getattr(self, name), weight_format, depth**-0.5)
                setattr(self, name, values)
                setattr(self, f"{name}_scales", scales)
        return self

    def _random_bytes(self, weight: Tensor, weight_format: WeightFormat, size: float) -> tuple[Tensor, Tensor]:
        """Return values and scales of a packed weight of this shape, whose values are about as large as `size`."""
        packed = find_format(weight_format)
        values, scales = packed.empty(tuple(weight.shape), "cpu")
        numbers = torch.randint(0, 256, values.shape, generator=self._generator, device="cpu", dtype=torch.uint8)
        uniform = torch.rand(scales.shape, generator=self._generator, device="cpu")
        values.view(torch.uint8).copy_(numbers & packed.random_bits)
        scales.copy_(packed.nearest_scales(size * (0.5 + uniform) / packed.root_mean_square))
        return values.to(weight.device), scales.to(weight.device)

    def with_addends(self) -> "LayerCase":
        """Draw rows that `run` adds to each product; return this case."""
        columns = {"h": self.width, "y": self.hidden, "g": self.intermediate, "dx": self.hidden}
        self.addends = {name: self.draw(self.ids.numel(), number) for name, number in columns.items()}
        return self

    @property
    def gate_up(self) -> Projection:
        return Projection(self.w1, self.b1, self.layout, scales=self.w1_scales)

    @property
    def down(self) -> Projection:
        return Projection(self.w2, self.b2, self.layout, scales=self.w2_scales)

    def decoded(self) -> "LayerCase":
        """Return the same numbers with weights that are not packed."""
        twin = copy.copy(self)
        for weight in ("w1", "w2"):
            values, scales = getattr(self, weight), getattr(self, f"{weight}_scales")
            if scales is not None:
                setattr(twin, weight, decoded(values, scales))
                setattr(twin, f"{weight}_scales", None)
        return twin

    def double(self) -> "LayerCase":
        """Return the same numbers in fp64."""
        twin = self.decoded()
        for name, value in vars(twin).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(twin, name, value.double())
        twin.addends = {name: value.double() for name, value in self.addends.items()}
        return twin

    def run(
        self,
        ops: Operations,
        grouping: Grouping,
        activation: FusedActivation | None,
        given: dict[str, Tensor] | None = None,
        options: KernelOptions = KernelOptions(),
    ) -> dict[str, Tensor]:
        """Run every operation once, on what earlier ones gave or, where another run's results are given, on those.

        Returns the results by operation and name; those in storage order are cut to the pairs that do work. Without an
        activation, whose gradients are somebody else's, nothing runs behind down_grad.
        """
        num_pairs, num_active = grouping.num_pairs, int(grouping.expert_offsets[-1])
        found: dict[str, Tensor] = {}

        def operand(name: str) -> Tensor:
            """Return a result of this run's dtype and number of pairs; one that is given is NaN behind the last."""
            if given is None or name not in given:
                return found[name]
            value = given[name]
            padded = torch.full((num_pairs, *value.shape[1:]), torch.nan, dtype=self.x.dtype, device=value.device)
            padded[:num_active] = value
            return padded

        up_projection, down_projection = (
            ops.projection(of, "both") if isinstance(ops, RoundedOperations) else of for of in (self.gate_up, self.down)
        )
        gate_up = self._adding(up_projection, "h", num_pairs)
        h, a = ops.up(self.x, gate_up, grouping, activation, out_h=gate_up.addend, options=options)
        found["up: h"] = h
        if a is None:
            hidden = found["up: a"] = h.new_full((num_pairs, self.intermediate), 0.5)
        else:
            found["up: a"], hidden = a, operand("up: h")
        down = self._adding(down_projection, "y", num_pairs)
        found["down"] = ops.down(operand("up: a"), down, grouping, out=down.addend, options=options)
        found["gather_sum"] = ops.gather_sum(operand("down"), grouping.inverse, self.weights)
        found["gather_sum: without weights"] = ops.gather_sum(operand("down"), grouping.inverse)
        down = self._adding(down_projection, "g", num_pairs)
        dh, scaled_a, dweights = ops.down_grad(
            self.dout, down, hidden, self.weights, grouping, activation, out=(None, down.addend), options=options
        )
        found |= {"down_grad: dh": dh, "down_grad: s*a": scaled_a, "down_grad: gate weights": dweights}
        if activation is not None:
            gate_up = self._adding(up_projection, "dx", num_pairs)
            dh_given = operand("down_grad: dh")
            found["up_grad"] = ops.up_grad(dh_given, gate_up, grouping, out=gate_up.addend, options=options)
            rows = GradientOperands(self.x, dh_given, self.dout, operand("down_grad: s*a"), self.weights)
            needs = PerWeight(True, self.b1 is not None, True, self.b2 is not None)
            grads = ops.weight_grad(grouping, self.layout, rows, needs, options=options)
            found |= {f"weight_grad: {name}": grad for name, grad in grads._asdict().items() if grad is not None}
        return {name: value[:num_active] if name in IN_STORAGE_ORDER else value for name, value in found.items()}

    def _adding(self, projection: Projection, name: str, num_pairs: int) -> Projection:
        """Return a projection whose product `name` has an addend, if this layer has some; a copy to be written over."""
        addend = self.addends.get(name)
        return projection if addend is None else projection._replace(addend=addend[:num_pairs].clone())


class _RoundedInDouble(RoundedOperations):
    """The operations of a precision in fp64, of operands that are bf16 numbers."""

    def round_rows(self, rows: Tensor) -> Tensor:
        return super().round_rows(rows.bfloat16()).double()

    def projection(self, projection: Projection, directions: Directions) -> Projection:
        found = super().projection(projection._replace(weight=projection.weight.bfloat16()), directions)
        of_gradients = found.weight_of_gradients
        return found._replace(
            weight=found.weight.double(),
            weight_of_gradients=None if of_gradients is None else of_gradients.double(),
        )


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
    precision: ExpertPrecision | None = None

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
    CheckedLayer("fp8_block", torch.bfloat16, 1024, precision=ExpertPrecision("fp8_block")),
    CheckedLayer("fp8_block, few tokens", torch.bfloat16, 40, bias=True, precision=ExpertPrecision("fp8_block")),
    CheckedLayer("mxfp8", torch.bfloat16, 1024, precision=ExpertPrecision("mxfp8")),
    CheckedLayer("mxfp8, few tokens", torch.bfloat16, 40, bias=True, precision=ExpertPrecision("mxfp8")),
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
    layer: CalledLayer,
    dtype: torch.dtype,
    options: KernelOptions,
    num_experts: int,
    top_k: int,
    precision: ExpertPrecision | None = None,
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
    name += "" if precision is None else f", in {precision.format}"
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
        precision,
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
    """Run every operation of `ops`, each on operands that plain PyTorch made, and compare with fp64.

    ops: of a layer in a precision, those in that precision.
    """
    case, reference = _case(layer, device), cast(Operations, reference_module)
    exact_reference = reference
    if layer.precision is not None:
        exact_reference = cast(Operations, _RoundedInDouble(reference, layer.precision))
        rounded = RoundedOperations(reference, layer.precision)
        case.x, case.dout, reference = rounded.round_rows(case.x), rounded.round_rows(case.dout), rounded
    expected = reference.group(case.ids, layer.num_experts)
    grouping = ops.group(case.ids, layer.num_experts)
    for name in ("expert_offsets", "inverse", "pair_index"):
        found, right = getattr(grouping, name), getattr(expected, name)
        yield check_ids(layer.name, f"group: {name}", found[: len(right)], right)
    plain = case.run(reference, expected, layer.activation)
    exact = case.double().run(exact_reference, expected, layer.activation, plain)
    actual = case.run(ops, grouping, layer.activation, plain, layer.options)
    for name, value in actual.items():
        if value.numel():
            yield Checked(layer.name, name, distances(value, plain[name], exact[name], value.dtype))
