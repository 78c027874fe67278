"""Operands of down_grad and weight_grad, and results that their bits or their errors are compared with."""

from types import ModuleType

import torch
from kernel_cases import ALL_GRADIENTS, DEVICE
from torch import Tensor

from tritonmoe.backends import reference
from tritonmoe.backends.ops import GradientOperands
from tritonmoe.config.activations import FusedActivation
from tritonmoe.config.layer import ExpertLayout, Projection
from tritonmoe.grouping import Grouping


class Operands:
    """What a layer's backward needs, in one dtype; values behind the last pair are NaN."""

    def __init__(
        self,
        ids: Tensor,
        num_experts: int,
        layout: ExpertLayout,
        dtype: torch.dtype = torch.float32,
        *,
        hidden: int = 20,
        intermediate: int = 12,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.ids, self.num_experts, self.layout = ids.to(DEVICE), num_experts, layout
        self.width = 2 * intermediate if layout.gated else intermediate
        self.intermediate, self.hidden = intermediate, hidden
        num_pairs = ids.numel()
        self.x, self.dout = random(ids.shape[0], hidden), random(ids.shape[0], hidden)
        self.weights = torch.rand(ids.shape, generator=generator).to(DEVICE)
        self.h, self.a = random(num_pairs, self.width), random(num_pairs, intermediate)
        self.dh, self.scaled_a = random(num_pairs, self.width), random(num_pairs, intermediate)
        shape = (hidden, intermediate)
        self.w2 = random(num_experts, *(shape[::-1] if layout.transposed else shape)) * intermediate**-0.5
        self.b2 = random(num_experts, hidden)
        num_active = int(((self.ids >= 0) & (self.ids < num_experts)).sum())
        for values in (self.h, self.a, self.dh, self.scaled_a):
            values[num_active:] = float("nan")

    def double(self) -> "Operands":
        """Return the same numbers in fp64."""
        twin = object.__new__(Operands)
        for name, value in vars(self).items():
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            setattr(twin, name, value.double() if is_float else value)
        return twin

    def group(self) -> Grouping:
        return reference.group(self.ids, self.num_experts)

    def down_grad(
        self, backend: ModuleType, grouping: Grouping, activation: FusedActivation | None, bias: bool = True, **keywords
    ) -> dict[str, Tensor]:
        """Return dh (da without an activation), s*a and dweights of the pairs that do work."""
        num_active = int(grouping.expert_offsets[-1])
        hidden = (self.a if activation is None else self.h)[: grouping.num_pairs]
        down = Projection(self.w2, self.b2 if bias else None, self.layout)
        results = backend.down_grad(self.dout, down, hidden, self.weights, grouping, activation, **keywords)
        return {name: value[:num_active] for name, value in zip(("dh", "scaled_a", "dweights"), results, strict=True)}

    def weight_grad(self, backend: ModuleType, grouping: Grouping, **keywords) -> reference.WeightGrads:
        dh, scaled_a = self.dh[: grouping.num_pairs], self.scaled_a[: grouping.num_pairs]
        operands = GradientOperands(self.x, dh, self.dout, scaled_a, self.weights)
        return backend.weight_grad(grouping, self.layout, operands, ALL_GRADIENTS, **keywords)
