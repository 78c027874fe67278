"""run_call(): an expert-parallel call from its arguments to its result: check, choose a plan, agree, run.

choose_plan() gives the plan that this rank proposes: as configured, as tuned, or in a recompute that of the forward.
call_header() gives what this rank tells the other ranks of the call. In agree() the first kind of plan that takes the
call plans it; then all ranks know every size and offset.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, most_copies
from tritonmoe.dispatch.call_settings import call_settings
from tritonmoe.dispatch.capacity import replay_overflowed
from tritonmoe.dispatch.header import DTYPE_CODES, SAVES, CallHeader
from tritonmoe.dispatch.header_check import NoLayerCall
from tritonmoe.dispatch.placement import replica_bits, weight_bits
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.expert_parallel.call import ProposedCall, buffer_widths
from tritonmoe.expert_parallel.check import check
from tritonmoe.expert_parallel.plans import KIND_NAMES
from tritonmoe.expert_parallel.plans.base import PlanKind, PlannedCall, RunForward
from tritonmoe.experts.arguments import have_wider_main_grads
from tritonmoe.experts.tensors import NAMES
from tritonmoe.ops.backends.ops import Operations, pairs_at_a_time
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.simulation.memory import BufferWidths, WorkingSet
from tritonmoe.overlap.tuning.search import fixed_plan, half_plan
from tritonmoe.overlap.tuning.tuner import PlanChooser
from tritonmoe.runtime.autograd import caller_autocast, is_recomputing, without_autocast
from tritonmoe.runtime.cpu_threads import num_workers

__all__ = ["run_call"]


def run_call(call: ProposedCall, run_forward: RunForward) -> Tensor:
    """Return the result (T, D) of a call; its report goes to the layer that calls.

    Raises:
        What check() and agree() raise, and TransportError where an exchange fails.
    """
    kinds = check(call)
    choose_plan(call)
    planned = first = agree(call, kinds)
    if call.fillers:
        planned.fillers = _fillers(call)
    again: PlannedCall | None = planned
    with without_autocast(call.tensors.x.device):
        while again is not None:
            planned, y = again, None  # a first run, and what it keeps for a backward, are given up
            slots, planned.slots = planned.slots, None
            tensors = call.tensors if slots is None else call.tensors._replace(topk_ids=slots)
            y = planned.kind.run(planned, tensors, run_forward)
            again = planned.kind.plan_again(call, planned)
    assert y is not None
    report = planned.report
    learn(call, first.plan, report)
    if first.plan.needs_any and not is_recomputing():
        call.state.start(call.sequence, call.kind, report.overlap, planned.kind.repeated)
    if call.layer is not None:
        call.layer.last_report = report
    return y


def _fillers(call: ProposedCall) -> list[Callable[[], None]]:
    """Return the fillers, to be run in the modes of the caller: a Function's forward runs without either."""
    autocast = caller_autocast(call.tensors.x.device)
    return [partial(_run_filler, filler, call.grad_enabled, autocast) for filler in call.fillers]


def _run_filler(filler: Callable[[], None], grad_enabled: bool, autocast: Callable[[], AbstractContextManager]) -> None:
    with torch.set_grad_enabled(grad_enabled), autocast():
        filler()


