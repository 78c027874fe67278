"""How much memory a layer call holds at its peak: each step adds bytes and frees others.

It walks the schedule that the executor runs. Like the simulator it walks all ranks at once, in vectors over the ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.config.precision import PIECE, PIECE_OF_GPU, ExpertPrecision
from tritonmoe.ops.backends.ops import GPU_FACTOR
from tritonmoe.ops.backends.torch import ELEMENTWISE_SIZE, MAX_BLOCK_PAIRS
from tritonmoe.overlap.schedule import Schedule
from tritonmoe.overlap.simulation.cost_model import LayerWork, backward_with, forward_with
from tritonmoe.overlap.steps import Step, StepKind, Way
from tritonmoe.transports.wire import WireFormat

__all__ = ["ALL_AT_ONCE", "BufferWidths", "BytesOfRanks", "PeakBytes", "WorkingSet", "bytes_of_ranks", "peak_bytes"]


class WorkingSet(NamedTuple):
    """How much a rank's experts work on at a time; ranks with other machines or backends have another one."""

    max_block_pairs: int | None = None
    """How many pairs the backend computes at a time (pairs_at_a_time() of ops.py). None means all pairs of a chunk,
    as the kernels do."""
    num_workers: int = 1
    """On how many blocks, or experts' weight gradients, the rank works at a time."""
    copies_rows: bool = False
    """Whether the backend may copy the rows of a chunk's pairs before `up`, where it doesn't go block by block."""

    def pack(self) -> int:
        """Return the three as one positive integer, which unpack() reads."""
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
    """Whether h has 2F columns instead of F."""
    save: str = "hidden"
    """As in moe_mlp: whether h is kept for the backward."""
    has_backward: bool = True
    working_set: WorkingSet = ALL_AT_ONCE
    precision: ExpertPrecision | None = None
    """In which the experts compute: received rows are kept as codes, and weights rounded in each pass."""
    rounded_weight_bytes: int = 0
    """Of all of a rank's weights, rounded for the products of one direction."""
    num_tokens: int = 0
    """T, whose rows are encoded at the start of a pass, in an ExpertPrecision."""

    @property
    def code_bytes(self) -> int:
        """Of one row as it travels to experts and is kept in an ExpertPrecision; 0 without."""
        if self.precision is None:
            return 0
        return WireFormat(torch.bfloat16, None, self.precision).row_bytes(self.hidden_size)

    @property
    def kept_row_bytes(self) -> int:
        """Of one received row that is kept for the backward."""
        return self.code_bytes or self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Of one row of D columns."""
        return self.hidden_size * self.dtype_bytes

    @property
    def inner_bytes(self) -> int:
        """Of the activation of one pair, F columns."""
        return self.intermediate_size * self.dtype_bytes

    @property
    def hidden_bytes(self) -> int:
        """Of h of one pair."""
        return self.inner_bytes * self.hidden_parts

    @property
    def is_narrow(self) -> bool:
        """Whether rows are narrower than the dtype in which activations are computed, so that these widen copies."""
        return self.dtype_bytes < 4

    @property
    def temporary_bytes(self) -> int:
        """Of F columns in the dtype in which activations are computed, fp32 or wider."""
        return self.intermediate_size * max(4, self.dtype_bytes)

    @property
    def forward_temporaries(self) -> int:
        """How many tensors of F columns, in that dtype, a backend needs to compute the activation of a block's pairs:
        its value, where h is widened in the memory of the copy."""
        return self.hidden_parts if self.is_narrow else 1

    @property
    def backward_temporaries(self) -> int:
        """The same for the gradient of the activation: da, the activation where there is a gate, and a product; where
        they are widened also h and the product with `down_proj`."""
        return (1 + self.hidden_parts) * (1 + self.is_narrow)

    @property
    def hidden_parts(self) -> int:
        """Of F columns each, of which h consists."""
        return 2 if self.gated else 1

    @property
    def wide_gradient_bytes(self) -> int:
        """Of fp32 sums of all gradients of the two projections, where these are narrower themselves."""
        columns = self.intermediate_size * (3 if self.gated else 2)
        return self.num_local_experts * self.hidden_size * columns * 4 * self.is_narrow

    @property
    def keeps_hidden(self) -> bool:
        return self.has_backward and self.save == "hidden"


INDEX_BYTES = 4
"""Of one id, position or fp32 weight of a pair."""
DECODING_BYTES = 8
"""Of a number while codes are decoded."""
SQUARES_BYTES = 2 * 4
"""Two fp32 numbers for each element that a wire format sends, while the error that it makes is measured."""

Held = Step | str | tuple[str, int]
"""What holds bytes: an exchange, until it is waited for; a named buffer; or what is of one segment or part."""


class _PassWalk:
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

    def walk(self, schedule: Schedule, actions: Mapping[StepKind, Callable[[Step], None]]) -> Tensor:
        """Return the most bytes that each rank holds at any time.

        A step starts once what it waits for is freed; what is held when it has run counts.
        """
        for step in schedule:
            for earlier in step.after:
                if schedule[earlier] in self.held:
                    self.free(schedule[earlier])
            if step.kind in actions:
                actions[step.kind](step)
            self.count(torch.zeros_like(self.peak))
        return self.peak

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
        if wire_bytes == self.widths.code_bytes:  # encoded before, and received where they stay
            self.hold(step, sent[segment] * wire_bytes)
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

    def compute(self, step: Step, whole_bytes: int, block_bytes: int, wide_columns: tuple[int, int]) -> None:
        """Compute the experts of a segment.

        Args:
            whole_bytes: what a backend that computes all pairs of a chunk at a time needs for each of them meanwhile.
            block_bytes: what a backend that goes block by block needs for each pair of a block, beside its row and ...
            wide_columns: ... what activations are computed in, of at most ELEMENTWISE_SIZE numbers at a time: how often
                F columns in fp32 or wider there are, and of how many times F columns the numbers are counted.
        """
        segment, widths = segment_of(step, self.plan), self.widths
        if widths.precision is not None:
            self.decode(self.returned[segment])
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
            meanwhile = sums + self._compute_blocks(pairs, max_block_pairs, block_bytes, wide_columns, keeps_results)
        if is_chunk:
            self.hold(("sums", segment), sums)
        self.count(meanwhile)
        if is_of_copies:
            self.free("copies' sums")

    def encode(self, weight_bytes: int) -> None:
        """Hold the codes of T rows and of the received ones, and the weights rounded."""
        widths = self.widths
        if widths.precision is not None:
            codes = (self.num_received + widths.num_tokens) * widths.code_bytes
            self.hold("codes", codes + weight_bytes)

    def decode(self, rows: Tensor) -> None:
        """Decode received rows, a piece at a time."""
        piece = PIECE_OF_GPU if self.widths.working_set.max_block_pairs is None else PIECE
        self.count((rows * self.widths.hidden_size).clamp(max=piece) * DECODING_BYTES)

    def _compute_blocks(
        self,
        pairs: Tensor,
        max_block_pairs: int,
        block_bytes: int,
        wide_columns: tuple[int, int],
        keeps_results: bool,
    ) -> Tensor:
        """Compute pairs (W,) block by block, and give what is there when the last block is done, beside sums of rows.

        First the rows of a block's pairs are gathered, which are freed when its activation is computed. Then there are
        the results of pairs, and the sums of rows, which are copied to where they go.
        """
        widths, workers = self.widths, self.widths.working_set.num_workers
        row_bytes = widths.row_bytes
        results = torch.zeros_like(pairs)
        if not keeps_results:
            has_blocks = pairs > max_block_pairs
            self.hold_at_least("y", has_blocks * self.largest_pairs * row_bytes)
            results = ~has_blocks * pairs * row_bytes
        number, counted = wide_columns
        most_numbers = ELEMENTWISE_SIZE * (1 if max_block_pairs <= (MAX_BLOCK_PAIRS or 0) else GPU_FACTOR)
        most_wide = min(max_block_pairs, max(1, most_numbers // (counted * widths.intermediate_size)))
        of_blocks = pairs.clamp(max=max_block_pairs * workers)
        wide = pairs.clamp(max=most_wide * workers) * number * widths.temporary_bytes
        self.count(of_blocks * block_bytes + torch.maximum(of_blocks * row_bytes, wide))
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
    """Return what a layer of several ranks will hold at its peak under `plan`, before any call.

    Counted is every buffer of rows or pairs, from the first exchange to the end of the pass: received rows, rows and
    sums at home, h and its gradients, what exchanges under way hold, and what the experts of one chunk need meanwhile.
    Not counted are the caller's tensors, what the call gives back (y, and the gradients of x, of topk_weights and of
    the weights), index arithmetic over (T, W) and (R, K) that is over before the experts run, and what a callable
    activation keeps itself. Every chunk is taken to have its share of every rank's rows, and every expert its share of
    the pairs. Copies of hot experts (work.copies) count with their weights, with the gradients of these, and with what
    holds either on its way. Tests check that the result differs by at most a tenth from what is really held.

    With plan.capacity, `work` must have the rows and pairs for which there is room, used or not
    (a layer's report has them). Backends that go block by block keep only the
    pairs that are there, so the result is the most that they may hold. A call that overflows frees the buffers of its
    first run, and then holds what its rows need without a capacity.
    """
    return PeakBytes(*(int(of_rank.max().ceil()) for of_rank in bytes_of_ranks(plan, work, widths)[:2]))


class BytesOfRanks(NamedTuple):
    """The same of every rank, (W,) float64 each."""

    forward: Tensor
    backward: Tensor
    kept: Tensor
    """What stays from the forward to the backward; forward and backward hold it too."""
    kept_places: Tensor
    """Of that, where the pairs are grouped."""


def bytes_of_ranks(plan: OverlapPlan, work: LayerWork, widths: BufferWidths) -> BytesOfRanks:
    """Return the peaks of peak_bytes(), and what is kept between the passes, of every rank."""
    forward = _ForwardWalk(plan, work, widths).peak_bytes()
    if not widths.has_backward:
        nothing = torch.zeros_like(forward)
        return BytesOfRanks(forward, nothing, nothing, nothing)
    backward = _BackwardWalk(plan, work, widths)
    return BytesOfRanks(forward, backward.peak_bytes(), backward.kept_bytes(), backward.grouping_bytes())


class _ForwardWalk(_PassWalk):
    def peak_bytes(self) -> Tensor:
        self.hold("rows", self.num_received * self.widths.row_bytes)
        self.hold("home", self.num_sent * self.widths.row_bytes)
        self.encode(self.widths.rounded_weight_bytes)
        actions = {
            StepKind.METADATA: self.metadata,
            StepKind.DISPATCH: self.send_rows,
            StepKind.GROUP: self.group,
            StepKind.EXPERTS: self.experts,
            StepKind.COPY_EXPERTS: self.experts,
            StepKind.COMBINE: self.return_sums,
            StepKind.COPIES: self.send_copies,
            StepKind.SPREAD_COPIES: self.send_copies,
            StepKind.REDUCE: self.settle,
        }
        return self.walk(forward_with(self.work.copies, self.plan), actions)

    @property
    def metadata_bytes(self) -> int:
        """Of one row: K ids and K weights."""
        return 2 * INDEX_BYTES * self.work.top_k

    def metadata(self, step: Step) -> None:
        """Hold ids and weights as they arrive, and until the pass ends in the order of the received rows."""
        self.hold("metadata", self.num_received * self.metadata_bytes)
        self.hold("arriving metadata", total(self.returned[self.first_chunk :]) * self.metadata_bytes)
        self.hold(step, total(self.sent[self.first_chunk :]) * self.metadata_bytes)

    def group(self, step: Step) -> None:
        self.hold("weights", self.num_received * self.metadata_bytes / 2)
        self.count(torch.zeros_like(self.peak))
        self.free("arriving metadata")
        self.hold("grouping", self.grouping_bytes())

    def experts(self, step: Step) -> None:
        widths = self.widths
        if widths.keeps_hidden:
            self.hold("h", self.num_pairs * widths.hidden_bytes)
        per_pair = widths.inner_bytes + (0 if widths.keeps_hidden else widths.hidden_bytes)
        rounded = widths.inner_bytes * (widths.precision is not None)  # or codes, which are half as large
        wide_columns = (widths.forward_temporaries, widths.hidden_parts)
        self.compute(step, widths.inner_bytes + rounded, per_pair, wide_columns)


class _BackwardWalk(_PassWalk):
    def kept_bytes(self) -> Tensor:
        """Return what the forward has left, without the weights of copies."""
        widths = self.widths
        rows = self.num_received * (widths.kept_row_bytes + self.weights_bytes) + self.grouping_bytes()
        return rows + widths.keeps_hidden * self.num_pairs * widths.hidden_bytes

    def peak_bytes(self) -> Tensor:
        widths = self.widths
        self.hold("saved", self.kept_bytes())
        self.hold("dout", self.num_received * (widths.row_bytes + self.weights_bytes))
        self.hold("home", self.num_sent * widths.row_bytes)
        if widths.precision is not None:
            both_ways = not (widths.keeps_hidden or widths.precision.is_symmetric)  # to compute h again, and gradients
            self.encode(widths.rounded_weight_bytes * (1 + both_ways))
            self.hold("rows", self.num_received * widths.row_bytes)
            self.decode(self.num_received)
        actions = {
            StepKind.COMBINE_BACKWARD: self.send_rows,
            StepKind.EXPERTS_BACKWARD: self.experts_backward,
            StepKind.COPY_EXPERTS_BACKWARD: self.experts_backward,
            StepKind.DISPATCH_BACKWARD: self.return_sums,
            StepKind.WEIGHT_GRAD: self.weight_grad,
            StepKind.ROUTING_BACKWARD: self.routing_backward,
            StepKind.COPIES: self.send_copies,
            StepKind.SPREAD_COPIES: self.send_copies,
            StepKind.COPY_WEIGHT_GRAD: self.copy_weight_grad,
            StepKind.COPIES_BACKWARD: self.return_copies,
            StepKind.REDUCE_COPIES_BACKWARD: self.add_copies,
        }
        copies = self.work.copies
        if copies is not None and not copies.are_sent_again:
            self.hold("copies", self.num_copies[1] * copies.expert_bytes)
        return self.walk(backward_with(copies, self.plan, True, True), actions)

    @property
    def weights_bytes(self) -> int:
        """Of one row: K gate weights, or their gradients."""
        return INDEX_BYTES * self.work.top_k

    def experts_backward(self, step: Step) -> None:
        widths = self.widths
        self.hold("gradients", self.num_pairs * (widths.hidden_bytes + widths.inner_bytes))
        again = 0 if widths.keeps_hidden else widths.hidden_bytes
        rounded = widths.hidden_bytes * (widths.precision is not None)  # dh, or its codes
        wide_columns = (widths.backward_temporaries, 1)
        self.compute(step, again + rounded, widths.inner_bytes + again, wide_columns)

    def weight_grad(self, step: Step) -> None:
        self.settle(step)
        copies = self.work.copies
        own_pairs = self.num_pairs if copies is None else self.num_pairs - copies.pairs
        widths = self.widths
        if widths.precision is not None and widths.precision.weight_gradients == "fp8":  # all operands, rounded
            self.hold("tokens", own_pairs * (2 * widths.row_bytes + widths.hidden_bytes + widths.inner_bytes))
        self._gather(own_pairs, torch.full_like(own_pairs, self.widths.num_local_experts))

    def _gather(self, pairs: Tensor, num_experts: Tensor) -> None:
        """Gather the rows of the experts that are computed at a time, where a backend goes block by block."""
        widths = self.widths
        if widths.working_set.max_block_pairs is None:
            return
        gathered = pairs * (widths.working_set.num_workers / num_experts.clamp(min=1)).clamp(max=1.0)
        # One range of pairs is in source order already: only its rows are gathered, unless zeros are put behind both.
        copies_pairs = (self._num_ranges() > 1) | widths.is_narrow
        self.count(gathered * copies_pairs * widths.hidden_bytes + gathered * widths.row_bytes)

    def copy_weight_grad(self, step: Step) -> None:
        self.hold("gradients of copies", self.num_copies[1] * self._gradient_bytes(step))
        if self.work.copies is not None:
            self._gather(self.work.copies.pairs, self.num_copies[1])

    def return_copies(self, step: Step) -> None:
        """Pack the gradients of copies, which are freed then, and make room for those of own experts' copies."""
        sent, received = self.num_copies
        self.hold(step, received * self._gradient_bytes(step))
        self.hold(("arriving gradients", step.chunk or 0), sent * self._gradient_bytes(step))
        self.count(torch.zeros_like(self.peak))
        self.free("gradients of copies")

    def add_copies(self, step: Step) -> None:
        """Take them out of the rows in which they came."""
        self.count(self.held["arriving gradients", step.chunk or 0])
        self.free(("arriving gradients", step.chunk or 0))

    def _gradient_bytes(self, step: Step) -> int:
        return 0 if self.work.copies is None else self.work.copies.gradient_bytes[step.chunk or 0]

    def routing_backward(self, step: Step) -> None:
        self.hold("dtopk_weights", 2 * self.num_sent * self.weights_bytes)
        self.hold(step, self.num_received * self.weights_bytes)

    def _num_ranges(self) -> Tensor:
        """Return how many ranges of pairs are grouped each for itself: all chunks of experts are grouped as one."""
        pairs = self.pairs
        if self.plan.chunk_by == "experts":
            pairs = [*pairs[: self.first_chunk], total(pairs[self.first_chunk :])]
        return (torch.stack(pairs) > 0).sum(0)
