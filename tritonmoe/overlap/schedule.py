"""The order of a layer's steps, as pure data: the executor runs it, the simulator prices it, reports show it.

A schedule is a tuple of Steps in issue order. A step on the compute lane runs when it is reached; a step on the comm
lane is only posted there, and ends when a later step names it in `after`. The comm lane has the same order on every
rank, since exchanges are matched by it. Forward, two chunks, local rows at both ends (time runs to the right):

    comm     metadata | dispatch 0 | dispatch 1            | combine 0     | combine 1
    compute             group      | experts first | experts 0     | experts 1     | experts last | reduce 0 | reduce 1

All dispatches come before the first combine, unless the plan's window is smaller: then dispatch c + window is posted
when dispatch c has arrived, and combine c + window when combine c has.

Backward has the adjoint of combine first (gradients of the output go to where the experts are), and the weight
gradients after the last data gradient, so that they hide the last exchanges; there, local rows all run at the start.

On two levels these are the steps between nodes, and some of them have steps of their own inside a node: build_inside.
"""

from dataclasses import dataclass
from typing import Literal

from tritonmoe.config.overlap import LOCAL_PARTS, OverlapPlan

__all__ = [
    "INSIDE",
    "LOCAL_END",
    "LOCAL_NAMES",
    "LOCAL_START",
    "Schedule",
    "Step",
    "build_backward",
    "build_forward",
    "build_inside",
    "check_schedule",
]

LOCAL_START, LOCAL_END = -2, -1
"""The chunk numbers of the rows that never leave their rank: those that run first, and the rest."""
LOCAL_NAMES = {LOCAL_START: "local", LOCAL_END: "local end"}

INSIDE = "node_"
"""What the kinds of steps inside a node start with that have a twin between nodes."""

