"""ForwardRun and BackwardRun: the experts of one rank, a chunk at a time.

Knows nothing of ranks, streams or transports. One device is the case of one chunk.
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from tritonmoe.backends.ops import GradientOperands, accumulation_dtype
from tritonmoe.config.activations import is_fused
from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.experts.adapted_projection import AdaptedProjection, AdapterRowsOfBoth
from tritonmoe.experts.adapter_dropout import DroppedRows, rows_of_pairs
from tritonmoe.experts.callable_activation import ActivationGraph, run_activation, zero_padding
from tritonmoe.experts.flops import count_products
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.experts.weight_gradients import SharedWeightGrads, weight_gradients
from tritonmoe.grouping import Grouping, GroupingBlock
from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.cpu_threads import for_each, num_workers

__all__ = ["BackwardRun", "ForwardRun"]

SMALLEST_BLOCK_PAIRS = 256
"""Blocks are made smaller so that every worker has its share, but never smaller than this."""


class _Run:
    """One call of this rank's experts, chunk by chunk in order.

    A chunk here is a segment of the plan, so local rows are chunks too. Tensors that outlive a chunk are allocated once
    for the whole layer.

    Args:
        tensors: x (R, D), the received rows of all chunks, topk_weights (R, K) and row_seeds (R,) of these rows, and
            the weights; topk_ids are not read.
        h: (N, 2F), where it is given back, or memory for it.
    """

    def __init__(
        self, settings: ExpertSettings, tensors: CallTensors[Tensor], grouping: Grouping, h: Tensor | None = None
    ) -> None:
        self.settings, self.tensors, self.grouping, self.h = settings, tensors, grouping, h
        self.weights, self.rows, self.topk_weights = tensors.weights, tensors.x, tensors.topk_weights
        self.row_seeds = tensors.row_seeds
        self.dropped: DroppedRows | None = None
        """The rows as the adapter of the up-projection multiplies them, where it has dropout; filled chunk by chunk."""
        self._reused: dict[str, Tensor] = {}
        """Memory that every chunk uses again."""

    def _no_sums(self, grouping: Grouping) -> Tensor:
        """Return the sums of rows without a pair, which are a capacity's padding."""
        return self.rows.new_zeros(grouping.inverse.shape[0], self.rows.shape[1])

    def _blocks(self, grouping: Grouping) -> list[GroupingBlock]:
        """Cut a chunk's pairs into what the backend computes at a time, so that every worker of a CPU has its share."""
        most, num_pairs = self.settings.ops.MAX_BLOCK_PAIRS, grouping.num_pairs
        if most is not None and num_pairs > most:
            workers = num_workers(self.rows.device)
            if workers > 1:
                most = min(most, max(SMALLEST_BLOCK_PAIRS, -(-num_pairs // (2 * workers))))
        return grouping.blocks(most)

    def _block_projections(self, block: GroupingBlock) -> tuple[AdaptedProjection, AdaptedProjection]:
        """Return the up-projection and the down-projection of the block's experts."""
        if block.grouping.num_experts == self.weights.gate_up_proj.shape[0]:
            return self._projections
        return self.settings.projections(self.weights.map(lambda weight: weight[block.experts]), self.row_seeds)

    @cached_property
    def _projections(self) -> tuple[AdaptedProjection, AdaptedProjection]:
        """The up-projection and the down-projection of all experts."""
        return self.settings.projections(self.weights, self.row_seeds)

    def _drop_rows(self, chunk: int, grouping: Grouping) -> None:
        """Fill `dropped` for the rows of a chunk."""
        dropout = self.settings.adapter_dropout(self.row_seeds)
        if dropout is None or self.weights.gate_up_a is None:
            return
        if self.dropped is None:
            self.dropped = DroppedRows.like(self.rows)
        first = self.grouping.first_expert_chunk
        if first is None or chunk < first:
            places: slice | Tensor = slice(*self.grouping.chunk_row_offsets[chunk : chunk + 2])
        else:  # some of the rows that have come so far
            places = rows_of_pairs(grouping)
        dropout.drop_rows(self.rows, places, self.dropped)

    @property
    def _hidden_width(self) -> int:
        """2F, or F when ungated."""
        return self.weights.gate_up_proj.shape[2 if self.settings.spec.layout.transposed else 1]

    def _chunk_scratch(self, name: str, num_pairs: int, width: int) -> Tensor:
        """Return (num_pairs, width) of memory that is not needed after this chunk."""
        if name not in self._reused:
            largest = max(last - first for first, last in pairwise(self.grouping.chunk_pair_offsets))
            self._reused[name] = cpu_memory.empty(largest, width, like=self.rows)
        return self._reused[name][:num_pairs]

    def _pairs(self, chunk: int) -> slice:
        return slice(*self.grouping.chunk_pair_offsets[chunk : chunk + 2])

    def _results(self, chunk: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the results (N, D) of all pairs in chunks of experts, since sums take those of several, and its own.

        None where the chunk is a range of rows, with all that its sums take.
        """
        first = self.grouping.first_expert_chunk
        if first is None or chunk < first:
            return None, None
        if "results" not in self._reused:
            offsets = self.grouping.chunk_pair_offsets
            self._reused["results"] = cpu_memory.empty(offsets[-1] - offsets[first], self.rows.shape[1], like=self.rows)
        results = self._reused["results"]
        return results, results[self._pairs_since(first, chunk)]

    def _pairs_since(self, first: int, chunk: int) -> slice:
        """Return where the chunk's pairs lie among those of the chunks from `first` on."""
        start, *pairs = (self.grouping.chunk_pair_offsets[c] for c in (first, chunk, chunk + 1))
        return slice(pairs[0] - start, pairs[1] - start)


class ForwardRun(_Run):
    """The forward of a call. forward(c) needs the rows of chunk c's pairs to be in `rows`.

    Args:
        keep_hidden: whether h is kept for a backward, in `h`; False in inference and with save="input".
    """

    def __init__(
        self,
        settings: ExpertSettings,
        tensors: CallTensors[Tensor],
        grouping: Grouping,
        keep_hidden: bool,
        h: Tensor | None = None,
    ) -> None:
        super().__init__(settings, tensors, grouping, h)
        self.keep_hidden = keep_hidden
        self.activation_graphs: dict[int, ActivationGraph] = {}
        """Callable activations: chunk -> the graph that backward goes through."""

    def forward(self, chunk: int, out: Tensor | None = None) -> Tensor:
        """Compute chunk `chunk` and give the weighted partial sums of the rows that it finishes, (R_c, D)."""
        ops, activation = self.settings.ops, self.settings.spec.activation
        grouping = self.grouping.chunk(chunk)
        if grouping.num_pairs == 0 and self.grouping.num_chunks > 1:
            return self._no_sums(grouping) if out is None else out
        gate_up, down = self._projections
        self._drop_rows(chunk, grouping)
        count_products(ops, self.rows, grouping.num_pairs, lambda: gate_up.num_products + down.num_products)
        results, y = self._results(chunk)
        if is_fused(activation):
            blocks = self._blocks(grouping)
            is_whole = len(blocks) == 1 and self.grouping.num_chunks == 1
            if self.keep_hidden and self.h is None and not is_whole:
                self.h = cpu_memory.empty(self.grouping.num_pairs, self._hidden_width, like=self.rows)
            h = None if self.h is None else _part(self.h, self._pairs(chunk))
            if len(blocks) == 1:
                h, y = self._forward_block(blocks[0], needs_h=self.keep_hidden, out_h=h, out_y=y)
                if self.keep_hidden and is_whole:
                    self.h = h
            else:
                pairs_h = h
                pairs_y = self._chunk_scratch("y", grouping.num_pairs, self.rows.shape[1]) if y is None else y

                def forward_block(block: GroupingBlock) -> None:
                    out_h = None if pairs_h is None else pairs_h[block.positions]
                    self._forward_block(block, out_h=out_h, out_y=pairs_y[block.positions])

                for_each(forward_block, blocks, self.rows.device)
                y = pairs_y
        else:
            h = gate_up.hidden(self.rows, grouping, self.dropped)
            a, graph = run_activation(self.settings, h, grouping, self.keep_hidden)
            if graph is not None:
                self.activation_graphs[chunk] = graph
            y = down.down(a, grouping, out=y)
        return ops.gather_sum(y if results is None else results, grouping.inverse, self._row_weights(chunk), out=out)

    def _forward_block(
        self,
        block: GroupingBlock,
        needs_h: bool = False,
        out_h: Tensor | None = None,
        out_y: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        activation = self.settings.spec.activation
        assert is_fused(activation), "callables take whole chunks"
        gate_up, down = self._block_projections(block)
        h, a = gate_up.up(self.rows, block.grouping, activation, dropped=self.dropped, needs_h=needs_h, out_h=out_h)
        assert a is not None
        return h, down.down(a, block.grouping, out=out_y)

    def _row_weights(self, chunk: int) -> Tensor:
        """Return topk_weights (R_c, K) of the rows that the chunk finishes."""
        rows = slice(*self.grouping.chunk_row_offsets[chunk : chunk + 2])
        if self.grouping.returned_rows is None:
            return _part(self.topk_weights, rows)
        return self.topk_weights.index_select(0, self.grouping.returned_rows[rows])


class BackwardRun(_Run):
    """The backward of a call. backward(c) needs the rows of chunk c's pairs in `dout`; weight_grad() comes behind all.

    Args:
        tensors: also with the parameters of a callable activation.
        h, activation_graphs: what the forward has kept.
        main_grads: where weight_grad adds the gradients of the weights that have such a tensor, instead of giving them.
        shared_grads: where another call has the same weights, and both run their backward in one graph.
    """

    def __init__(
        self,
        settings: ExpertSettings,
        tensors: CallTensors[Tensor],
        grouping: Grouping,
        h: Tensor | None,
        activation_graphs: Mapping[int, ActivationGraph] = MappingProxyType({}),
        main_grads: PerWeight[Tensor | None] | None = None,
        shared_grads: SharedWeightGrads | None = None,
    ) -> None:
        super().__init__(settings, tensors, grouping, h)
        self._activation_graphs, self._activation_parameters = activation_graphs, tensors.activation_parameters
        self.activation_grads: list[Tensor | None] = [None] * len(tensors.activation_parameters)
        """Callable activations: the gradients of their parameters so far."""
        self.main_grads, self._shared_grads = main_grads, shared_grads
        self._dh: Tensor | None = None
        self._scaled_a: Tensor | None = None
        self._adapter_rows: AdapterRowsOfBoth = (None, None)
        """Of the up-projection's adapter and of the down-projection's, where there are such; filled as dh is."""
        self._dweights: Tensor | None = None
        """(N',) gradients of the gate weights, one for each pair in chunks of experts, filled chunk by chunk."""

    def backward(
        self, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Compute one chunk; give dx (R_c, D), None unless needed, and topk_weights' gradient (R_c, K) in fp32.

        Both of the rows that the chunk finishes. dout: (R, D) of all chunks.
        """
        ops, activation = self.settings.ops, self.settings.spec.activation
        grouping = self.grouping.chunk(chunk)
        pairs = self._pairs(chunk)
        if self._dh is None:
            self._begin()
        if grouping.num_pairs == 0 and self.grouping.num_chunks > 1:
            dweights = self.topk_weights.new_zeros(grouping.inverse.shape)
            if not needs_dx:
                return None, dweights
            return self._no_sums(grouping) if out is None else out, dweights
        gate_up, down = self._projections
        self._drop_rows(chunk, grouping)
        computes_h = is_fused(activation) and self.h is None

        def multiplications() -> int:
            products = down.num_down_grad_products + gate_up.num_up_grad_products(needs_dx)
            return products + computes_h * gate_up.num_products

        count_products(ops, self.rows, grouping.num_pairs, multiplications)
        results, dx_pairs = self._results(chunk) if needs_dx else (None, None)
        if is_fused(activation):
            h = None if self.h is None else _part(self.h, pairs)
            blocks = self._blocks(grouping)
            if len(blocks) == 1:
                dweights, dx_pairs = self._backward_block(blocks[0], pairs.start, dout, h, needs_dx, dx_pairs)
            else:
                if needs_dx and dx_pairs is None:
                    dx_pairs = self._chunk_scratch("y", grouping.num_pairs, self.rows.shape[1])
                dweights = torch.empty(grouping.num_pairs, dtype=accumulation_dtype(dout.dtype), device=dout.device)

                def backward_block(block: GroupingBlock) -> None:
                    part, _ = self._backward_block(block, pairs.start, dout, h, needs_dx, dx_pairs)
                    dweights[block.positions] = part

                for_each(backward_block, blocks, dout.device)
        else:
            graph = self._activation_graphs[chunk]
            a = graph.a.detach()
            dh, scaled_a, (up_rows, down_rows) = self._backward_parts(pairs)
            da, _, dweights = down.down_grad(
                dout, a, self.topk_weights, grouping, None, out=(None, scaled_a), rows=down_rows
            )
            zero_padding(da, grouping)
            dh.copy_(graph.backward(da, self._activation_parameters, self.activation_grads))
            dx_pairs = gate_up.up_grad(
                dh, self.rows, grouping, needs_dx=needs_dx, out=dx_pairs, rows=up_rows, dropped=self.dropped
            )
        dx = None
        if dx_pairs is not None:
            dx = ops.gather_sum(dx_pairs if results is None else results, grouping.inverse, out=out)
        return dx, grouping.pairs_to_rows(self._with_earlier_chunks(chunk, dweights))

    def _begin(self) -> None:
        """Provide the memory of dh, scaled_a and adapter_rows, which all chunks fill."""
        num_pairs, width = self.grouping.num_pairs, self._hidden_width
        self._dh = cpu_memory.empty(num_pairs, width, like=self.rows)
        inner = self.settings.spec.layout.intermediate_size(width)
        self._scaled_a = cpu_memory.empty(num_pairs, inner, like=self.rows)
        gate_up, down = self._projections
        self._adapter_rows = gate_up.rows(num_pairs), down.rows(num_pairs)

    def _backward_block(
        self,
        block: GroupingBlock,
        first_pair: int,
        dout: Tensor,
        h: Tensor | None,
        needs_dx: bool,
        dx_pairs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Fill this block's part of dh, scaled_a and adapter_rows; give its dweights and its dx.

        first_pair: where its chunk's pairs start, whose h and dx_pairs are given.
        """
        activation = self.settings.spec.activation
        assert is_fused(activation), "callables take whole chunks"
        gate_up, down = self._block_projections(block)
        positions = block.positions
        hidden = gate_up.hidden(self.rows, block.grouping, self.dropped) if h is None else _part(h, positions)
        among_all = slice(first_pair + positions.start, first_pair + positions.stop)
        dh, scaled_a, (up_rows, down_rows) = self._backward_parts(among_all)
        _, _, dweights = down.down_grad(
            dout, hidden, self.topk_weights, block.grouping, activation, out=(dh, scaled_a), rows=down_rows
        )
        out = None if dx_pairs is None else _part(dx_pairs, positions)
        return dweights, gate_up.up_grad(
            dh, self.rows, block.grouping, needs_dx=needs_dx, out=out, rows=up_rows, dropped=self.dropped
        )

    def _backward_parts(self, pairs: slice) -> tuple[Tensor, Tensor, AdapterRowsOfBoth]:
        """Return what backward fills for these pairs: parts of dh, scaled_a and adapter_rows."""
        assert self._dh is not None
        assert self._scaled_a is not None
        up_rows, down_rows = (None if rows is None else rows.part(pairs) for rows in self._adapter_rows)
        return _part(self._dh, pairs), _part(self._scaled_a, pairs), (up_rows, down_rows)

    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> PerWeight[Tensor | None]:
        """Return the gradients of the weights that need one.

        None for the others, for those added to main_grads, and for those left to the other call in shared_grads.
        """
        operands = GradientOperands(self.rows, self._dh, dout, self._scaled_a, self.topk_weights)
        shared = self._shared_grads
        left = NO_WEIGHTS if shared is None else shared.take()
        grads = weight_gradients(
            self.settings, self.grouping, needs, self.main_grads, operands, left, self._adapter_operands()
        )
        return grads if shared is None else shared.leave(grads)

    def _adapter_operands(self) -> AdapterRowsOfBoth:
        up_rows, down_rows = self._adapter_rows
        if up_rows is not None and self.dropped is not None:
            up_rows = up_rows._replace(dropped=self.dropped.values)
        return up_rows, down_rows

    def _with_earlier_chunks(self, chunk: int, dweights: Tensor) -> Tensor:
        """Return the gradients of gate weights that `inverse` points into: this chunk's, or those of all so far."""
        first = self.grouping.first_expert_chunk
        if first is None or chunk < first:
            return dweights
        if self._dweights is None:
            offsets = self.grouping.chunk_pair_offsets
            self._dweights = dweights.new_empty(offsets[-1] - offsets[first])
        self._dweights[self._pairs_since(first, chunk)] = dweights
        return self._dweights


def _part(values: Tensor, positions: slice) -> Tensor:
    """Return values[positions], without a view where that is all of them: views are a small call's main cost."""
    return values if positions.stop - positions.start == values.shape[0] else values[positions]
