"""EncodedOperations: the operations in an ExpertPrecision, as products of codes by the cards' own 8-bit instructions.

Numbers are those of RoundedOperations but for the order of sums: whatever is multiplied there is encoded here first,
and codes and scales stand for the bits of rounded numbers. Weights are encoded once for each pass; x and dout, which
come as rounded rows, in each operation, since gradients of weights are products of the rows themselves.
"""

from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from tritonmoe.config.activations import FusedActivation
from tritonmoe.config.layer import Projection
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.backends.ops import Operations
from tritonmoe.ops.backends.rounded import Directions, RoundedOperations
from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels.encode import encode_rows, encode_weight, round_rows

__all__ = ["EncodedOperations"]


class EncodedOperations(RoundedOperations):
    """The seven operations: ops.py is their contract. Projections are those that projection() gives."""

    def __init__(self, precision: ExpertPrecision) -> None:
        super().__init__(cast(Operations, kernels), precision)
        self.up = self._up

    def rounded_bytes(self, weight: Tensor) -> int:
        scales = weight.numel() // (self.precision.block * self.precision.block_rows)
        return weight.numel() + scales

    def round_rows(self, rows: Tensor) -> Tensor:
        return round_rows(rows, self.precision)

    def projection(self, projection: Projection, directions: Directions) -> Projection:
        weight, layout, precision = projection.weight, projection.layout, self.precision
        out_axis, in_axis = (2, 1) if layout.transposed else (1, 2)
        if directions == "backward":
            codes, scales = encode_weight(weight, precision, out_axis)
            return projection._replace(weight=codes, scales=scales, layout=replace(layout, transposed=True))
        codes, scales = encode_weight(weight, precision, in_axis)
        forward = projection._replace(weight=codes, scales=scales, layout=replace(layout, transposed=False))
        if directions == "forward":
            return forward
        codes, scales = encode_weight(weight, precision, out_axis)
        return forward._replace(weight_of_gradients=codes, scales_of_gradients=scales)

    def _up(self, x: Tensor, projection: Projection, grouping: Grouping, *others: Any, **more: Any) -> Any:
        codes = encode_rows(x, self.precision, grouping.gathered_rows)
        return kernels.up(x, projection, grouping, *others, codes=codes, **more)

    def down(self, a: Tensor, projection: Projection, grouping: Grouping, **others: Any) -> Tensor:
        return kernels.down(a, projection, grouping, codes=encode_rows(a, self.precision), **others)

    def down_grad(
        self,
        dout: Tensor,
        projection: Projection,
        hidden: Tensor,
        topk_weights: Tensor,
        grouping: Grouping,
        activation: FusedActivation | None,
        **others: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, codes = projection.for_gradients, encode_rows(dout, self.precision, grouping.gathered_rows)
        return kernels.down_grad(dout, weight, hidden, topk_weights, grouping, activation, codes=codes, **others)

    def up_grad(self, dh: Tensor, projection: Projection, grouping: Grouping, **others: Any) -> Tensor:
        codes = encode_rows(dh, self.precision)
        return kernels.up_grad(dh, projection.for_gradients, grouping, codes=codes, **others)
