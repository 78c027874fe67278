"""BackwardRun: the backward of one rank's experts, a chunk at a time, and the gradients of their weights behind it."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from tritonmoe.config.activations import is_fused
from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.experts.adapted_projection import AdapterRowsOfBoth
from tritonmoe.experts.callable_activation import ActivationGraph, zero_padding
from tritonmoe.experts.flops import count_products
from tritonmoe.experts.reading_ahead import Side, has_streamed
from tritonmoe.experts.run import ExpertsRun, part_at
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.experts.weight_gradients import SharedWeightGrads, weight_gradients
from tritonmoe.ops.backends.ops import GradientOperands, accumulation_dtype, required
from tritonmoe.ops.grouping import Grouping, GroupingBlock
from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.cpu_threads import for_each

__all__ = ["BackwardRun"]


class BackwardRun(ExpertsRun):
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
        if h is not None:
            self.directions = "backward"
        self._is_reversed = has_streamed(tensors.weights)
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
        computes_h = is_fused(self.settings.spec.activation) and self.h is None
        sides: tuple[Side, ...] = (*(("up",) if computes_h else ()), "down", *(("up",) if needs_dx else ()))
        if (reading := self._reading(*sides)) is None:
            return self._backward(chunk, dout, needs_dx, out)
        with reading.timed():
            return self._backward(chunk, dout, needs_dx, out)

    def _backward(self, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None) -> tuple[Tensor | None, Tensor]:
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
            products = down.num_grad_products() + gate_up.num_grad_products(needs_dx)
            return products + computes_h * gate_up.num_products

        count_products(ops, self.rows, grouping.num_pairs, multiplications)
        results, dx_pairs = self._results(chunk) if needs_dx else (None, None)
        if is_fused(activation):
            h = None if self.h is None else part_at(self.h, pairs)
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
        num_pairs = self.grouping.num_pairs
        self._dh = cpu_memory.empty(num_pairs, self._hidden_width, like=self.rows)
        self._scaled_a = cpu_memory.empty(num_pairs, self.settings.layer.intermediate_size, like=self.rows)
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
        hidden = gate_up.hidden(self.rows, block.grouping, self.dropped) if h is None else part_at(h, positions)
        among_all = slice(first_pair + positions.start, first_pair + positions.stop)
        dh, scaled_a, (up_rows, down_rows) = self._backward_parts(among_all)
        _, _, dweights = down.down_grad(
            dout, hidden, self.topk_weights, block.grouping, activation, out=(dh, scaled_a), rows=down_rows
        )
        out = None if dx_pairs is None else part_at(dx_pairs, positions)
        return dweights, gate_up.up_grad(
            dh, self.rows, block.grouping, needs_dx=needs_dx, out=out, rows=up_rows, dropped=self.dropped
        )

    def _backward_parts(self, pairs: slice) -> tuple[Tensor, Tensor, AdapterRowsOfBoth]:
        """Return what backward fills for these pairs: parts of dh, scaled_a and adapter_rows."""
        up_rows, down_rows = (None if rows is None else rows.part(pairs) for rows in self._adapter_rows)
        dh, scaled_a = required(self._dh), required(self._scaled_a)
        return part_at(dh, pairs), part_at(scaled_a, pairs), (up_rows, down_rows)

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
