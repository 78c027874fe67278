"""ForwardWithCopies and BackwardWithCopies: one rank's experts, and beside them its copies of other ranks' experts.

Both run on the rows that the rank received, each for its own pairs; a row that has pairs of both gets their sum. Own
experts come first, while weights of copies may be under way.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.expert_parallel.plans.base import (
    NUM_KIND_TENSORS,
    BackwardBuffers,
    BackwardExperts,
    ForwardBuffers,
    ForwardExperts,
    PlannedCall,
)
from tritonmoe.expert_parallel.plans.copies.copy_exchanges import CopyExchanges
from tritonmoe.expert_parallel.plans.plain import OwnExperts, group_received
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.experts.run import ExpertsRun
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.backends.ops import WeightGrads
from tritonmoe.ops.grouping import Grouping
from tritonmoe.overlap.executor import Actions
from tritonmoe.overlap.report import PassReport
from tritonmoe.overlap.schedule import Schedule, build_backward, build_forward
from tritonmoe.overlap.steps import StepKind
from tritonmoe.runtime import cpu_memory
from tritonmoe.transports import PendingExchange

__all__ = ["BackwardWithCopies", "ForwardWithCopies", "KeptCopies"]


class KeptCopies(NamedTuple):
    """What a backward needs of the forward's copies beside tensors."""

    copies: ExpertCopies
    grouping: Grouping | None
    """Of the pairs of this rank's copies; None where there are none."""


class ForwardWithCopies(ForwardExperts):
    """The experts of a forward that has copies; own: without them. exchanges: how the weights come here."""

    _received: CallTensors[Tensor]
    _places: RowPlaces
    _plan: DispatchPlan

    def __init__(self, call: PlannedCall, own: OwnExperts, keep_hidden: bool, exchanges: CopyExchanges) -> None:
        self._call, self._own, self._keep_hidden, self._exchanges = call, own, keep_hidden, exchanges

    def schedule(self, plan: DispatchPlan, num_fillers: int) -> Schedule:
        relays = self._exchanges.copies.are_relayed
        return build_forward(plan.overlap, num_fillers, has_copies=True, relays_copies=relays)

    def actions(self, buffers: ForwardBuffers) -> Actions:
        def copy_experts(chunk: int) -> None:
            self.add_copies(buffers.plan.segment(chunk), buffers.partials[chunk])

        return {**self._exchanges.actions(), StepKind.COPY_EXPERTS: copy_experts}

    def group(self, plan: DispatchPlan, received: CallTensors[Tensor], places: RowPlaces) -> None:
        self._plan, self._received, self._places = plan, received, places
        own_offsets = tuple(all_ - of for all_, of in zip(plan.pair_offsets, plan.copy_pair_offsets, strict=True))
        self._own.group(replace(plan, pair_offsets=own_offsets), received, places)

    @property
    def own(self) -> ForwardRun:
        return self._own.own

    @cached_property
    def copies(self) -> ForwardRun | None:
        """The run of the copies, made by the first step that needs it; None where this rank has no pair for one."""
        plan, call = self._plan, self._call
        if not plan.copy_pair_offsets[-1]:
            return None
        weights = self._exchanges.weights
        local_ids = self._received.topk_ids - (call.first_expert + self.own.weights.gate_up_proj.shape[0])
        copied = replace(plan, pair_offsets=plan.copy_pair_offsets)
        grouping = group_received(call.settings, copied, self._places, local_ids, weights.gate_up_proj.shape[0])
        return ForwardRun(call.settings, self.own.tensors._replace(weights=weights), grouping, self._keep_hidden)

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        """Return the weighted sums over own experts of the rows that a segment finishes, for add_copies() to add to."""
        if _who_has_pairs(self._plan, segment) == (False, True):
            return _sums(self.own, segment) if out is None else out
        return self.own.forward(segment, out)

    def add_copies(self, segment: int, sums: Tensor) -> None:
        """Add the weighted sums over copies to those of forward()."""
        has_own, has_copied = _who_has_pairs(self._plan, segment)
        if not has_copied or self.copies is None:
            return
        if has_own:
            sums.add_(self.copies.forward(segment, _sums(self.copies, segment)))
        else:
            self.copies.forward(segment, sums)

    def settle(self) -> None:
        self._exchanges.settle()

    @property
    def needs_rows(self) -> bool:
        return self.copies is not None and self._plan.needs_weights.gate_up_proj

    def kept(self) -> tuple[object, tuple[Tensor | None, ...]]:
        run = self.copies
        kept = KeptCopies(self._exchanges.copies, None if run is None else run.grouping)
        if run is None:
            return kept, (None,) * NUM_KIND_TENSORS
        return kept, (run.h, *(run.weights if self._plan.keeps_copies else NO_WEIGHTS))


