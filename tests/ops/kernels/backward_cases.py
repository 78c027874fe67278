"""Operands of down_grad and weight_grad, and results that their bits or their errors are compared with."""

from types import ModuleType

import torch
from kernel_cases import ALL_GRADIENTS, Layer
from torch import Tensor

from tritonmoe.config.activations import FusedActivation
from tritonmoe.config.layer import ExpertLayout, Projection
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends.ops import GradientOperands
from tritonmoe.ops.grouping import Grouping


class Operands(Layer):
    """What a layer's backward needs, in one dtype; values behind the last pair are NaN."""

    def __init__(
        self, ids: Tensor, num_experts: int, layout: ExpertLayout, dtype: torch.dtype = torch.float32, **others
    ) -> None:
        super().__init__(ids, num_experts, layout, dtype, **others)
        num_pairs = ids.numel()
        self.h, self.a = self.draw(num_pairs, self.width), self.draw(num_pairs, self.intermediate)
        self.dh, self.scaled_a = self.draw(num_pairs, self.width), self.draw(num_pairs, self.intermediate)
        num_active = int(((self.ids >= 0) & (self.ids < num_experts)).sum())
        for values in (self.h, self.a, self.dh, self.scaled_a):
            values[num_active:] = float("nan")

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
