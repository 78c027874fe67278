"""ForwardRun: the forward of one rank's experts, a chunk at a time."""

from torch import Tensor

from tritonmoe.config.activations import is_fused
from tritonmoe.experts.callable_activation import ActivationGraph, run_activation
from tritonmoe.experts.flops import count_products
from tritonmoe.experts.run import ExpertsRun, part_at
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.backends.ops import required
from tritonmoe.ops.grouping import Grouping, GroupingBlock
from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.cpu_threads import for_each

__all__ = ["ForwardRun"]


class ForwardRun(ExpertsRun):
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
        self.keep_hidden, self.directions = keep_hidden, "forward"
        self.activation_graphs: dict[int, ActivationGraph] = {}
        """Callable activations: chunk -> the graph that backward goes through."""

    def forward(self, chunk: int, out: Tensor | None = None) -> Tensor:
        """Compute chunk `chunk` and give the weighted partial sums of the rows that it finishes, (R_c, D)."""
        if (reading := self._reading("up", "down")) is None:
            return self._forward(chunk, out)
        with reading.timed():
            return self._forward(chunk, out)

    def _forward(self, chunk: int, out: Tensor | None) -> Tensor:
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
            h = None if self.h is None else part_at(self.h, self._pairs(chunk))
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
        return h, down.down(required(a), block.grouping, out=out_y)

    def _row_weights(self, chunk: int) -> Tensor:
        """Return topk_weights (R_c, K) of the rows that the chunk finishes."""
        rows = slice(*self.grouping.chunk_row_offsets[chunk : chunk + 2])
        if self.grouping.returned_rows is None:
            return part_at(self.topk_weights, rows)
        return self.topk_weights.index_select(0, self.grouping.returned_rows[rows])
