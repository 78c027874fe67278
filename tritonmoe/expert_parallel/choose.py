"""choose_plan(): the plan that this rank proposes for a call, as configured, tuned, or taken from the forward."""

from dataclasses import replace
from typing import NamedTuple

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.expert_parallel.agreed_call import AgreedCall
from tritonmoe.expert_parallel.proposed_call import ProposedCall
from tritonmoe.expert_parallel.state import UnderWay
from tritonmoe.overlap.report import LayerReport
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.cpu_threads import num_workers
from tritonmoe.simulation.buffer_widths import BufferWidths, WorkingSet
from tritonmoe.tuning.copy_costs import MeasuredCosts
from tritonmoe.tuning.search import fixed_plan
from tritonmoe.tuning.tuner import PlanChooser
from tritonmoe.tuning.votes import Message

__all__ = ["Choice", "choose_plan"]


class Choice(NamedTuple):
    """The plan that this rank proposes for a call, which must be every rank's, and who chose it."""

    overlap: OverlapPlan
    message: Message
    """What this rank tells the other ranks' choosers."""
    chooser: PlanChooser | None = None
    """None for a plan that was given."""
    kind: tuple = ()
    """Of the call, as in TransportState.choosers; () where a recompute has nothing to repeat."""
    reason: str = ""
    """Why this plan was taken, where the chooser was not asked and learns nothing; in one sentence."""
    copies: ExpertCopies | None = None
    """Those of the forward that is recomputed."""
    costs: MeasuredCosts | None = None
    """By which copies are planned from the counts; None where none are."""
    copy_words: str = "none"
    """Which copies of experts the call has, as far as that is known before its counts are."""

    def learn(self, call: ProposedCall, agreed: AgreedCall, report: LayerReport) -> None:
        """Return the call's report to the tuner, which picks later plans, and remember its plan for a recompute."""
        if self.costs is not None and not call.is_captured:
            self.costs.observe(report, agreed.plan.needs_any, agreed.planning_s, agreed.expected_fs)
        if self.chooser is not None:
            self._teach(self.chooser, call, agreed, report)
        if self.kind and agreed.plan.needs_any and not is_recomputing():
            call.state.start(call.sequence, self.kind, report.overlap, agreed.copies)

    def _teach(self, chooser: PlanChooser, call: ProposedCall, agreed: AgreedCall, report: LayerReport) -> None:
        if self.reason:
            report.choice = self.reason
        elif call.is_captured:  # it has no times, and no later call may read its events
            report.choice = chooser.choice
        else:
            chooser.observe([Message.of(header) for header in agreed.plan.headers], report, agreed.plan.needs_any)


def choose_plan(call: ProposedCall) -> Choice:
    """Return the plan of a call: as configured, tuned, or, in a recompute, that of the forward."""
    overlap = call.spec.overlap
    if isinstance(overlap, OverlapPlan):
        return _chosen_with_copies(call, overlap)
    kind, chooser = find_chooser(call, overlap)
    again = call.state.forward_to_recompute(kind) if is_recomputing() else None
    message, reason = Message(), ""
    if again is not None:
        plan, reason = again.plan, "the plan of the forward that is recomputed"
    elif call.half and chooser.is_tuned:  # times in which another half computes say nothing of a plan
        plan = half_plan(overlap, call.transport.size)
        reason = f"{plan}: of half a batch, whose exchanges the other half hides"
    else:
        plan = chooser.plan()
        message = message if call.is_captured else chooser.message()
    if (plan.wire_dtype, plan.capacity) != (overlap.wire_dtype, overlap.capacity):
        plan = replace(plan, wire_dtype=overlap.wire_dtype, capacity=overlap.capacity)
    choice = Choice(plan, message, chooser, kind, reason)
    if overlap.balance is None:
        return choice
    plan = replace(plan, balance=overlap.balance, max_copies=overlap.max_copies)
    return _with_copies(call, choice._replace(overlap=plan), again)


def _chosen_with_copies(call: ProposedCall, overlap: OverlapPlan) -> Choice:
    """Return a plan that was given, of which only the copies are to be chosen."""
    choice = Choice(overlap, Message())
    if overlap.balance is None:
        return choice
    kind = (overlap, call.spec.num_experts, call.tensors.x.shape[1], call.tensors.x.dtype)
    again = call.state.forward_to_recompute(kind) if is_recomputing() else None
    return _with_copies(call, choice._replace(kind=kind), again)


def _with_copies(call: ProposedCall, choice: Choice, again: UnderWay | None) -> Choice:
    """Return the choice with the copies of the forward that is recomputed, or with what new ones are planned by."""
    if again is not None:
        return choice if again.copies is None else choice._replace(copies=again.copies, copy_words=again.copies.words)
    if call.half or call.transport.size == 1:
        return choice
    costs = call.state.copy_costs.setdefault(choice.kind, MeasuredCosts())
    return choice._replace(costs=costs, copy_words="planned from counts")


def half_plan(overlap: OverlapConfig, size: int) -> OverlapPlan:
    """Return the plan of half a batch under num_chunks="auto".

    Its products are small already: so there is one chunk, which on several ranks has the rows that stay as well.
    """
    return fixed_plan(replace(overlap, local_first=size == 1 and overlap.local_first), 1, size)


def find_chooser(call: ProposedCall, overlap: OverlapConfig) -> tuple[tuple, PlanChooser]:
    """Return the kind of the call, and the transport's chooser for its kind."""
    x, topk_ids, topk_weights, weights, *_ = call.tensors
    settings = call.settings
    widths = BufferWidths(
        x.shape[1],
        call.intermediate_size,
        weights.gate_up_proj.shape[0],
        x.dtype.itemsize,
        gated=settings.spec.layout.gated,
        save=settings.spec.save,
        has_backward=call.grad_enabled,
    )
    kind = (call.spec.num_experts, widths, topk_ids.shape[1], x.dtype, topk_weights.dtype, overlap)
    chooser = call.state.choosers.get(kind)
    if chooser is None:
        is_shared, can_cut_experts = call.transport.shares_link(x.device), call.two_level is None
        chooser = PlanChooser(overlap, call.transport.size, is_shared, widths, can_cut_experts=can_cut_experts)
        call.state.choosers[kind] = chooser
    ops = settings.ops
    chooser.working_set = WorkingSet(ops.MAX_BLOCK_PAIRS, num_workers(x.device), ops.copies_rows())
    return kind, chooser
