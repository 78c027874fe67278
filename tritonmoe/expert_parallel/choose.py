"""choose_plan(): the plan that this rank proposes for a call, as configured, tuned, or taken from the forward."""

from dataclasses import replace

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, most_copies
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.simulation.memory import BufferWidths, WorkingSet
from tritonmoe.overlap.tuning.search import fixed_plan
from tritonmoe.overlap.tuning.tuner import PlanChooser
from tritonmoe.overlap.tuning.votes import Message
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.cpu_threads import num_workers

__all__ = ["choose_plan", "learn"]


def choose_plan(call: ProposedCall) -> None:
    """Note in a call the plan that it is to run: as configured, tuned, or, in a recompute, that of the forward."""
    overlap, x = call.spec.overlap, call.tensors.x
    if isinstance(overlap, OverlapPlan):
        call.overlap, call.kind = overlap, (overlap, call.spec.num_experts, x.shape[1], x.dtype)
        call.again = call.state.forward_to_recompute(call.kind) if is_recomputing() else None
        return
    call.kind, chooser = find_chooser(call, overlap)
    call.chooser = chooser
    call.again = call.state.forward_to_recompute(call.kind) if is_recomputing() else None
    if call.again is not None:
        plan, call.reason = call.again.plan, "the plan of the forward that is recomputed"
    elif call.half and chooser.is_tuned:  # times in which another half computes say nothing of a plan
        plan = half_plan(overlap, call.transport.size)
        call.reason = f"{plan}: of half a batch, whose exchanges the other half hides"
    else:
        plan = chooser.plan()
        if not call.is_captured:
            call.message = chooser.message()
    if (plan.wire_dtype, plan.capacity) != (overlap.wire_dtype, overlap.capacity):
        plan = replace(plan, wire_dtype=overlap.wire_dtype, capacity=overlap.capacity)
    if overlap.balance is not None:
        held = most_copies(overlap.max_copies, call.num_slots // call.transport.size)
        plan = replace(plan, balance=overlap.balance, max_copies=held)
    call.overlap = plan


def learn(call: ProposedCall, plan: DispatchPlan, report: LayerReport) -> None:
    """Return the call's report to the chooser of its plan, which picks later plans; plan: that of the first run."""
    chooser = call.chooser
    if chooser is None:
        return
    if call.reason:
        report.choice = call.reason
    elif call.is_captured:  # it has no times, and no later call may read its events
        report.choice = chooser.choice
    else:
        chooser.observe([Message.of(header) for header in plan.headers], report, plan.needs_any)


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
        is_shared, can_cut_experts = call.transport.shares_link(x.device), call.transport.node_size is None
        chooser = PlanChooser(overlap, call.transport.size, is_shared, widths, can_cut_experts=can_cut_experts)
        call.state.choosers[kind] = chooser
    ops = settings.ops
    chooser.working_set = WorkingSet(ops.MAX_BLOCK_PAIRS, num_workers(x.device), ops.copies_rows())
    return kind, chooser