def choose_plan(call: ProposedCall) -> None:
    """Note in a call the plan that it is to run: as configured, tuned, or, in a recompute, that of the forward."""
    overlap, size = call.spec.overlap, call.transport.size
    widths = buffer_widths(call.tensors, call.settings, has_backward=call.grad_enabled)
    top_k, dtypes = call.tensors.topk_ids.shape[1], (call.tensors.x.dtype, call.tensors.topk_weights.dtype)
    precision = call.spec.experts.precision
    call.kind, call.message = (call.spec.num_experts, widths, top_k, dtypes, precision, overlap), CallHeader()
    call.again = call.state.forward_to_recompute(call.kind) if is_recomputing() else None
    if isinstance(overlap, OverlapPlan):
        call.overlap = overlap
        return
    if overlap.is_auto:
        call.chooser = find_chooser(call, overlap, widths)
    if call.again is not None:
        plan, call.reason = call.again.plan, "the plan of the forward that is recomputed"
    elif call.chooser is None:
        plan = fixed_plan(overlap, 0 if overlap.num_chunks == "auto" else overlap.num_chunks, size)
        call.reason = "as configured"
    elif call.half and call.chooser.is_tuned:  # times in which another half computes say nothing of a plan
        plan = half_plan(overlap, size)
        call.reason = f"{plan}: of half a batch, whose exchanges the other half hides"
    else:
        plan = call.chooser.plan()
        if not call.is_captured:
            call.message = call.chooser.message()
    if (plan.wire_dtype, plan.capacity) != (overlap.wire_dtype, overlap.capacity):
        plan = replace(plan, wire_dtype=overlap.wire_dtype, capacity=overlap.capacity)
    if overlap.balance is not None:
        held = most_copies(overlap.max_copies, call.num_slots // call.transport.size)
        plan = replace(plan, balance=overlap.balance, max_copies=held)
    call.overlap = plan


def learn(call: ProposedCall, plan: DispatchPlan, report: LayerReport) -> None:
    """Return the call's report to the chooser of its plan, which picks later plans; plan: that of the first run."""
    chooser = call.chooser
    if call.reason:
        report.choice = call.reason
    elif chooser is not None and call.is_captured:  # it has no times, and no later call may read its events
        report.choice = chooser.choice
    elif chooser is not None:
        chooser.observe(plan.headers, report, plan.needs_any)


def find_chooser(call: ProposedCall, overlap: OverlapConfig, widths: BufferWidths) -> PlanChooser:
    """Return the transport's chooser for the call's kind."""
    device = call.tensors.x.device
    chooser = call.state.choosers.get(call.kind)
    if chooser is None:
        is_shared, can_cut_experts = call.transport.shares_link(device), call.transport.node_size is None
        chooser = PlanChooser(overlap, call.transport.size, is_shared, widths, can_cut_experts=can_cut_experts)
        call.state.choosers[call.kind] = chooser
    chooser.working_set = working_set(call.settings.ops, device)
    return chooser


def working_set(ops: Operations, device: torch.device) -> WorkingSet:
    """Return how much this rank's experts work on at a time."""
    return WorkingSet(pairs_at_a_time(ops, device), num_workers(device), ops.copies_rows())


@torch.no_grad()
def agree(call: ProposedCall, kinds: list[type[PlanKind]]) -> PlannedCall:
    """Exchange with every rank what this call is and how many rows go where, and return the planned call.

    Args:
        kinds: of plans that take the call, as check() found them.
    Raises, on every rank alike:
        CountMismatch, TransportError, NonFiniteScores, CapacityOverflow, ValueError: as exchange_plan says.
    """
    try:
        return kinds[0].plan(call, call_header(call, KIND_NAMES), kinds[1:])
    except NoLayerCall:
        call.state.uncount_call()
        raise


def call_header(call: ProposedCall, kinds: tuple[str, ...]) -> CallHeader:
    """Return what this rank says of a call to every rank, counts and nonfinite_rows apart.

    kinds: the names of the kinds of plans, in the order in which they are tried.
    """
    spec, tensors, needs, placement = call.spec, call.tensors, call.needs, call.spec.placement
    weights = tensors.weights
    ranks = [0 if of is None else of.shape[1] for of in (weights.gate_up_a, weights.down_a)]
    given = tuple([name for name, tensor in zip(NAMES, tensors.flatten(), strict=False) if tensor is not None])
    gradients = "sum" if call.layer is None else call.layer.expert_gradients
    formats = zip(("gate_up_format", "down_format"), call.settings.layer.weight_formats, strict=True)
    experts = (*spec.experts.agreed, *[(name, found) for name, found in formats if found is not None])
    if isinstance(spec.overlap, OverlapConfig) and spec.overlap.memory_budget_bytes is not None:
        experts = (*experts, ("memory_budget_bytes", spec.overlap.memory_budget_bytes))
    settings = call_settings(experts, placement, gradients, tensors.x.dtype, given, tuple(ranks), kinds, call.overlap)
    flags = () if call.is_captured else call.state.captured_flags
    is_replay_wrong = bool(flags) and replay_overflowed(call.transport, flags, tensors.x.device)
    return call.message._replace(
        sequence=call.sequence,
        layer=-1 if call.layer is None else call.layer.layer,
        copy=0 if call.layer is None else call.layer.copy,
        settings=settings,
        num_experts=call.num_slots,
        top_k=tensors.topk_ids.shape[1],
        hidden_size=tensors.x.shape[1],
        intermediate_size=call.settings.layer.intermediate_size,
        topk_weights_dtype=DTYPE_CODES.get(tensors.topk_weights.dtype, 0),
        grad_enabled=int(call.grad_enabled),
        needs_any=int(any(needs.flatten())),
        needs_x=int(needs.x),
        needs_topk_weights=int(needs.topk_weights),
        needs_weights=0 if spec.overlap.balance is None else weight_bits(needs.weights),
        wide_grads=0 if spec.overlap.balance is None else weight_bits(have_wider_main_grads(call.owners)),
        half=call.half,
        compiled=int(call.is_compiled),
        captured=int(call.is_captured),
        replay_overflowed=int(is_replay_wrong),
        replica_grads=replica_bits(placement, needs.weights),
        auto=int(isinstance(spec.overlap, OverlapConfig) and spec.overlap.is_auto),
        save=SAVES.index(spec.experts.save),
        deterministic=int(torch.are_deterministic_algorithms_enabled()),
        kept_bytes=sum(call.state.kept_bytes.values()),
        **call.state.history(),
    )
