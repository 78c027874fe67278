"""RoundedOperations: the operations of a backend in an ExpertPrecision, as its products in bf16 of rounded operands.

That is what the precision is defined by (config/precision.py), on every device and in every backend. Whoever calls has
rounded the rows x and dout, once for each token and before they travel, and the weights (Projection says so).
"""

import logging
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from tritonmoe.config.activations import FusedActivation
from tritonmoe.config.layer import NO_WEIGHTS, ExpertLayout, KernelOptions, PerWeight, Projection
from tritonmoe.config.precision import ExpertPrecision, rounded, rounded_rows
from tritonmoe.ops.backends.ops import GradientOperands, Operations, WeightGrads, required
from tritonmoe.ops.grouping import Grouping
from tritonmoe.runtime.host_device import is_captured

__all__ = ["EMULATED", "RoundedOperations", "rounded_operations"]

logger = logging.getLogger(__name__)
EMULATED = "emulated: bf16 products of rounded numbers, which take longer than a layer in bf16"


def rounded_operations(ops: Operations, precision: ExpertPrecision | None) -> Operations:
    """Return the operations of a backend in a precision; these themselves without one."""
    if precision is None:
        return ops
    _say_emulated(precision.format)
    return cast(Operations, RoundedOperations(ops, precision))


@cache
def _say_emulated(precision_format: str) -> None:
    """Log once that no instruction of the device is used."""
    logger.warning("experts in %s are %s: results are those of the precision", precision_format, EMULATED)


class RoundedOperations:
    """The seven operations: ops.py is their contract."""

    def __init__(self, ops: Operations, precision: ExpertPrecision) -> None:
        self._ops, self._precision = ops, precision
        self.__name__, self.MAX_BLOCK_PAIRS = ops.__name__, ops.MAX_BLOCK_PAIRS
        self.copies_rows, self.group, self.gather_sum = ops.copies_rows, ops.group, ops.gather_sum
        self.up = ops.up

    def down(self, a: Tensor, projection: Projection, grouping: Grouping, **others: Any) -> Tensor:
        return self._ops.down(rounded_rows(a, self._precision), projection, grouping, **others)

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
        return self._ops.up_grad(rounded_rows(dh, self._precision), projection.for_gradients, grouping, **others)

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
        if self._precision.weight_gradients == "bf16":
            return self._ops.weight_grad(grouping, layout, operands, needs, accumulate=accumulate, options=options)
        if is_captured(grouping.pair_index.device):
            raise ValueError(
                f"a CUDA graph can't capture a backward in {self._precision}, which waits for the number of pairs of "
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
        sources = slice(offsets[-1]) if places is None else places
        sorted_values = values[sources] if rows is None else values.index_select(0, rows[sources])
        out = values.new_zeros(grouping.num_pairs, values.shape[1])
        for first, last in pairwise(offsets):
            rounded(sorted_values[first:last], (self._precision.block, 1), out[first:last])
        return out if places is None else torch.zeros_like(out).index_copy_(0, places, out[: offsets[-1]])
