"""Bounded: the plan of a call with a memory budget: what stays for its backward, and in how many parts the call runs.

All ranks know all counts, and what every rank keeps for earlier calls, so all find the same. A part is a range of every
rank's tokens with a plan of its own; while the rows of one part travel, the part before is computed. The gradients of
weights are added in fp32, part by part.
"""

import copy
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.activations import is_fused
from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.expert_parallel.call import ProposedCall, buffer_widths
from tritonmoe.expert_parallel.layer_pass import BackwardPass, ForwardPass, post_agreement
from tritonmoe.expert_parallel.plans.base import Kept, PlanKind, PlannedByAnother, PlannedCall, RunForward
from tritonmoe.expert_parallel.plans.plain import Plain
from tritonmoe.expert_parallel.whole_call import anchor_of, gradients_of_inputs, needs_of
from tritonmoe.experts.arguments import find_main_grads
from tritonmoe.experts.tensors import NAMES, OF_ROWS, CallTensors
from tritonmoe.ops.backends.ops import accumulation_dtype
from tritonmoe.overlap.report import LayerReport, PassReport
from tritonmoe.overlap.simulation.cost_model import LayerWork
from tritonmoe.overlap.simulation.memory import BufferWidths, WorkingSet
from tritonmoe.overlap.tuning.memory_budget import Parts, choose_parts, plan_of_part
from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.autograd import (
    Context,
    checkpointed_region,
    is_recomputing,
    keep_beside,
    kept_beside,
    once_differentiable,
    save_tensors,
)

__all__ = ["Bounded"]

MOST_PARTS = 256
"""A part that still has too many rows, as its own counts show, is cut in two until there are so many."""


Place = tuple[int, int]
"""The n-th of so many equal parts of the tokens."""


class Repeated(NamedTuple):
    """How a call has run, for its recompute."""

    parts: Parts
    places: Sequence[Place]
    """What ran one after the other; () of a call that ran as a whole."""


@dataclass(eq=False)
class Bounded(PlannedByAnother):
    """A call with a memory budget: the next kind plans and computes it, as a whole or part by part."""

    name = "bounded"

    planned_by: PlanKind
    parts: Parts
    proposed: ProposedCall | None
    """The call as it was given, until it runs in parts."""
    places: Sequence[Place]
    """As in Repeated; before a recompute those of its forward, before a forward ()."""

    @classmethod
    def takes(cls, call: ProposedCall) -> bool:
        overlap = call.spec.overlap
        return isinstance(overlap, OverlapConfig) and overlap.memory_budget_bytes is not None

    @classmethod
    def plan(cls, call: ProposedCall, header: CallHeader, others: Sequence[type[PlanKind]]) -> PlannedCall:
        planned = others[0].plan(call, header, others[1:])
        again = None if call.again is None else call.again.of_kind
        parts, places = again if isinstance(again, Repeated) else (_choose(call, planned.plan), ())
        planned.kind = cls(planned.kind, parts, call if parts.are_several else None, places)
        planned.keeps = parts.keeps
        # A checkpoint lets go of what its first forward keeps.
        is_kept = planned.plan.needs_any and (is_recomputing() or checkpointed_region() is None)
        if is_kept:
            call.state.kept_bytes[call.sequence] = parts.kept_bytes[call.transport.rank]
            weakref.finalize(planned, call.state.kept_bytes.pop, call.sequence, None).atexit = False
        return planned

    def report(self, call: PlannedCall, report: LayerReport) -> None:
        super().report(call, report)
        report.memory = self.parts.reason

    def run(self, call: PlannedCall, tensors: CallTensors[Tensor], run_forward: RunForward) -> Tensor:
        if self.proposed is None:
            return self.planned_by.run(call, tensors, run_forward)
        proposed, self.proposed = self.proposed, None  # whose tensors are for autograd alone to keep
        cut = _Cut(proposed, call, self.parts, self.places)
        out, _ = _CallInParts.apply(cut, anchor_of(call, tensors), *tensors.flatten())
        self.places = [part.place for part in cut.ran]
        return out

    @property
    def repeated(self) -> object:
        return Repeated(self.parts, self.places)


def _choose(call: ProposedCall, plan: DispatchPlan) -> Parts:
    overlap, spec = call.spec.overlap, call.spec.experts
    assert isinstance(overlap, OverlapConfig)
    assert overlap.memory_budget_bytes is not None
    has_replicas = call.spec.placement is not None and call.spec.placement.has_replicas
    return choose_parts(
        overlap.memory_budget_bytes,
        plan.overlap,
        _work(call, plan),
        _widths(call, plan),
        torch.tensor([header.kept_bytes for header in plan.headers], dtype=torch.float64, device="cpu"),
        can_be_cut=not (call.half or call.is_compiled or has_replicas) and is_fused(spec.activation),
        can_drop_hidden=is_fused(spec.activation),
    )


