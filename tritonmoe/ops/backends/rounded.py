"""RoundedOperations: the operations of a backend in an ExpertPrecision, as its products in bf16 of rounded operands.

That is what the precision is defined by (config/precision.py), on every device and in every backend. Whoever calls has
rounded the rows x and dout with round_rows(), once for each token and before they travel, and has the projections from
projection().
"""

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from tritonmoe.config.activations import FusedActivation
from tritonmoe.config.layer import NO_WEIGHTS, ExpertLayout, KernelOptions, PerWeight, Projection
from tritonmoe.config.precision import ExpertPrecision, rounded, rounded_rows, weight_block
from tritonmoe.ops.backends.ops import GradientOperands, Operations, WeightGrads, required
from tritonmoe.ops.grouping import Grouping
from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.cpu_threads import for_each
from tritonmoe.runtime.host_device import is_captured

__all__ = ["Directions", "RoundedOperations", "rounded_weight"]

Directions = Literal["forward", "backward", "both"]
"""Of which products a weight is an operand: those of the forward, or those that give gradients of rows."""


def rounded_weight(weight: Tensor, precision: ExpertPrecision, depth: int) -> Tensor:
    """Return a weight (E, A, B) bf16, rounded for a product that sums over the axis `depth`, 1 or 2."""
    block, out = weight_block(precision, depth - 1), cpu_memory.empty(*weight.shape, like=weight)
    # Threads that share an operation would wait for each other ten times a piece.
    for_each(lambda expert: rounded(weight[expert], block, out[expert]), range(weight.shape[0]), weight.device)
    return out


class RoundedOperations:
    """The seven operations: ops.py is their contract."""

    def __init__(self, ops: Operations, precision: ExpertPrecision) -> None:
        self._ops, self.precision = ops, precision
        self.__name__, self.MAX_BLOCK_PAIRS = ops.__name__, ops.MAX_BLOCK_PAIRS
        self.copies_rows, self.group, self.gather_sum = ops.copies_rows, ops.group, ops.gather_sum
        self.up = ops.up

    def rounded_bytes(self, weight: Tensor) -> int:
        """Return the bytes of a weight, rounded for the products of one direction."""
        return weight.numel() * torch.bfloat16.itemsize

    def round_rows(self, rows: Tensor) -> Tensor:
        """Return rows (N, depth) as a product over the depth takes them: x and dout before they go to experts."""
        return rounded_rows(rows, self.precision)

    def projection(self, projection: Projection, directions: Directions) -> Projection:
        """Return a projection whose weight is rounded for the products of these directions."""
        weight, precision = projection.weight, self.precision
        out_axis, in_axis = (2, 1) if projection.layout.transposed else (1, 2)
        if precision.is_symmetric:
            return projection._replace(weight=rounded_weight(weight, precision, in_axis))
        of_gradients = None if directions == "forward" else rounded_weight(weight, precision, out_axis)
        if directions != "backward":
            weight = rounded_weight(weight, precision, in_axis)
        return projection._replace(weight=weight, weight_of_gradients=of_gradients)

    def down(self, a: Tensor, projection: Projection, grouping: Grouping, **others: Any) -> Tensor:
        return self._ops.down(self.round_rows(a), projection, grouping, **others)

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
        weight = projection.for_gradients
        return self._ops.down_grad(dout, weight, hidden, topk_weights, grouping, activation, **others)

    def up_grad(self, dh: Tensor, projection: Projection, grouping: Grouping, **others: Any) -> Tensor:
        return self._ops.up_grad(self.round_rows(dh), projection.for_gradients, grouping, **others)

    def weight_grad(
        self,
        grouping: Grouping,
        layout: ExpertLayout,
        operands: GradientOperands,
        needs: PerWeight[bool],
        *,
        accumulate: PerWeight[Tensor | None] = NO_WEIGHTS,
        options: KernelOptions = KernelOptions(),
    ) -> WeightGrads:
        """Round both operands of the products along the tokens, where the precision says so; biases are only sums."""
        if self.precision.weight_gradients == "bf16":
            return self._ops.weight_grad(grouping, layout, operands, needs, accumulate=accumulate, options=options)
        if is_captured(grouping.pair_index.device):
            raise ValueError(
                f"a CUDA graph can't capture a backward in {self.precision}, which waits for the number of pairs of "
                "each expert: take weight_gradients='bf16'"
            )
        biases = needs._replace(gate_up_proj=False, down_proj=False)
        grads = self._ops.weight_grad(grouping, layout, operands, biases, options=options)
        wanted = needs._replace(gate_up_bias=False, down_bias=False)
        pairs, rows = grouping.by_pair, grouping.row_index
        of_pairs = GradientOperands()
        if wanted.gate_up_proj:
            of_pairs = of_pairs._replace(
                x=self._tokens(operands.x, grouping, rows), dh=self._tokens(operands.dh, grouping)
            )
        if wanted.down_proj:
            dout, scaled_a = self._tokens(operands.dout, grouping, rows), self._tokens(operands.scaled_a, grouping)
            of_pairs = of_pairs._replace(dout=dout, scaled_a=scaled_a)
        products = self._ops.weight_grad(pairs, layout, of_pairs, wanted, accumulate=accumulate, options=options)
        return grads._replace(gate_up_proj=products.gate_up_proj, down_proj=products.down_proj)

    def _tokens(self, values: Tensor | None, grouping: Grouping, rows: Tensor | None = None) -> Tensor:
        """Return values (N, columns) of pairs in storage order, rounded along each expert's pairs in source order.

        rows: (N,), which of the values each pair has; None: the one in its place. Behind the last pair, where kernels'
        groupings have room that nobody reads, stand zeros.
        """
        values, offsets, order = required(values), grouping.host_expert_offsets, grouping.source_order
        places = None if order is None else order[: offsets[-1]].long()
        sources = places if rows is None else rows if places is None else rows[places]
        block, out = (self.precision.block, 1), values.new_zeros(grouping.num_pairs, values.shape[1])

        def round_expert(pairs: slice) -> None:
            if sources is None:
                rounded(values[pairs], block, out[pairs])
                return
            of_expert = rounded(values.index_select(0, sources[pairs]), block)
            if places is None:
                out[pairs] = of_expert
            else:
                out.index_copy_(0, places[pairs], of_expert)

        for_each(round_expert, [slice(*pairs) for pairs in pairwise(offsets)], values.device)
        return out
