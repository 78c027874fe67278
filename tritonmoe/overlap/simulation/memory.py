"""How much memory a layer call holds at its peak: each step adds bytes and frees others.

It walks the schedule that the executor runs. Like the simulator it walks all ranks at once, in vectors over the ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.simulation.buffer_widths import BufferWidths
from tritonmoe.overlap.simulation.copy_work import backward_with, forward_with
from tritonmoe.overlap.simulation.cost_model import LayerWork
from tritonmoe.overlap.simulation.memory_walk import INDEX_BYTES, MemoryWalk, total
from tritonmoe.overlap.steps import Step, StepKind

__all__ = ["PeakBytes", "peak_bytes"]

FORWARD_TEMPORARIES, BACKWARD_TEMPORARIES = 1, 3
"""How many tensors of F columns, in fp32 or wider, a backend needs to compute the activation of a block's pairs, and
the gradient of the activation."""


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
    the pairs. Copies of hot experts (work.copies) count with their weights, with the gradients of these, and with what
    holds either on its way. Tests check that the result differs by at most a tenth from what is really held.

    With plan.capacity, `work` must have the rows and pairs for which there is room, used or not
    (a layer's report has them). Backends that go block by block keep only the
    pairs that are there, so the result is the most that they may hold. A call that overflows frees the buffers of its
    first run, and then holds what its rows need without a capacity.
    """
    forward = _ForwardWalk(plan, work, widths).peak_bytes()
    backward = _BackwardWalk(plan, work, widths).peak_bytes() if widths.has_backward else 0
    return PeakBytes(forward, backward)


class _ForwardWalk(MemoryWalk):
    def peak_bytes(self) -> int:
        self.hold("rows", self.num_received * self.widths.row_bytes)
        self.hold("home", self.num_sent * self.widths.row_bytes)
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
        """Hold ids and weights twice until the pass ends: as they arrive, and in the order of the received rows."""
        travelling = total(self.returned[self.first_chunk :])
        self.hold("metadata", (self.num_received + travelling) * self.metadata_bytes)
        self.hold(step, total(self.sent[self.first_chunk :]) * self.metadata_bytes)

    def group(self, step: Step) -> None:
        self.hold("grouping", self.grouping_bytes())
        self.hold("weights", self.num_received * self.metadata_bytes / 2)

    def experts(self, step: Step) -> None:
        widths = self.widths
        if widths.keeps_hidden:
            self.hold("h", self.num_pairs * widths.hidden_bytes)
        per_pair = widths.inner_bytes + (0 if widths.keeps_hidden else widths.hidden_bytes)
        self.compute(step, widths.inner_bytes, per_pair + FORWARD_TEMPORARIES * widths.temporary_bytes)


class _BackwardWalk(MemoryWalk):
    def peak_bytes(self) -> int:
        widths = self.widths
        row_and_weights = widths.row_bytes + self.weights_bytes
        self.hold("saved", self.num_received * row_and_weights + self.grouping_bytes())
        if widths.keeps_hidden:
            self.hold("h", self.num_pairs * widths.hidden_bytes)
        self.hold("dout", self.num_received * row_and_weights)
        self.hold("home", self.num_sent * widths.row_bytes)
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
        temporaries = BACKWARD_TEMPORARIES * widths.temporary_bytes
        self.compute(step, again, widths.inner_bytes + again + temporaries)

    def weight_grad(self, step: Step) -> None:
        self.settle(step)
        copies = self.work.copies
        own_pairs = self.num_pairs if copies is None else self.num_pairs - copies.pairs
        self._gather(own_pairs, torch.full_like(own_pairs, self.widths.num_local_experts))

    def _gather(self, pairs: Tensor, num_experts: Tensor) -> None:
        """Gather the rows of the experts that are computed at a time, where a backend goes block by block."""
        widths = self.widths
        if widths.working_set.max_block_pairs is None:
            return
        gathered = pairs * (widths.working_set.num_workers / num_experts.clamp(min=1)).clamp(max=1.0)
        # One range of pairs is in source order already: only its rows are gathered.
        self.count(gathered * (self._num_ranges() > 1) * widths.hidden_bytes + gathered * widths.row_bytes)

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