Lane = Literal["compute", "comm"]


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Kinds of a forward: metadata, dispatch, filler, group, experts, combine, reduce. Of a backward: combine_backward,
    experts_backward, dispatch_backward, routing_backward (the exchange of the gate weights' gradients), weight_grad,
    reduce_backward, reduce_routing_backward, replica_backward (the exchange of replicated experts' gradients) and
    reduce_replica_backward. Inside a node the same with node_ before it, but for group and experts.
    """

    kind: str
    chunk: int | None
    """Chunk number, LOCAL_START, LOCAL_END, or None for a step of the whole layer."""
    lane: Lane
    after: tuple[int, ...] = ()
    """Positions of the earlier steps whose results this one uses."""

    def __str__(self) -> str:
        if self.chunk is None:
            return self.kind
        return f"{self.kind} {LOCAL_NAMES.get(self.chunk, self.chunk)}"


Schedule = tuple[Step, ...]


class _Builder:
    def __init__(self) -> None:
        self.steps: list[Step] = []

    def add(self, kind: str, chunk: int | None, lane: Lane, *after: int) -> int:
        self.steps.append(Step(kind, chunk, lane, after))
        return len(self.steps) - 1

    def build(self) -> Schedule:
        schedule = tuple(self.steps)
        check_schedule(schedule)
        return schedule


def check_schedule(schedule: Schedule) -> None:
    """Raise ValueError unless every step comes after what it needs and every exchange is waited for."""
    waited = set()
    for position, step in enumerate(schedule):
        for earlier in step.after:
            if not 0 <= earlier < position:
                raise ValueError(f"step {position} ({step}) needs step {earlier}, which does not come before it")
            waited.add(earlier)
    for position, step in enumerate(schedule):
        if step.lane == "comm" and position not in waited:
            raise ValueError(f"no step waits for the exchange of step {position} ({step})")


def local_slices(plan: OverlapPlan) -> list[int]:
    """Give the local slices that have a share of the rows."""
    if not plan.local_first:
        return []
    return [LOCAL_START] * (plan.local_start > 0) + [LOCAL_END] * (plan.local_start < LOCAL_PARTS)


def build_forward(plan: OverlapPlan, num_fillers: int = 0) -> Schedule:
    """Give the forward's steps; a serial plan waits for each exchange before anything else is started.

    num_fillers: work of the caller's that needs no exchange: the first one runs under the first dispatch, a second one
        under the last combine.
    """
    builder = _Builder()
    num_chunks, window = plan.num_chunks, 0 if plan.serial else plan.window
    metadata = builder.add("metadata", None, "comm")
    dispatches = [builder.add("dispatch", c, "comm") for c in range(min(window, num_chunks))]
    if num_fillers > 0:
        builder.add("filler", 0, "compute")
    group = builder.add("group", None, "compute", metadata)
    slices = local_slices(plan)
    local = [builder.add("experts", c, "compute", group) for c in slices if plan.serial or c == LOCAL_START]
    combines: list[int] = []
    for c in range(num_chunks):
        if plan.serial:
            dispatches.append(builder.add("dispatch", c, "comm"))
        elif c + window < num_chunks:
            dispatches.append(builder.add("dispatch", c + window, "comm", dispatches[c]))
        experts = builder.add("experts", c, "compute", dispatches[c], group)
        earlier = combines[c - window : c - window + 1] if 0 < window <= c else []
        combines.append(builder.add("combine", c, "comm", experts, *earlier))
        if plan.serial:
            builder.add("reduce", c, "compute", combines[c], *local)
    if num_fillers > 1:
        builder.add("filler", 1, "compute")
    if not plan.serial:
        local += [builder.add("experts", c, "compute", group) for c in slices if c == LOCAL_END]
        for c, combine in enumerate(combines):
            builder.add("reduce", c, "compute", combine, *local)
    return builder.build()


def build_backward(
    plan: OverlapPlan, *, needs_x: bool, needs_topk_weights: bool, sums_replicas: bool = False
) -> Schedule:
    """Give the backward's steps; exchanges whose gradient no rank needs are left out."""
    builder = _Builder()
    num_chunks, window = plan.num_chunks, 0 if plan.serial else plan.backward_window
    sends = [builder.add("combine_backward", c, "comm") for c in range(min(window, num_chunks))]
    computed = [builder.add("experts_backward", c, "compute") for c in local_slices(plan)]
    returns: list[int] = []
    for c in range(num_chunks):
        if plan.serial:
            sends.append(builder.add("combine_backward", c, "comm"))
        elif c + window < num_chunks:
            sends.append(builder.add("combine_backward", c + window, "comm", sends[c]))
        experts = builder.add("experts_backward", c, "compute", sends[c])
        computed.append(experts)
        if needs_x:
            earlier = returns[c - window : c - window + 1] if 0 < window <= c else []
            returns.append(builder.add("dispatch_backward", c, "comm", experts, *earlier))
            if plan.serial:
                builder.add("reduce_backward", c, "compute", returns[c])
    routing = builder.add("routing_backward", None, "comm", *computed) if needs_topk_weights else None
    if plan.serial and routing is not None:
        builder.add("reduce_routing_backward", None, "compute", routing)
    weight_grad = builder.add("weight_grad", None, "compute", *computed)
    replicas = builder.add("replica_backward", None, "comm", weight_grad) if sums_replicas else None
    if not plan.serial:
        for c, home in enumerate(returns):
            builder.add("reduce_backward", c, "compute", home)
        if routing is not None:
            builder.add("reduce_routing_backward", None, "compute", routing)
    if replicas is not None:
        builder.add("reduce_replica_backward", None, "compute", replicas)
    return builder.build()


def build_inside(step: Step, *, needs_x: bool) -> Schedule:
    """Give what a step of two levels does inside a node, where every exchange is waited for at once; () if nothing."""
    builder, c = _Builder(), step.chunk
    if step.kind == "group":
        builder.add("group", None, "compute", builder.add("node_metadata", None, "comm"))
    elif step.kind == "experts":
        experts = builder.add("experts", c, "compute", builder.add("node_dispatch", c, "comm"))
        builder.add("node_reduce", c, "compute", builder.add("node_combine", c, "comm", experts))
    elif step.kind == "experts_backward":
        experts = builder.add("experts_backward", c, "compute", builder.add("node_combine_backward", c, "comm"))
        if needs_x:
            home = builder.add("node_dispatch_backward", c, "comm", experts)
            builder.add("node_reduce_backward", c, "compute", home)
        routing = builder.add("node_routing_backward", c, "comm", experts)
        builder.add("node_reduce_routing_backward", c, "compute", routing)
    return builder.build()
