"""LayerCase: one layer's random operands, and every operation of it run once, by which backends are compared."""

import copy

import torch
from torch import Tensor

from tritonmoe.config.activations import FusedActivation
from tritonmoe.config.formats import WeightFormat, find_format
from tritonmoe.config.layer import ExpertLayout, KernelOptions, PerWeight, Projection
from tritonmoe.ops.backends.decoding import decoded
from tritonmoe.ops.backends.ops import GradientOperands, Operations
from tritonmoe.ops.grouping import Grouping

__all__ = ["LayerCase"]

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

        gate_up = self._adding(self.gate_up, "h", num_pairs)
        h, a = ops.up(self.x, gate_up, grouping, activation, out_h=gate_up.addend, options=options)
        found["up: h"] = h
        if a is None:
            hidden = found["up: a"] = h.new_full((num_pairs, self.intermediate), 0.5)
        else:
            found["up: a"], hidden = a, operand("up: h")
        down = self._adding(self.down, "y", num_pairs)
        found["down"] = ops.down(operand("up: a"), down, grouping, out=down.addend, options=options)
        found["gather_sum"] = ops.gather_sum(operand("down"), grouping.inverse, self.weights)
        found["gather_sum: without weights"] = ops.gather_sum(operand("down"), grouping.inverse)
        down = self._adding(self.down, "g", num_pairs)
        dh, scaled_a, dweights = ops.down_grad(
            self.dout, down, hidden, self.weights, grouping, activation, out=(None, down.addend), options=options
        )
        found |= {"down_grad: dh": dh, "down_grad: s*a": scaled_a, "down_grad: gate weights": dweights}
        if activation is not None:
            gate_up = self._adding(self.gate_up, "dx", num_pairs)
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