def _work(call: ProposedCall, plan: DispatchPlan) -> LayerWork:
    x, top_k = call.tensors.x, call.tensors.topk_ids.shape[1]
    rows, pairs = (of.to(torch.float64) for of in (plan.traffic, plan.traffic_pairs))
    return LayerWork(rows, pairs, x.shape[1] * x.dtype.itemsize, top_k)


def _widths(call: ProposedCall, plan: DispatchPlan) -> list[BufferWidths]:
    """Return the widths of every rank's buffers."""
    widths = buffer_widths(call.tensors, call.settings, has_backward=plan.needs_any)
    return [replace(widths, working_set=WorkingSet.unpack(header.working_set)) for header in plan.headers]


class _Part(NamedTuple):
    """A range of the tokens as it has run."""

    call: PlannedCall
    tokens: slice
    place: Place


class _Cut:
    """A call that runs in parts, from its forward to the end of its backward."""

    def __init__(self, proposed: ProposedCall, call: PlannedCall, parts: Parts, places: Sequence[Place]) -> None:
        """places: those of the forward that is recomputed, which has saved as many tensors; else ()."""
        self._proposed: ProposedCall | None = proposed
        self._repeated = places
        self.call, self.parts, self.state = call, parts, proposed.state
        self.ran: list[_Part] = []

    def plan(self, tensors: CallTensors[Tensor]) -> Iterator[tuple[_Part, CallTensors[Tensor]]]:
        """Plan one part after the other together with the other ranks, and yield it with its tensors."""
        proposed, self._proposed = self._proposed, None
        assert proposed is not None
        number, num_tokens = self.parts.number, tensors.x.shape[0]
        waiting = list(reversed(self._repeated or [(place, number) for place in range(number)]))
        while waiting:
            place, among = waiting.pop()
            tokens = slice(num_tokens * place // among, num_tokens * (place + 1) // among)
            of_part = _rows(tensors, tokens)
            planned = self._plan_part(proposed, of_part)
            work, widths = _work(proposed, planned.plan), _widths(proposed, self.call.plan)
            may_be_cut = among < MOST_PARTS and not self._repeated
            if may_be_cut and not self.parts.have_room_for(planned.plan.overlap, work, widths):
                waiting += [(2 * place + 1, 2 * among), (2 * place, 2 * among)]
                continue
            if not self.ran:
                planned.fillers, self.call.fillers = self.call.fillers, ()
            part = _Part(planned, tokens, (place, among))
            self.ran.append(part)
            yield part, of_part

    def _plan_part(self, proposed: ProposedCall, tensors: CallTensors[Tensor]) -> PlannedCall:
        part = copy.copy(proposed)
        part.tensors, part.sequence = tensors, self.state.next_call()
        part.num_nonfinite_rows = torch.zeros_like(proposed.num_nonfinite_rows)  # of all parts there are none
        part.overlap = plan_of_part(self.call.plan.overlap)
        if self.ran:
            part.entered_at = time.perf_counter()
        header = self.call.header._replace(sequence=part.sequence, **self.state.history())
        planned = Plain.plan(part, header)
        if not self.ran:  # who comes late to the call does so to the exchange before this one
            planned.plan = replace(planned.plan, marks=self.call.plan.marks)
        planned.keeps, planned.part = self.parts.keeps, len(self.ran) + 1
        return planned

    def report(self) -> None:
        """Put the reports of the parts together as that of the call."""
        plan, reports = self.call.plan, tuple(part.call.report for part in self.ran)
        self.call.report = replace(
            reports[0],
            traffic_rows=plan.traffic,
            traffic_pairs=plan.traffic_pairs,
            overlap=plan.overlap,
            send_offsets=plan.send_offsets,
            return_offsets=plan.return_offsets,
            pair_offsets=plan.pair_offsets,
            forward=PassReport.joined([report.forward for report in reports]),
            parts=reports,
            part=0,
        )
        self.call.kind.report(self.call, self.call.report)


class _CallInParts(torch.autograd.Function):
    """A call on one rank as parts that run one after the other: the next one's rows travel while one is computed."""

    @staticmethod
    def forward(ctx: Context, cut: _Cut, anchor: Tensor | None, *flat: Tensor | None) -> tuple[Tensor, Tensor | None]:
        cpu_memory.recycled.clear()  # blocks of other sizes than those of parts
        tensors: CallTensors[Tensor] = CallTensors.unflatten(flat)
        out, needs_weights = tensors.x.new_empty(tensors.x.shape), needs_of(ctx).weights
        needs_any, keeps_rows = cut.call.plan.needs_any, cut.parts.keeps != "nothing"
        kept: list[Kept] = []
        saved: list[Tensor | None] = []

        def finish(part: _Part, forward: ForwardPass) -> None:
            forward.compute()
            out[part.tokens] = forward.end()
            if needs_any:
                kept.append(forward.kept)
            if needs_any and keeps_rows:
                run, rows = forward.experts.own, forward.rows_to_keep(needs_weights)
                saved.extend([run.h, *run.tensors._replace(x=rows).flatten()])

        under_way: tuple[_Part, ForwardPass] | None = None
        for part, of_part in cut.plan(tensors):
            forward = ForwardPass(part.call, of_part)
            forward.begin()
            if under_way is not None:
                finish(*under_way)
            under_way = part, forward
        assert under_way is not None
        finish(*under_way)
        cut.report()
        if not needs_any:
            return out, None
        ctx.call, ctx.weights_dtype = cut.call, tensors.topk_weights.dtype
        mark = keep_beside(ctx, (cut, kept))
        save_tensors(ctx, mark, *tensors.flatten(), *saved)
        return out, mark

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, saved: Sequence[Tensor], dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        cpu_memory.recycled.clear()
        mark, *others = saved
        cut: _Cut
        cut, kept = kept_beside(ctx, mark)
        tensors: CallTensors[Tensor] = CallTensors.unflatten(others[: len(NAMES)])
        needs_weights, plan = needs_of(ctx).weights, cut.call.plan
        mains, sums = _sums(needs_weights, tensors.weights, cut.call.owners)
        dx = dout.new_empty(dout.shape) if plan.needs_x else None
        dtopk_weights = tensors.topk_weights.new_empty(tensors.topk_weights.shape, dtype=torch.float32)

        def finish(part: _Part, backward: BackwardPass) -> None:
            backward.compute()
            grads = backward.end()
            if dx is not None and grads.x is not None:
                dx[part.tokens] = grads.x
            if grads.topk_weights is not None:
                dtopk_weights[part.tokens] = grads.topk_weights

        under_way: tuple[_Part, BackwardPass] | None = None
        for number, part in enumerate(cut.ran):
            backward = partial(BackwardPass, part.call, dout=dout[part.tokens], needs_weights=needs_weights, sums=sums)
            if cut.parts.keeps != "nothing":
                begun = backward(_with_saved(kept[number], others, number))
                begun.begin()
                if under_way is not None:
                    finish(*under_way)
            else:
                agreement = post_agreement(part.call, needs_weights, time.perf_counter())
                if agreement is not None:
                    agreement.wait()
                fetch = ForwardPass(part.call, _rows(tensors, part.tokens))
                fetch.begin_fetch()
                if under_way is not None:
                    finish(*under_way)
                begun = backward(fetch.end_fetch(), agreement=agreement)
                begun.begin()
            under_way = part, begun
        assert under_way is not None
        finish(*under_way)
        for call in (ctx.call, cut.call):  # of a checkpoint's first forward, and of its recompute
            cut.state.forget(call.header.sequence)
        passes = [part.call.report.backward for part in cut.ran]
        ctx.call.report.backward = PassReport.joined([one for one in passes if one is not None])
        weight_grads: PerWeight[Tensor | None] = PerWeight(
            *(
                None if total is None or weight is None or main is not None else total.to(weight.dtype)
                for total, main, weight in zip(sums, mains, tensors.weights, strict=True)
            )
        )
        grads = CallTensors(dx, None, dtopk_weights if plan.needs_topk_weights else None, weight_grads)
        return gradients_of_inputs(grads, ctx.weights_dtype)


def _rows(tensors: CallTensors[Tensor], tokens: slice) -> CallTensors[Tensor]:
    """Return the tensors of a range of the tokens."""
    of_rows: dict[str, Any] = {name: getattr(tensors, name) for name in ("x", *OF_ROWS)}
    of_rows = {name: None if of is None else of[tokens] for name, of in of_rows.items()}
    return tensors._replace(**of_rows)


def _with_saved(kept: Kept, saved: Sequence[Tensor], number: int) -> Kept:
    """Return what a part keeps with its tensors, which stand behind those of the call, part by part."""
    first = len(NAMES) + number * (1 + len(NAMES))
    h, *received = saved[first : first + 1 + len(NAMES)]
    return kept._replace(h=h, received=CallTensors.unflatten(received))


def _sums(
    needs: PerWeight[bool], weights: PerWeight[Tensor], owners: PerWeight[Tensor] | None
) -> tuple[PerWeight[Tensor | None], PerWeight[Tensor | None]]:
    """Return the main_grad of each weight, None where there is none, and what the gradients of the parts are added to.

    These are in fp32 (fp64 of fp64 weights) where there is no main_grad, and None where no gradient is wanted.
    """
    mains: PerWeight[Tensor | None] = NO_WEIGHTS if owners is None else find_main_grads(owners) or NO_WEIGHTS
    sums = [
        torch.zeros(weight.shape, dtype=accumulation_dtype(weight.dtype), device=weight.device)
        if is_needed and main is None and weight is not None
        else main
        for is_needed, main, weight in zip(needs, mains, weights, strict=True)
    ]
    return mains, PerWeight(*sums)