class BackwardWithCopies(BackwardExperts):
    """The experts of such a backward, and how the weights of copies and their gradients travel.

    Args:
        make_copies: makes the run of this rank's copies, once their weights are here.
        plan: that of the forward. exchanges: of the same copies.
    """

    def __init__(
        self, own: BackwardRun, make_copies: Callable[[], BackwardRun], plan: DispatchPlan, exchanges: CopyExchanges
    ) -> None:
        self.own, self._make_copies, self._plan, self.exchanges = own, make_copies, plan, exchanges
        self._grads: WeightGrads = NO_WEIGHTS
        self._arriving: dict[int, Tensor] = {}
        """By part: (copied experts of this rank, bytes), from return_copies() on."""

    def schedule(self, plan: DispatchPlan, sums_replicas: bool) -> Schedule:
        return build_backward(
            plan.overlap,
            needs_x=plan.needs_x,
            needs_topk_weights=plan.needs_topk_weights,
            sums_replicas=sums_replicas,
            has_copies=True,
            sends_copies=not plan.keeps_copies,
            relays_copies=self.exchanges.copies.are_relayed,
            returned_copies=self.exchanges.returned,
        )

    def actions(self, buffers: BackwardBuffers) -> Actions:
        plan = self._plan

        def copy_experts_backward(chunk: int) -> None:
            place = plan.home_slice(chunk) if chunk < 0 else plan.return_slice(chunk)
            dx = None if not plan.needs_x else buffers.home[place] if chunk < 0 else buffers.partials[chunk]
            self.add_copies_backward(plan.segment(chunk), buffers.dout_rows, dx, buffers.dweights[place])

        return {
            **self.exchanges.actions(),
            StepKind.COPY_EXPERTS_BACKWARD: copy_experts_backward,
            StepKind.COPY_WEIGHT_GRAD: lambda part: self.copy_weight_grad(part, buffers.dout_rows),
            StepKind.COPIES_BACKWARD: self.return_copies,
            StepKind.REDUCE_COPIES_BACKWARD: lambda part: self.add_copies(part, buffers.weight_grads),
        }

    @cached_property
    def copies(self) -> BackwardRun | None:
        """The run of the copies, made by the first step that needs it; None where this rank has no pair for one."""
        return self._make_copies() if self._plan.copy_pair_offsets[-1] else None

    def backward(
        self, segment: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Return what own experts give; see BackwardExperts. add_copies_backward() adds to both results."""
        if _who_has_pairs(self._plan, segment) != (False, True):
            return self.own.backward(segment, dout, needs_dx, out)
        # No pairs belong to it; its buffers start with segment 0.
        _, dweights = self.own.backward(segment, dout, False)
        return (_sums(self.own, segment) if out is None else out) if needs_dx else None, dweights

    def add_copies_backward(self, segment: int, dout: Tensor, dx: Tensor | None, dweights: Tensor) -> None:
        """Add what copies contribute to the results of backward()."""
        has_own, has_copied = _who_has_pairs(self._plan, segment)
        if not has_copied or self.copies is None:
            return
        sums = dx if dx is None or not has_own else _sums(self.copies, segment)
        copies_dx, copies_dweights = self.copies.backward(segment, dout, dx is not None, sums)
        if dx is not None and copies_dx is not None and has_own:
            dx.add_(copies_dx)
        dweights.add_(copies_dweights)  # each pair has one of the two, the other is zero

    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> WeightGrads:
        """Return the gradients of own experts' weights, over this rank's own pairs."""
        self.exchanges.settle()
        return self.own.weight_grad(dout, needs)

    def end(self, grads: CallTensors[Tensor | None], timings: PassReport) -> CallTensors[Tensor | None]:
        return grads._replace(activation_parameters=self.own.activation_grads)

    def copy_weight_grad(self, part: int, dout: Tensor) -> None:
        """Compute a part of the gradients of the copies' weights."""
        if self.copies is None:
            return
        sums = self.copies.main_grads = self.exchanges.sums(part)
        grads = self.copies.weight_grad(dout, self.exchanges.needed(part))
        self._grads = PerWeight(*(grad if of is None else of for grad, of in zip(grads, sums, strict=True)))

    def return_copies(self, part: int) -> PendingExchange:
        """Send this part to the owners."""
        pending, self._arriving[part] = self.exchanges.return_gradients(part, self._grads)
        self._grads = NO_WEIGHTS
        return pending

    def add_copies(self, part: int, grads: WeightGrads) -> None:
        """Add what came home of it to the gradients of own experts' weights."""
        self.exchanges.add_gradients(part, self._arriving.pop(part), grads, self.own.main_grads)


def _sums(run: ExpertsRun, segment: int) -> Tensor:
    """Return memory for the sums of the rows that a segment finishes."""
    first, last = run.grouping.chunk_row_offsets[segment : segment + 2]
    return cpu_memory.empty(last - first, run.rows.shape[1], like=run.rows)


def _who_has_pairs(plan: DispatchPlan, segment: int) -> tuple[bool, bool]:
    """Return whether own experts have pairs in a segment, and whether copies have."""
    (first, last), (first_copied, last_copied) = (
        of[segment : segment + 2] for of in (plan.pair_offsets, plan.copy_pair_offsets)
    )
    return last - first > last_copied - first_copied, last_copied > first_copied
