"""How much memory a layer call holds at its peak: each step adds bytes and frees others.

It walks the schedule that the executor runs. Like the simulator it walks all ranks at once, in vectors over the ranks.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import Schedule, build_backward, build_forward
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.simulation.buffer_widths import BufferWidths
from tritonmoe.simulation.cost_model import LayerWork

__all__ = ["PeakBytes", "peak_bytes"]

INDEX_BYTES = 4
"""Of one id, position or fp32 weight of a pair."""
FORWARD_TEMPORARIES, BACKWARD_TEMPORARIES = 1, 3
"""How many tensors of F columns, in fp32 or wider, a backend needs to compute the activation of a block's pairs, and
the gradient of the activation."""
SQUARES_BYTES = 3 * 4
"""Three fp32 numbers for each element that a wire format sends, while the error that it makes is measured."""

Held = Step | str | tuple[str, int]
"""What holds bytes: an exchange, until it is waited for; a named buffer; or the sums of one segment."""


class PeakBytes(NamedTuple):
    """The most that the buffers of one call take at once, in bytes, on the rank that takes most."""

    forward: int
    """What is kept for the backward included."""
    backward: int
    """The same; 0 without one."""

    @property
    def most(self) -> int:
        return max(self)


def peak_bytes(plan: OverlapPlan, work: LayerWork, widths: BufferWidths) -> PeakBytes:
    """Tell before any call what a layer of several ranks will hold at its peak, under `plan`.

    Counted is every buffer of rows or pairs, from the first exchange to the end of the pass: received rows, rows and
    sums at home, h and its gradients, what exchanges under way hold, and what the experts of one chunk need meanwhile.
    Not counted are the caller's tensors, what the call gives back (y, and the gradients of x, of topk_weights and of
    the weights), index arithmetic over (T, W) and (R, K) that is over before the experts run, and what a callable
    activation keeps itself. Every chunk is taken to have its share of every rank's rows, and every expert its share of
    the pairs. Tests check that the result differs by at most a tenth from what is really held.

    With plan.capacity, `work` must have the rows and pairs for which there is room, used or not
    (capacity.capped_traffic gives them, and so does a layer's report). Backends that go block by block keep only the
    pairs that are there, so the result is the most that they may hold. A call that overflows frees the buffers of its
    first run, and then holds what its rows need without a capacity.
    """
    forward = _ForwardWalk(plan, work, widths).peak_bytes()
    backward = _BackwardWalk(plan, work, widths).peak_bytes() if widths.has_backward else 0
    return PeakBytes(forward, backward)


class _Walk:
    """What one pass holds from step to step; all numbers of bytes are (W,) float64."""

    def __init__(self, plan: OverlapPlan, work: LayerWork, widths: BufferWidths) -> None:
        self.plan, self.work, self.widths = plan, work, widths
        self.first_chunk = plan.num_local_slices
        self.sent, self.returned, self.pairs = work.segments(plan)
        self.num_sent, self.num_received, self.num_pairs = (_total(of) for of in (self.sent, self.returned, self.pairs))
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
                    self._free(schedule[earlier])
            if step.kind in actions:
                actions[step.kind](step)
            self._count(torch.zeros_like(self.peak))
        return int(self.peak.max().ceil())

    def _count(self, meanwhile: Tensor) -> None:
        """Take into the peak that for a moment so many bytes are there on top of what is held."""
        self.peak = torch.maximum(self.peak, self.now + meanwhile)

    def _hold(self, what: Held, num_bytes: Tensor) -> None:
        """Hold so many bytes from here on, unless `what` is held already."""
        if what not in self.held:
            self.held[what] = num_bytes
            self.now = self.now + num_bytes

    def _hold_at_least(self, what: Held, num_bytes: Tensor) -> None:
        """Hold so many bytes from here on, or as many as are held of `what` already, if those are more."""
        so_far = self.held.get(what, torch.zeros_like(num_bytes))
        self.held[what] = torch.maximum(so_far, num_bytes)
        self.now = self.now + self.held[what] - so_far

    def _free(self, what: Held) -> None:
        self.now = self.now - self.held.pop(what)

    def _post_rows(self, step: Step, sent: list[Tensor], arriving: list[Tensor]) -> None:
        """Pack the rows of a step's chunk; a wire format sends a copy of them, and receives into memory of its own."""
        segment, row_bytes = _segment(step, self.plan), self.widths.row_bytes
        wire_bytes = self.work.bytes_per_row(step.kind)
        packed = sent[segment] * row_bytes
        if wire_bytes == row_bytes:
            self._hold(step, packed)
            return
        self._hold(step, (sent[segment] + arriving[segment]) * wire_bytes)
        measuring = SQUARES_BYTES * self.widths.hidden_size if step.kind is StepKind.DISPATCH else 0
        self._count(packed + sent[segment] * measuring)

    def send_rows(self, step: Step) -> None:
        """Post rows that go to their experts."""
        self._post_rows(step, self.sent, self.returned)

    def return_sums(self, step: Step) -> None:
        """Post a chunk's sums, which go home as they are, or as a copy."""
        self._free(("sums", _segment(step, self.plan)))
        self._post_rows(step, self.returned, self.sent)

    def _compute(self, step: Step, whole_bytes: int, block_bytes: int) -> None:
        """Compute the experts of a segment.

        Args:
            whole_bytes: what a backend that computes all pairs of a chunk at a time needs for each of them meanwhile.
            block_bytes: what a backend that goes block by block needs for each pair of a block, beside its row.
        """
        segment, widths = _segment(step, self.plan), self.widths
        is_chunk = segment >= self.first_chunk
        keeps_results = self.plan.chunk_by == "experts" and is_chunk
        if keeps_results:
            self._hold("results", _total(self.pairs[self.first_chunk :]) * widths.row_bytes)
        if widths.working_set.max_block_pairs is None:
            # The copy that `up` makes of its rows is freed before there are results.
            copies = widths.working_set.copies_rows and (step.kind is StepKind.EXPERTS or not widths.keeps_hidden)
            meanwhile = self.pairs[segment] * (whole_bytes + (copies or not keeps_results) * widths.row_bytes)
        else:
            meanwhile = self._compute_blocks(segment, widths.working_set.max_block_pairs, block_bytes, keeps_results)
        if is_chunk:
            self._hold(("sums", segment), self.returned[segment] * widths.row_bytes)
        self._count(meanwhile)

    def _compute_blocks(self, segment: int, max_block_pairs: int, block_bytes: int, keeps_results: bool) -> Tensor:
        """Compute a segment block by block, and give what is there when its last block is done.

        First the rows of a block's pairs are gathered. Then there are the results of pairs, and the sums of rows, which
        are copied to where they go.
        """
        pairs, row_bytes = self.pairs[segment], self.widths.row_bytes
        sums = self.returned[segment] * row_bytes
        if not keeps_results:
            has_blocks = pairs > max_block_pairs
            self._hold_at_least("y", has_blocks * self.largest_pairs * row_bytes)
            sums = sums + ~has_blocks * pairs * row_bytes
        self._count(pairs.clamp(max=max_block_pairs * self.widths.working_set.num_workers) * (row_bytes + block_bytes))
        return sums

    def _grouping_bytes(self) -> Tensor:
        """Return the bytes of pair_index, source_order and inverse, and with chunks of experts of returned_rows.

        Kernels also have row tiles, 64 bytes for 16 pairs, of every chunk as many as of the largest.
        """
        top_k = self.work.top_k
        has_returned_rows = self.plan.chunk_by == "experts" and top_k > 1
        lists_row_tiles = self.widths.working_set.max_block_pairs is None
        row_tiles = lists_row_tiles * len(self.pairs) * self.largest_pairs
        return (2 * self.num_pairs + row_tiles + self.num_received * (top_k + has_returned_rows)) * INDEX_BYTES


class _ForwardWalk(_Walk):
    def peak_bytes(self) -> int:
        self._hold("rows", self.num_received * self.widths.row_bytes)
        self._hold("home", self.num_sent * self.widths.row_bytes)
        actions = {
            StepKind.METADATA: self.metadata,
            StepKind.DISPATCH: self.send_rows,
            StepKind.GROUP: self.group,
            StepKind.EXPERTS: self.experts,
            StepKind.COMBINE: self.return_sums,
        }
        return self.walk(build_forward(self.plan), actions)

    @property
    def metadata_bytes(self) -> int:
        """Of one row: K ids and K weights."""
        return 2 * INDEX_BYTES * self.work.top_k

    def metadata(self, step: Step) -> None:
        """Hold ids and weights twice until the pass ends: as they arrive, and in the order of the received rows."""
        travelling = _total(self.returned[self.first_chunk :])
        self._hold("metadata", (self.num_received + travelling) * self.metadata_bytes)
        self._hold(step, _total(self.sent[self.first_chunk :]) * self.metadata_bytes)

    def group(self, step: Step) -> None:
        self._hold("grouping", self._grouping_bytes())
        self._hold("weights", self.num_received * self.metadata_bytes / 2)

    def experts(self, step: Step) -> None:
        widths = self.widths
        if widths.keeps_hidden:
            self._hold("h", self.num_pairs * widths.hidden_bytes)
        per_pair = widths.inner_bytes + (0 if widths.keeps_hidden else widths.hidden_bytes)
        self._compute(step, widths.inner_bytes, per_pair + FORWARD_TEMPORARIES * widths.temporary_bytes)


class _BackwardWalk(_Walk):
    def peak_bytes(self) -> int:
        widths = self.widths
        row_and_weights = widths.row_bytes + self.weights_bytes
        self._hold("saved", self.num_received * row_and_weights + self._grouping_bytes())
        if widths.keeps_hidden:
            self._hold("h", self.num_pairs * widths.hidden_bytes)
        self._hold("dout", self.num_received * row_and_weights)
        self._hold("home", self.num_sent * widths.row_bytes)
        actions = {
            StepKind.COMBINE_BACKWARD: self.send_rows,
            StepKind.EXPERTS_BACKWARD: self.experts_backward,
            StepKind.DISPATCH_BACKWARD: self.return_sums,
            StepKind.WEIGHT_GRAD: self.weight_grad,
            StepKind.ROUTING_BACKWARD: self.routing_backward,
        }
        return self.walk(build_backward(self.plan, needs_x=True, needs_topk_weights=True), actions)

    @property
    def weights_bytes(self) -> int:
        """Of one row: K gate weights, or their gradients."""
        return INDEX_BYTES * self.work.top_k

    def experts_backward(self, step: Step) -> None:
        widths = self.widths
        self._hold("gradients", self.num_pairs * (widths.hidden_bytes + widths.inner_bytes))
        again = 0 if widths.keeps_hidden else widths.hidden_bytes
        temporaries = BACKWARD_TEMPORARIES * widths.temporary_bytes
        self._compute(step, again, widths.inner_bytes + again + temporaries)

    def weight_grad(self, step: Step) -> None:
        """Gather the rows of the experts that are computed at a time, where a backend goes block by block."""
        widths = self.widths
        if widths.working_set.max_block_pairs is None:
            return
        gathered = self.num_pairs * min(1.0, widths.working_set.num_workers / widths.num_local_experts)
        # One range of pairs is in source order already: only its rows are gathered.
        self._count(gathered * (self._num_ranges() > 1) * widths.hidden_bytes + gathered * widths.row_bytes)

    def routing_backward(self, step: Step) -> None:
        self._hold("dtopk_weights", 2 * self.num_sent * self.weights_bytes)
        self._hold(step, self.num_received * self.weights_bytes)

    def _num_ranges(self) -> Tensor:
        """Return how many ranges of pairs are grouped each for itself: all chunks of experts are grouped as one."""
        pairs = self.pairs
        if self.plan.chunk_by == "experts":
            pairs = [*pairs[: self.first_chunk], _total(pairs[self.first_chunk :])]
        return (torch.stack(pairs) > 0).sum(0)


def _segment(step: Step, plan: OverlapPlan) -> int:
    segment = step.segment(plan.num_local_slices)
    if segment is None:
        raise ValueError(f"step {step} is of no segment")
    return segment


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)
