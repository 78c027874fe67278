"""How much memory a layer call holds at its peak: the schedule that the executor runs, walked with bytes.

Like the simulator it walks all ranks at once, in vectors over the ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import Schedule, Step, build_backward, build_forward
from tritonmoe.simulation.cost_model import LayerWork

__all__ = ["ALL_AT_ONCE", "BufferWidths", "PeakBytes", "WorkingSet", "peak_bytes"]

INDEX_BYTES = 4
TEMPORARIES, BACKWARD_TEMPORARIES = 1, 3
"""F columns, in fp32 or wider, with which they compute the activation of a block's pairs, and its backward."""
SQUARES_BYTES = 3 * 4
"""For each element sent in a wire format: three fp32 numbers while the error that it makes is measured."""


class WorkingSet(NamedTuple):
    """How much a rank's experts work on at a time: where ranks have other machines or backends, not the same on all."""

    max_block_pairs: int | None = None
    """How many pairs the backend computes at a time (MAX_BLOCK_PAIRS of its module); None: a chunk's, as the kernels
    do."""
    num_workers: int = 1
    """On how many blocks, or experts' weight gradients, it works at a time."""
    copies_rows: bool = False
    """Whether it may copy the rows of a chunk's pairs before `up`, where it doesn't go block by block."""

    def pack(self) -> int:
        """Give it as one positive integer."""
        return ((self.max_block_pairs or 0) * 1024 + self.num_workers) * 2 + self.copies_rows

    @classmethod
    def unpack(cls, value: int) -> "WorkingSet":
        rest, copies_rows = divmod(value, 2)
        max_block_pairs, num_workers = divmod(rest, 1024)
        return cls(max_block_pairs or None, num_workers, bool(copies_rows))


ALL_AT_ONCE = WorkingSet()


