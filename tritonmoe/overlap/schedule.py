"""The order of a layer's steps, as pure data: the executor runs it, reports show it, nothing else orders anything.

A schedule is a tuple of Steps in issue order. A step on the compute lane runs when it is reached; a step on the comm
lane is only posted there, and ends when a later step names it in `after`. The comm lane has the same order on every
rank, since exchanges are matched by it. Forward, two chunks, local rows first (time runs to the right):

    comm     metadata | dispatch 0 | dispatch 1            | combine 0     | combine 1
    compute             group      | experts local | experts 0     | experts 1     | reduce 0 | reduce 1

Backward has the adjoint of combine first (gradients of the output go to where the experts are), and the weight
gradients after the last data gradient, so that they hide the last exchanges.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["LOCAL", "Schedule", "Step", "build_backward", "build_forward", "check_schedule"]

LOCAL = -1
"""The chunk number of the rows that never leave their rank."""

Lane = Literal["compute", "comm"]


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Kinds of a forward: metadata, dispatch, group, experts, combine, reduce. Of a backward: combine_backward,
    experts_backward, dispatch_backward, routing_backward (the exchange of the gate weights' gradients), weight_grad,
    reduce_backward, reduce_routing_backward.
    """

    kind: str
    chunk: int | None
    """Chunk number, LOCAL, or None for a step of the whole layer."""
    lane: Lane
    after: tuple[int, ...] = ()
    """Positions of the earlier steps whose results this one uses."""

    def __str__(self) -> str:
        if self.chunk is None:
            return self.kind
        return f"{self.kind} {'local' if self.chunk == LOCAL else self.chunk}"


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


def build_forward(num_chunks: int, *, local_first: bool, serial: bool) -> Schedule:
    """Give the forward's steps; serial=True waits for each exchange before anything else is started."""
    builder = _Builder()
    metadata = builder.add("metadata", None, "comm")
    dispatches = [] if serial else [builder.add("dispatch", c, "comm") for c in range(num_chunks)]
    group = builder.add("group", None, "compute", metadata)
    local = [builder.add("experts", LOCAL, "compute", group)] if local_first else []
    combines = []
    for c in range(num_chunks):
        dispatch = builder.add("dispatch", c, "comm") if serial else dispatches[c]
        experts = builder.add("experts", c, "compute", dispatch, group)
        combine = builder.add("combine", c, "comm", experts)
        if serial:
            builder.add("reduce", c, "compute", combine, *local)
        combines.append(combine)
    if not serial:
        for c, combine in enumerate(combines):
            builder.add("reduce", c, "compute", combine, *local)
    return builder.build()


def build_backward(
    num_chunks: int, *, local_first: bool, serial: bool, needs_x: bool, needs_topk_weights: bool
) -> Schedule:
    """Give the backward's steps; exchanges whose gradient no rank needs are left out."""
    builder = _Builder()
    sends = [] if serial else [builder.add("combine_backward", c, "comm") for c in range(num_chunks)]
    last = [builder.add("experts_backward", LOCAL, "compute")] if local_first else []
    returns: list[int] = []
    for c in range(num_chunks):
        send = builder.add("combine_backward", c, "comm") if serial else sends[c]
        experts = builder.add("experts_backward", c, "compute", send)
        last.append(experts)
        if needs_x:
            returns.append(builder.add("dispatch_backward", c, "comm", experts))
            if serial:
                builder.add("reduce_backward", c, "compute", returns[-1])
    routing = builder.add("routing_backward", None, "comm", *last) if needs_topk_weights else None
    if serial and routing is not None:
        builder.add("reduce_routing_backward", None, "compute", routing)
    builder.add("weight_grad", None, "compute", *last)
    if not serial:
        for c, home in enumerate(returns):
            builder.add("reduce_backward", c, "compute", home)
        if routing is not None:
            builder.add("reduce_routing_backward", None, "compute", routing)
    return builder.build()
