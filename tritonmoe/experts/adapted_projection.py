"""AdaptedProjection: a projection with a low-rank adapter, and the sums that are the gradients of its factors.

It multiplies by W + scale * A B without ever making that sum: rows go through A (R columns are left of them) and B, and
the product with W is added to what came out.
"""

from typing import NamedTuple

from torch import Tensor

from tritonmoe.config.activations import FusedActivation
from tritonmoe.config.layer import ExpertLayout, KernelOptions, PerWeight, Projection
from tritonmoe.experts.adapter_dropout import AdapterDropout, DroppedRows
from tritonmoe.experts.flops import count_products, matrix_sizes
from tritonmoe.ops.backends.ops import GradientOperands, Operations, required
from tritonmoe.ops.backends.pair_work import grad_multiplications, multiplications
from tritonmoe.ops.grouping import Grouping

__all__ = ["AdaptedProjection", "AdapterRows", "AdapterRowsOfBoth", "adapter_gradients"]


class AdapterRows(NamedTuple):
    """Rows in the rank of an adapter, one for each pair in storage order: what the gradients of its factors are of."""

    inward: Tensor
    """(N, R): what the forward multiplies with B, here times the gate weight for the down-projection."""
    outward: Tensor
    """(N, R): what the backward multiplies with A."""
    dropped: Tensor | None = None
    """With dropout, what the forward multiplies with A: (R, D) rows of the up-projection, or (N, F), s*a of the
    down-projection."""

    def part(self, positions: slice) -> "AdapterRows":
        """Return those of some pairs; `dropped` is the down-projection's."""
        dropped = None if self.dropped is None else self.dropped[positions]
        return AdapterRows(self.inward[positions], self.outward[positions], dropped)


AdapterRowsOfBoth = tuple[AdapterRows | None, AdapterRows | None]
"""Those of the up-projection's adapter and of the down-projection's."""
FACTOR = ExpertLayout(gated=False)
FACTOR_TRANSPOSED = ExpertLayout(gated=False, transposed=True)