@dataclass(frozen=True)
class BufferWidths:
    """What decides, beside rows and pairs, how large the buffers of a layer call are."""

    hidden_size: int
    """D."""
    intermediate_size: int
    """F."""
    num_local_experts: int
    """E / W."""
    dtype_bytes: int
    """Of one element of rows, h and weights."""
    gated: bool = True
    """h has 2F columns, F where not."""
    save: str = "hidden"
    """As in moe_mlp: whether h is kept for the backward."""
    has_backward: bool = True
    working_set: WorkingSet = ALL_AT_ONCE

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype_bytes

    @property
    def inner_bytes(self) -> int:
        return self.intermediate_size * self.dtype_bytes

    @property
    def hidden_bytes(self) -> int:
        return self.inner_bytes * (2 if self.gated else 1)

    @property
    def temporary_bytes(self) -> int:
        return self.intermediate_size * max(4, self.dtype_bytes)

    @property
    def keeps_hidden(self) -> bool:
        return self.has_backward and self.save == "hidden"


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

    That is every buffer of rows or pairs, from the first exchange to the end of the pass: received rows, rows and sums
    at home, h and its gradients, what exchanges under way hold, what the experts of one chunk need meanwhile. Not in
    it are the caller's tensors, what the call gives back (y, and the gradients of x, of topk_weights and of the
    weights), index arithmetic over (T, W) and (R, K) that is over before the experts run, and what a callable
    activation keeps itself. Every chunk is taken to have its share of every rank's rows, every expert its share of the
    pairs. Tests hold it to a tenth of what is really held.

    With plan.capacity `work` has the room for rows and pairs, whatever there is (capacity.capped_traffic; a layer's
    report says it too). Backends that go block by block keep only the pairs that are there, so it is the most they may
    hold. A call that overflows lets its first run go and then holds what its rows need without a capacity.
    """
    forward = _Walk(plan, work, widths).forward()
    backward = _Walk(plan, work, widths).backward() if widths.has_backward else 0
    return PeakBytes(forward, backward)


@dataclass
class _Walk:
    """One pass: what is held, by name or step, the sum of it now and the most so far; all are (W,) float64."""

    plan: OverlapPlan
    work: LayerWork
    widths: BufferWidths
    held: dict[Any, Tensor] = field(default_factory=dict)
    now: Tensor = field(init=False)
    peak: Tensor = field(init=False)
    largest_pairs: Tensor = field(init=False)
    """Of the segment that has most."""

    def __post_init__(self) -> None:
        self.home, self.received, self.pairs = self.work.segments(self.plan)
        self.now = self.peak = torch.zeros(self.work.size, dtype=torch.float64, device="cpu")
        self.largest_pairs = torch.stack(self.pairs).amax(0)

    def forward(self) -> int:
        widths, metadata_bytes = self.widths, 2 * INDEX_BYTES * self.work.top_k
        home, received, pairs = _total(self.home), _total(self.received), _total(self.pairs)
        first = self.plan.num_local_slices
        self._hold("rows", received * widths.row_bytes)
        self._hold("home", home * widths.row_bytes)
        for step in self._walk(build_forward(self.plan)):
            if step.kind == "metadata":
                # As they travel and in their place, until the pass ends.
                self._hold("metadata", (received + _total(self.received[first:])) * metadata_bytes)
                self._hold(step, _total(self.home[first:]) * metadata_bytes)
            elif step.kind == "dispatch":
                self._post_rows(step, self.home, self.received, self.work.row_bytes)
            elif step.kind == "group":
                self._hold("grouping", self._grouping())
                self._hold("weights", received * metadata_bytes / 2)
            elif step.kind == "experts":
                if widths.keeps_hidden:
                    self._hold("h", pairs * widths.hidden_bytes)
                per_pair = widths.inner_bytes + (0 if widths.keeps_hidden else widths.hidden_bytes)
                temporaries = TEMPORARIES * widths.temporary_bytes
                self._compute(step, widths.inner_bytes, per_pair + temporaries)
            elif step.kind == "combine":
                self._return_rows(step)
        return self._most()

    def backward(self) -> int:
        widths, top_k_bytes = self.widths, INDEX_BYTES * self.work.top_k
        home, received, pairs = _total(self.home), _total(self.received), _total(self.pairs)
        self._hold("saved", received * (widths.row_bytes + top_k_bytes) + self._grouping())
        if widths.keeps_hidden:
            self._hold("h", pairs * widths.hidden_bytes)
        self._hold("dout", received * (widths.row_bytes + top_k_bytes))
        self._hold("home", home * widths.row_bytes)
        for step in self._walk(build_backward(self.plan, needs_x=True, needs_topk_weights=True)):
            if step.kind == "combine_backward":
                self._post_rows(step, self.home, self.received, self._other_row_bytes)
            elif step.kind == "experts_backward":
                self._hold("gradients", pairs * (widths.hidden_bytes + widths.inner_bytes))
                again = 0 if widths.keeps_hidden else widths.hidden_bytes
                temporaries = BACKWARD_TEMPORARIES * widths.temporary_bytes
                self._compute(step, again, widths.inner_bytes + again + temporaries)
            elif step.kind == "dispatch_backward":
                self._return_rows(step)
            elif step.kind == "weight_grad" and widths.working_set.max_block_pairs is not None:
                gathered = pairs * min(1.0, widths.working_set.num_workers / widths.num_local_experts)
                # One range of pairs is in source order already: only its rows are gathered.
                self._count(gathered * (self._num_ranges() > 1) * widths.hidden_bytes + gathered * widths.row_bytes)
            elif step.kind == "routing_backward":
                self._hold("dtopk_weights", 2 * home * top_k_bytes)
                self._hold(step, received * top_k_bytes)
        return self._most()

    def _walk(self, schedule: Schedule) -> Iterator[Step]:
        """Give each step once what it waits for is let go; what is held when it has run counts."""
        for step in schedule:
            for earlier in step.after:
                if schedule[earlier] in self.held:
                    self._let_go(schedule[earlier])
            yield step
            self._count(torch.zeros_like(self.peak))

    def _count(self, meanwhile: Tensor) -> None:
        """Take in that `meanwhile` is there on top of what is held."""
        self.peak = torch.maximum(self.peak, self.now + meanwhile)

    def _hold(self, what: object, num_bytes: Tensor) -> None:
        """Hold so many bytes from here on, once."""
        if what not in self.held:
            self.held[what] = num_bytes
            self.now = self.now + num_bytes

    def _hold_at_least(self, what: object, num_bytes: Tensor) -> None:
        """Hold so many bytes from here on, with what is held of it already."""
        so_far = self.held.get(what, torch.zeros_like(num_bytes))
        self.held[what] = torch.maximum(so_far, num_bytes)
        self.now = self.now + self.held[what] - so_far

    def _let_go(self, what: object) -> None:
        self.now = self.now - self.held.pop(what)

    def _post_rows(self, step: Step, sent: list[Tensor], arriving: list[Tensor], wire_bytes: int) -> None:
        """Rows are packed; a wire format sends a copy, and receives into memory of its own."""
        assert step.chunk is not None
        segment = step.chunk + self.plan.num_local_slices
        packed = sent[segment] * self.widths.row_bytes
        if wire_bytes == self.widths.row_bytes:
            self._hold(step, packed)
            return
        self._hold(step, (sent[segment] + arriving[segment]) * wire_bytes)
        measuring = SQUARES_BYTES * self.widths.hidden_size if step.kind == "dispatch" else 0
        self._count(packed + sent[segment] * measuring)

    def _return_rows(self, step: Step) -> None:
        """The sums travel as they are, or as a copy."""
        self._let_go(("partial", step.chunk))
        self._post_rows(step, self.received, self.home, self._other_row_bytes)

    def _compute(self, step: Step, whole_bytes: int, block_bytes: int) -> None:
        """The experts of one segment: rows by pair, and per pair of the segment, or of a block, so many bytes more."""
        assert step.chunk is not None
        segment, widths = step.chunk + self.plan.num_local_slices, self.widths
        is_kept = self.plan.chunk_by == "experts" and step.chunk >= 0
        if is_kept:
            self._hold("results", _total(self.pairs[self.plan.num_local_slices :]) * widths.row_bytes)
        if widths.working_set.max_block_pairs is None:
            # The copy that `up` makes of its rows is gone before there are results.
            is_copied = widths.working_set.copies_rows and (step.kind == "experts" or not widths.keeps_hidden)
            meanwhile = self.pairs[segment] * (whole_bytes + (is_copied or not is_kept) * widths.row_bytes)
        else:
            pairs, block_pairs = self.pairs[segment], widths.working_set.max_block_pairs
            has_blocks = pairs > block_pairs
            # First the rows of a block's pairs are gathered; then there are results of pairs, and the rows' sums, which
            # are copied to where they go.
            block = pairs.clamp(max=block_pairs * widths.working_set.num_workers) * (widths.row_bytes + block_bytes)
            sums = self.received[segment] * widths.row_bytes
            if not is_kept:
                self._hold_at_least("y", has_blocks * self.largest_pairs * widths.row_bytes)
                sums = sums + ~has_blocks * pairs * widths.row_bytes
            self._count(block)
            meanwhile = sums
        if step.chunk >= 0:
            self._hold(("partial", step.chunk), self.received[segment] * widths.row_bytes)
        self._count(meanwhile)

    def _num_ranges(self) -> Tensor:
        """How many segments with pairs are grouped each for itself: all chunks of experts are grouped as one."""
        pairs = self.pairs
        if self.plan.chunk_by == "experts":
            first = self.plan.num_local_slices
            pairs = [*pairs[:first], _total(pairs[first:])]
        return (torch.stack(pairs) > 0).sum(0)

    def _grouping(self) -> Tensor:
        """pair_index, source_order and inverse; where rows may have several chunks of experts, returned_rows too."""
        received, top_k = _total(self.received), self.work.top_k
        has_returned_rows = self.plan.chunk_by == "experts" and top_k > 1
        return (2 * _total(self.pairs) + received * (top_k + has_returned_rows)) * INDEX_BYTES

    @property
    def _other_row_bytes(self) -> int:
        other = self.work.other_row_bytes
        return self.work.row_bytes if other is None else other

    def _most(self) -> int:
        return int(self.peak.max().ceil())


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)
