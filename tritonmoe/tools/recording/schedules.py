"""schedule_of: which schedule a recorded pass ran, as its plan and the kinds of its steps tell."""

from collections.abc import Sequence
from dataclasses import replace

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import Schedule, build_backward, build_fetch, build_forward, build_inside
from tritonmoe.overlap.steps import StepKind

__all__ = ["inside_of", "schedule_of"]


def schedule_of(plan: OverlapPlan, kinds: Sequence[StepKind]) -> Schedule:
    """Return the schedule of a pass that has steps of these kinds."""
    if StepKind.EXPERTS in kinds:
        return build_forward(
            plan,
            kinds.count(StepKind.FILLER),
            has_copies=StepKind.COPIES in kinds,
            relays_copies=StepKind.SPREAD_COPIES in kinds,
        )
    fetch = build_fetch(plan) if StepKind.METADATA in kinds else ()
    backward = build_backward(
        plan,
        needs_x=StepKind.DISPATCH_BACKWARD in kinds,
        needs_topk_weights=StepKind.ROUTING_BACKWARD in kinds,
        sums_replicas=StepKind.REPLICA_BACKWARD in kinds,
    )
    return fetch + tuple(replace(step, after=tuple(place + len(fetch) for place in step.after)) for step in backward)


def inside_of(schedule: Schedule) -> Schedule:
    """Return what the steps of a pass on two levels do inside a node, in their order."""
    needs_x = any(step.kind is StepKind.DISPATCH_BACKWARD for step in schedule)
    return tuple(inside for step in schedule for inside in build_inside(step, needs_x=needs_x))