class AdaptedProjection(NamedTuple):
    """A projection and its adapter, with the operations that multiply by both."""

    ops: Operations
    options: KernelOptions
    projection: Projection
    factor_a: Tensor | None
    """(E, R, in); None where the projection is not adapted."""
    factor_b: Tensor | None
    """(E, out, R), with the scale."""
    dropout: AdapterDropout | None = None
    """Of the down-projection; see ExpertSettings.projections()."""

    def of_experts(self, experts: slice) -> "AdaptedProjection":
        """Return the projection of some of the experts."""
        a, b = (None if of is None else of[experts] for of in (self.factor_a, self.factor_b))
        return self._replace(projection=self.projection.of_experts(experts), factor_a=a, factor_b=b)

    def _gathered(self, rows: Tensor, grouping: Grouping) -> tuple[Tensor, Grouping]:
        """Gather rows once for two products, where the operations copy them in any case, a block of pairs at a time."""
        if self.ops.MAX_BLOCK_PAIRS is None or grouping.rows_are_pairs:
            return rows, grouping
        return rows.index_select(0, grouping.row_index), grouping.by_pair

    @property
    def _sizes(self) -> tuple[int, int, int]:
        a, b = (None if of is None else of.shape for of in (self.factor_a, self.factor_b))
        return matrix_sizes(self.projection.shape, a, b)

    @property
    def num_products(self) -> int:
        """The multiplications of one pair in up() and down()."""
        return multiplications(*self._sizes)

    def num_grad_products(self, needs_inputs: bool = True) -> int:
        """Return those in up_grad() and down_grad()."""
        return grad_multiplications(*self._sizes, needs_inputs)

    def rows(self, num_pairs: int) -> AdapterRows | None:
        """Return memory for the rows of an adapter's gradients; None where there is no adapter."""
        if self.factor_a is None:
            return None
        _, rank, width = self.factor_a.shape
        inward, outward = (self.factor_a.new_empty(num_pairs, rank) for _ in range(2))
        return AdapterRows(inward, outward, None if self.dropout is None else inward.new_empty(num_pairs, width))

    def up(
        self,
        x: Tensor,
        grouping: Grouping,
        activation: FusedActivation | None,
        *,
        dropped: DroppedRows | None = None,
        needs_h: bool = True,
        out_h: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the operation `up` with the adapter; dropped: x as the adapter takes it, None for x itself."""
        ops, options, projection, factor_a, factor_b, _ = self
        if factor_a is not None and factor_b is not None:
            rows, by_row = self._gathered(x if dropped is None else dropped.values, grouping)
            reduced, _ = ops.up(rows, Projection(factor_a, None, FACTOR), by_row, None, options=options)
            out_h = ops.down(required(reduced), Projection(factor_b, None, FACTOR), by_row, out=out_h, options=options)
            projection = projection._replace(addend=out_h)
            if dropped is None:
                x, grouping = rows, by_row
        return ops.up(x, projection, grouping, activation, needs_h=needs_h, out_h=out_h, options=options)

    def hidden(self, x: Tensor, grouping: Grouping, dropped: DroppedRows | None) -> Tensor:
        """Return h alone, (N, 2F), as up() gives it."""
        h, _ = self.up(x, grouping, None, dropped=dropped)
        return required(h)

    def down(self, a: Tensor, grouping: Grouping, *, out: Tensor | None = None) -> Tensor:
        """Run the operation `down` with the adapter."""
        ops, options, projection, factor_a, factor_b, dropout = self
        if factor_a is not None and factor_b is not None:
            inward = a if dropout is None else a.masked_fill(dropout.dropped_of_pairs(grouping, a.shape[1]), 0)
            reduced = ops.down(inward, Projection(factor_a, None, FACTOR), grouping, options=options)
            out = ops.down(reduced, Projection(factor_b, None, FACTOR), grouping, out=out, options=options)
            projection = projection._replace(addend=out)
        return ops.down(a, projection, grouping, out=out, options=options)

    def down_grad(
        self,
        dout: Tensor,
        hidden: Tensor,
        topk_weights: Tensor,
        grouping: Grouping,
        activation: FusedActivation | None,
        *,
        out: tuple[Tensor | None, Tensor | None],
        rows: AdapterRows | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the operation `down_grad` with the adapter, and fill `rows`."""
        ops, options, projection, factor_a, factor_b, dropout = self
        is_dropped = None
        if factor_a is not None and factor_b is not None and rows is not None:
            if dropout is not None:
                is_dropped = dropout.dropped_of_pairs(grouping, factor_a.shape[2])
            dout, by_pair = self._gathered(dout, grouping)
            if by_pair is not grouping:
                topk_weights = topk_weights.flatten().index_select(0, grouping.pair_index).unsqueeze(1)
                grouping = by_pair
            to_rank = Projection(factor_b, None, FACTOR_TRANSPOSED)
            ops.up(dout, to_rank, grouping, None, out_h=rows.outward, options=options)
            through = ops.up_grad(
                rows.outward, Projection(factor_a, None, FACTOR), grouping, out=out[1], options=options
            )
            if is_dropped is not None:
                through.masked_fill_(is_dropped, 0)
            projection, out = projection._replace(addend=through), (out[0], through)
        dh, scaled_a, dweights = ops.down_grad(
            dout, projection, hidden, topk_weights, grouping, activation, out=out, options=options
        )
        if factor_a is not None and rows is not None:
            inward = scaled_a
            if is_dropped is not None and rows.dropped is not None:
                inward = rows.dropped.copy_(scaled_a).masked_fill_(is_dropped, 0)
            ops.down(inward, Projection(factor_a, None, FACTOR), grouping, out=rows.inward, options=options)
        return dh, scaled_a, dweights

    def up_grad(
        self,
        dh: Tensor,
        x: Tensor,
        grouping: Grouping,
        *,
        needs_dx: bool,
        out: Tensor | None,
        rows: AdapterRows | None,
        dropped: DroppedRows | None = None,
    ) -> Tensor | None:
        """Run the operation `up_grad` with the adapter, if dx is needed, and fill `rows`. x, dropped: those of `up`."""
        ops, options, projection, factor_a, factor_b, _ = self
        if factor_a is not None and factor_b is not None and rows is not None:
            inward, outward = Projection(factor_a, None, FACTOR), Projection(factor_b, None, FACTOR)
            inputs = x if dropped is None else dropped.values
            ops.up(inputs, inward, grouping, None, out_h=rows.inward, options=options)
            ops.up_grad(dh, outward, grouping, out=rows.outward, options=options)
            if needs_dx:
                out = ops.up_grad(rows.outward, inward, grouping, out=out, options=options)
                if dropped is not None:
                    out.masked_fill_(dropped.of_pairs(grouping), 0)
                projection = projection._replace(addend=out)
        return ops.up_grad(dh, projection, grouping, out=out, options=options) if needs_dx else None


def adapter_gradients(
    ops: Operations,
    options: KernelOptions,
    grouping: Grouping,
    needs: PerWeight[bool],
    operands: GradientOperands,
    rows: AdapterRowsOfBoth,
) -> dict[str, Tensor | None]:
    """Sum the gradients of the adapters' factors that are needed, over all pairs of a layer, by PerWeight's names.

    Args:
        operands: those of the weights' gradients. rows: what up_grad() and down_grad() filled, of all chunks.
    """
    of_up, of_down = rows
    x, dh, dout, scaled_a, _ = operands
    pairs = grouping.by_pair

    def outer(of: Grouping, pair_values: Tensor | None, row_values: Tensor | None, layout: ExpertLayout) -> Tensor:
        left, right = required(pair_values), required(row_values)
        count_products(ops, left, of.num_pairs, lambda: left.shape[1] * right.shape[1])
        sums = ops.weight_grad(of, layout, GradientOperands(x=right, dh=left), NEEDS_UP, options=options).gate_up_proj
        return required(sums)

    grads: dict[str, Tensor | None] = {}
    if of_up is not None:
        x = x if of_up.dropped is None else of_up.dropped
        grads["gate_up_a"] = outer(grouping, of_up.outward, x, FACTOR) if needs.gate_up_a else None
        grads["gate_up_b"] = outer(pairs, of_up.inward, dh, FACTOR).mT.contiguous() if needs.gate_up_b else None
    if of_down is not None:
        scaled_a = scaled_a if of_down.dropped is None else of_down.dropped
        grads["down_a"] = outer(pairs, of_down.outward, scaled_a, FACTOR) if needs.down_a else None
        grads["down_b"] = outer(grouping, of_down.inward, dout, FACTOR_TRANSPOSED) if needs.down_b else None
    return grads


NEEDS_UP = PerWeight(True, False, False, False)
