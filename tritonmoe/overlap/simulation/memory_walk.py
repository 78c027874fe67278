"""MemoryWalk: what the buffers of one pass hold from step to step, whichever pass it is."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import Schedule
from tritonmoe.overlap.simulation.buffer_widths import BufferWidths
from tritonmoe.overlap.simulation.cost_model import LayerWork
from tritonmoe.overlap.steps import Step, StepKind, Way

__all__ = ["INDEX_BYTES", "MemoryWalk", "total"]

INDEX_BYTES = 4
"""Of one id, position or fp32 weight of a pair."""
SQUARES_BYTES = 3 * 4
"""Three fp32 numbers for each element that a wire format sends, while the error that it makes is measured."""

Held = Step | str | tuple[str, int]
"""What holds bytes: an exchange, until it is waited for; a named buffer; or what is of one segment or part."""


class MemoryWalk:
    """What one pass holds from step to step; all numbers of bytes are (W,) float64."""

    def __init__(self, plan: OverlapPlan, work: LayerWork, widths: BufferWidths) -> None:
        self.plan, self.work, self.widths = plan, work, widths
        self.first_chunk = plan.num_local_slices
        self.sent, self.returned, self.pairs = work.segments(plan)
        self.num_sent, self.num_received, self.num_pairs = (total(of) for of in (self.sent, self.returned, self.pairs))
        copied = torch.zeros_like(work.rows) if work.copies is None else work.copies.copied
        self.num_copies = copied.sum(1), copied.sum(0)
        """(W,) how many copies each rank sends, and has."""
        copied_pairs = torch.zeros_like(self.num_pairs) if work.copies is None else work.copies.pairs
        self.copied_share = copied_pairs / self.num_pairs.clamp(min=1)
        """(W,) of each rank's pairs, those of its copies."""
        self.largest_pairs = torch.stack(self.pairs).amax(0)  # of the segment that has most
        self.held: dict[Held, Tensor] = {}
        self.now = self.peak = torch.zeros(work.size, dtype=torch.float64, device="cpu")

    def walk(self, schedule: Schedule, actions: Mapping[StepKind, Callable[[Step], None]]) -> int:
        """Return the most bytes that are held at any time, on the rank that holds most.

        A step starts once what it waits for is freed; what is held when it has run counts.
        """
        for step in schedule:
            for earlier in step.after:
                if schedule[earlier] in self.held:
                    self.free(schedule[earlier])
            if step.kind in actions:
                actions[step.kind](step)
            self.count(torch.zeros_like(self.peak))
        return int(self.peak.max().ceil())

    def count(self, meanwhile: Tensor) -> None:
        """Take into the peak that for a moment so many bytes are there on top of what is held."""
        self.peak = torch.maximum(self.peak, self.now + meanwhile)

    def hold(self, what: Held, num_bytes: Tensor) -> None:
        """Hold so many bytes from here on, unless `what` is held already."""
        if what not in self.held:
            self.held[what] = num_bytes
            self.now = self.now + num_bytes

    def hold_at_least(self, what: Held, num_bytes: Tensor) -> None:
        """Hold so many bytes from here on, or as many as are held of `what` already, if those are more."""
        so_far = self.held.get(what, torch.zeros_like(num_bytes))
        self.held[what] = torch.maximum(so_far, num_bytes)
        self.now = self.now + self.held[what] - so_far

    def free(self, what: Held) -> None:
        self.now = self.now - self.held.pop(what)

    def _post_rows(self, step: Step, sent: list[Tensor], arriving: list[Tensor]) -> None:
        """Pack the rows of a step's chunk; a wire format sends a copy of them, and receives into memory of its own."""
        segment, row_bytes = segment_of(step, self.plan), self.widths.row_bytes
        wire_bytes = self.work.bytes_per_row(step.kind)
        packed = sent[segment] * row_bytes
        if wire_bytes == row_bytes:
            self.hold(step, packed)
            return
        self.hold(step, (sent[segment] + arriving[segment]) * wire_bytes)
        measuring = SQUARES_BYTES * self.widths.hidden_size if step.kind is StepKind.DISPATCH else 0
        self.count(packed + sent[segment] * measuring)

    def send_rows(self, step: Step) -> None:
        """Post rows that go to their experts."""
        self._post_rows(step, self.sent, self.returned)

    def return_sums(self, step: Step) -> None:
        """Post a chunk's sums, which go home as they are, or as a copy."""
        self.free(("sums", segment_of(step, self.plan)))
        self._post_rows(step, self.returned, self.sent)

    def compute(self, step: Step, whole_bytes: int, block_bytes: int) -> None:
        """Compute the experts of a segment.

        Args:
            whole_bytes: what a backend that computes all pairs of a chunk at a time needs for each of them meanwhile.
            block_bytes: what a backend that goes block by block needs for each pair of a block, beside its row.
        """
        segment, widths = segment_of(step, self.plan), self.widths
        is_of_copies = step.kind in (StepKind.COPY_EXPERTS, StepKind.COPY_EXPERTS_BACKWARD)
        if is_of_copies:
            self.unpack_copies()
        is_chunk = segment >= self.first_chunk
        keeps_results = self.plan.chunk_by == "experts" and is_chunk
        if keeps_results:
            self.hold("results", total(self.pairs[self.first_chunk :]) * widths.row_bytes)
        # The copy that `up` makes of its rows is freed before there are results.
        is_forward = step.kind in (StepKind.EXPERTS, StepKind.COPY_EXPERTS)
        copies_rows = widths.working_set.copies_rows and (is_forward or not widths.keeps_hidden)
        whole_bytes += (copies_rows or not keeps_results) * widths.row_bytes
        sums = self.returned[segment] * widths.row_bytes
        pairs = self.pairs[segment] * (self.copied_share if is_of_copies else 1 - self.copied_share)
        max_block_pairs = widths.working_set.max_block_pairs
        if is_of_copies:  # which give sums of their own
            self.hold("copies' sums", (self.copied_share > 0) * sums)
        if max_block_pairs is None:
            meanwhile = pairs * whole_bytes
        else:
            meanwhile = sums + self._compute_blocks(pairs, max_block_pairs, block_bytes, keeps_results)
        if is_chunk:
            self.hold(("sums", segment), sums)
        self.count(meanwhile)
        if is_of_copies:
            self.free("copies' sums")

    def _compute_blocks(self, pairs: Tensor, max_block_pairs: int, block_bytes: int, keeps_results: bool) -> Tensor:
        """Compute pairs (W,) block by block, and give what is there when the last block is done, beside sums of rows.

        First the rows of a block's pairs are gathered. Then there are the results of pairs, and the sums of rows, which
        are copied to where they go.
        """
        row_bytes = self.widths.row_bytes
        results = torch.zeros_like(pairs)
        if not keeps_results:
            has_blocks = pairs > max_block_pairs
            self.hold_at_least("y", has_blocks * self.largest_pairs * row_bytes)
            results = ~has_blocks * pairs * row_bytes
        self.count(pairs.clamp(max=max_block_pairs * self.widths.working_set.num_workers) * (row_bytes + block_bytes))
        return results

    def send_copies(self, step: Step) -> None:
        """Pack the weights of experts that have copies, and make room for those that come."""
        copies = self.work.copies
        if copies is not None:
            travelling = self.work.travelling(step.kind.way or Way.TO_COPIES)
            sent, gets_any = travelling.sum(1) * copies.expert_bytes, travelling.sum(0) > 0
            self.hold(step, sent * gets_any)
            kept = self.held.get("sent copies", torch.zeros_like(self.now))
            self.hold_at_least("sent copies", kept + sent * ~gets_any)  # which nobody waits for before settle()
            arriving = self.held.get("arriving copies", torch.zeros_like(self.now))
            self.hold_at_least("arriving copies", arriving + travelling.sum(0) * copies.expert_bytes)

    def settle(self, step: Step) -> None:
        """Free what ranks that get no copies have sent."""
        if "sent copies" in self.held:
            self.free("sent copies")

    def unpack_copies(self) -> None:
        """Take weights that have arrived out of the rows in which they came; those are freed then."""
        if "arriving copies" in self.held and not any(
            isinstance(of, Step) and of.kind in (StepKind.COPIES, StepKind.SPREAD_COPIES) for of in self.held
        ):
            self.hold("copies", self.held["arriving copies"])
            self.count(torch.zeros_like(self.peak))
            self.free("arriving copies")

    def grouping_bytes(self) -> Tensor:
        """Return the bytes of pair_index, source_order and inverse, and with chunks of experts of returned_rows.

        Kernels also have row tiles, 64 bytes for 16 pairs, of every chunk as many as of the largest.
        """
        top_k = self.work.top_k
        has_returned_rows = self.plan.chunk_by == "experts" and top_k > 1
        lists_row_tiles = self.widths.working_set.max_block_pairs is None
        row_tiles = lists_row_tiles * len(self.pairs) * self.largest_pairs
        inverses = top_k * (1 + (self.copied_share > 0))  # pairs of copies are grouped apart
        return (2 * self.num_pairs + row_tiles + self.num_received * (inverses + has_returned_rows)) * INDEX_BYTES


def segment_of(step: Step, plan: OverlapPlan) -> int:
    segment = step.segment(plan.num_local_slices)
    if segment is None:
        raise ValueError(f"step {step} is of no segment")
    return segment


def total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)
