"""copies_offer(): what copies of hot experts for each call would gain, by the counts of recorded calls.

The planner of a layer's calls plans them, and the walk says what comes of it. A recording has the pairs of every
expert, and those from each rank to each other, but not both at once: a rank's pairs are taken to be of another's
experts in the shares in which all ranks' are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan, most_copies
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.expert_parallel.plans.copies.copy_planner import CopyCosts, is_uneven, plan_copies
from tritonmoe.overlap.schedule import Schedule
from tritonmoe.overlap.simulation.cost_model import CopyWork, LayerWork, backward_with, forward_with, gradient_parts
from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.doctor.conditions import Conditions
from tritonmoe.tools.recording.call_recording import RecordedCall

__all__ = ["copies_offer"]

PLANNING_S = 2e-3
"""What a call takes longer for being planned again, measured beside others on a CPU."""


def copies_offer(
    calls: Sequence[RecordedCall], typical: Conditions
) -> Iterator[tuple[str, str, Callable[[Conditions], Conditions]]]:
    """Yield what could be switched on, what it costs, and a call as it would be with it; nothing where it can't be.

    typical: the conditions of one of the calls.
    """
    size, slots, plan = len(calls[0].ranks), len(calls[0].ranks[0].pairs_per_expert), typical.plan
    if not slots or any(len(of.pairs_per_expert) != slots for call in calls for of in call.ranks):
        return
    is_refused = plan.capacity is not None or plan.chunk_by != "tokens" or typical.nodes is not None
    if is_refused or size == 1 or not any(is_uneven(call.work.pairs.sum(0).int().tolist()) for call in calls):
        return
    by_work = {id(call.work): call for call in calls}

    def with_copies(of: Conditions) -> Conditions:
        call = by_work.get(id(of.work))
        return of if call is None else _with_copies(of, call)

    yield (
        'copies of hot experts for each call: OverlapConfig(balance="auto")',
        f"each rank keeps up to {most_copies('auto', slots)} more experts of every layer in memory until the backward",
        with_copies,
    )


def _with_copies(of: Conditions, call: RecordedCall) -> Conditions:
    """Return a call as it would be with the copies that the planner makes for it; as it is where there are none."""
    costs = _costs(of, call)
    held = most_copies("auto", len(call.ranks[0].pairs_per_expert))
    copies = plan_copies(_counts(call), of.work.rows.long(), of.work.top_k, held, costs).copies
    if copies is None:
        return of
    first, *others = of.entries
    work = _work(of.work, copies, costs)
    return replace(
        of,
        work=work,
        steps=of.steps.with_copies(),
        schedules=tuple(_schedule(schedule, of.plan, work.copies) for schedule in of.schedules),
        entries=(replace(first, before_steps_s=first.before_steps_s + PLANNING_S), *others),
    )


def _counts(call: RecordedCall) -> Tensor:
    """Return (W, slots) int64: about how many pairs each rank's tokens have of each expert."""
    loads = torch.tensor([list(of.pairs_per_expert) for of in call.ranks], dtype=torch.float64, device="cpu")
    shares = loads / loads.sum(1, keepdim=True).clamp(min=1)
    return (call.work.pairs[:, :, None] * shares).round().long().flatten(1)


def _costs(of: Conditions, call: RecordedCall) -> CopyCosts:
    """Return what the planner is told; experts are taken to be gated, and their weights as wide as rows."""
    unit_s, work = of.steps.unit_s, of.work
    width, inner = call.sizes["hidden_size"], call.sizes["intermediate_size"]
    element_bytes = (work.other_row_bytes or work.row_bytes) // max(1, width)
    expert_bytes = 3 * width * inner * max(1, element_bytes)
    backward_s = unit_s.get(StepKind.EXPERTS_BACKWARD, 0.0) + unit_s.get(StepKind.WEIGHT_GRAD, 0.0)
    each = of.link.each_link
    byte_s = max(float(seconds.max()) for seconds in (each.port_out_s, each.port_in_s, each.link_s))
    return CopyCosts(
        forward_fs=round(unit_s.get(StepKind.EXPERTS, 0.0) * 1e15),
        backward_fs=round(backward_s * 1e15) if len(of.schedules) > 1 else 0,
        byte_fs=round(byte_s * 1e15),
        call_fs=round(PLANNING_S * 1e15),
        row_bytes=work.row_bytes,
        other_row_bytes=work.other_row_bytes or work.row_bytes,
        expert_bytes=expert_bytes,
        gradient_bytes=expert_bytes if unit_s.get(StepKind.WEIGHT_GRAD) else 0,
    )


def _work(work: LayerWork, copies: ExpertCopies, costs: CopyCosts) -> LayerWork:
    """Return what is sent and computed with copies: a pair takes its part of a row to the copy's rank."""
    rows, pairs = work.rows.clone(), work.pairs.clone()
    tokens = work.pairs.sum(1) / max(1, work.top_k)
    of_pair = work.rows / work.pairs.clamp(min=1)
    new = (1 - work.rows / tokens.clamp(min=1)[:, None]).clamp(min=0)
    for copy in copies.copies:
        owner, moved = copies.owner(copy), torch.tensor(copy.pairs, dtype=torch.float64, device="cpu")
        pairs[:, owner] -= moved
        pairs[:, copy.rank] += moved
        rows[:, owner] -= moved * of_pair[:, owner]
        rows[:, copy.rank] += moved * new[:, copy.rank]
    copied = CopyWork(
        torch.tensor(copies.sent_copies, dtype=torch.float64, device="cpu"),
        torch.tensor(copies.copy_pairs, dtype=torch.float64, device="cpu"),
        costs.expert_bytes,
        gradient_parts(costs.gradient_bytes),
        relayed=copies.relayed if copies.are_relayed else None,
    )
    return replace(work, rows=rows.clamp(min=0), pairs=pairs.clamp(min=0), copies=copied)


def _schedule(schedule: Schedule, plan: OverlapPlan, copies: CopyWork | None) -> Schedule:
    kinds = [step.kind for step in schedule]
    if StepKind.METADATA in kinds:
        return forward_with(copies, plan, kinds.count(StepKind.FILLER))
    return backward_with(copies, plan, StepKind.DISPATCH_BACKWARD in kinds, StepKind.ROUTING_BACKWARD in kinds)
