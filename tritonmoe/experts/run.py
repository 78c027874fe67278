"""ExpertsRun: the experts of one rank, a chunk at a time; what their forward and their backward share.

It knows nothing of ranks, streams or transports. One device is the case of one chunk.
"""

from itertools import pairwise

from torch import Tensor

from tritonmoe.experts.adapted_projection import AdaptedProjection
from tritonmoe.experts.adapter_dropout import DroppedRows, rows_of_pairs
from tritonmoe.experts.reading_ahead import ReadingAhead, Side, begin_reading, has_streamed
from tritonmoe.experts.spec import Directions, ExpertSettings
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.backends.ops import pairs_at_a_time
from tritonmoe.ops.grouping import Grouping, GroupingBlock
from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.cpu_threads import num_workers
from tritonmoe.runtime.streamed import PassLoads

__all__ = ["ExpertsRun", "part_at"]

SMALLEST_BLOCK_PAIRS = 256
"""Blocks are made smaller so that every worker has its share, but never smaller than this."""


class ExpertsRun:
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
        self._is_reversed = False
        """Whether the last blocks are computed first: the last experts of the forward may be in memory still."""
        self.directions: Directions = "both"
        """Which products the weights are rounded for, in an ExpertPrecision."""
        self.dropped: DroppedRows | None = None
        """The rows as the adapter of the up-projection multiplies them, where it has dropout; filled chunk by chunk."""
        self._made_projections: tuple[AdaptedProjection, AdaptedProjection] | None = None
        self._reused: dict[str, Tensor] = {}
        """Memory that every chunk uses again."""
        self._is_reading = False
        """Whether it is known if the pass reads its experts from elsewhere, and then in which order."""
        self._reading_ahead: ReadingAhead | None = None

    def _no_sums(self, grouping: Grouping) -> Tensor:
        """Return the sums of rows without a pair, which are a capacity's padding."""
        return self.rows.new_zeros(grouping.inverse.shape[0], self.rows.shape[1])

    def _reading(self, *sides: Side) -> ReadingAhead | None:
        """Return what times a part of this pass over experts that are elsewhere; None where they are in memory.

        sides: those of the projections by which a block of pairs is multiplied, in their order.
        """
        if not self._is_reading:
            self._is_reading = True
            if has_streamed(self.weights):
                _ = self.grouping.host_chunk_offsets  # of all chunks in one host read
                chunks = (self._blocks(self.grouping.chunk(chunk)) for chunk in range(self.grouping.num_chunks))
                self._reading_ahead = begin_reading(self.weights, chunks, sides)
        return self._reading_ahead

    @property
    def loads(self) -> PassLoads | None:
        """What this pass has read of experts that stay elsewhere; None where they are in memory."""
        return None if self._reading_ahead is None else self._reading_ahead.loads

    def _blocks(self, grouping: Grouping) -> list[GroupingBlock]:
        """Cut a chunk's pairs into what the backend computes at a time, so that every worker of a CPU has its share."""
        most, num_pairs = pairs_at_a_time(self.settings.ops, self.rows.device), grouping.num_pairs
        if most is not None and num_pairs > most:
            workers = num_workers(self.rows.device)
            if workers > 1:
                most = min(most, max(SMALLEST_BLOCK_PAIRS, -(-num_pairs // (2 * workers))))
        blocks = grouping.blocks(most)
        return blocks[::-1] if self._is_reversed else blocks

    def _block_projections(self, block: GroupingBlock) -> tuple[AdaptedProjection, AdaptedProjection]:
        """Return the up-projection and the down-projection of the block's experts."""
        if block.grouping.num_experts == self.weights.gate_up_proj.shape[0]:
            return self._projections
        gate_up, down = self._projections
        return gate_up.of_experts(block.experts), down.of_experts(block.experts)

    @property
    def _projections(self) -> tuple[AdaptedProjection, AdaptedProjection]:
        """The up-projection and the down-projection of all experts."""
        if self._made_projections is None:
            self._made_projections = self.settings.projections(self.weights, self.row_seeds, self.directions)
        return self._made_projections

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
        num_units = self.settings.layer.intermediate_size
        return 2 * num_units if self.settings.spec.layout.gated else num_units

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


def part_at(values: Tensor, positions: slice) -> Tensor:
    """Return values[positions], without a view where that is all of them: views are a small call's main cost."""
    return values if positions.stop - positions.start == values.shape[0] else values[positions]
