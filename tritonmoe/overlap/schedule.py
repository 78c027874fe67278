"""The order of a layer's steps, as pure data: the executor runs it, the simulator prices it, reports show it.

A schedule is a tuple of Steps in issue order. A step on the compute lane runs when it is reached; a step on the comm
lane is only posted there, and ends when a later step names it in `after`. The comm lane has the same order on every
rank, since exchanges are matched by it. This is a forward of two chunks with local rows at both ends (time runs to the
right):

    comm     metadata | dispatch 0 | dispatch 1            | combine 0     | combine 1
    compute             group      | experts first | experts 0     | experts 1     | experts last | reduce 0 | reduce 1

All dispatches come before the first combine, unless the plan's window is smaller: then dispatch c + window is posted
when dispatch c has arrived, and combine c + window when combine c has.

A backward starts with the adjoint of combine, which sends the gradients of the output to where the experts are. Its
weight gradients come after the last data gradient, so that they hide the last exchanges; its local rows all run at the
start.

On two levels these are the steps between nodes; build_inside gives those that some of them have inside a node.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from functools import lru_cache

from tritonmoe.config.overlap import LOCAL_PARTS, OverlapPlan
from tritonmoe.overlap.steps import LOCAL_END, LOCAL_START, Step, StepKind

__all__ = ["Schedule", "build_backward", "build_fetch", "build_forward", "build_inside", "check_schedule", "phase_ends"]

Schedule = tuple[Step, ...]

KEPT_SCHEDULES = 256
"""So many schedules of each function are kept, since a layer's plan is the same from call to call."""


class _Builder:
    """Collects steps; a step's position is what later ones name in `after`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def add(self, kind: StepKind, chunk: int | None, *after: int) -> int:
        self.steps.append(Step(kind, chunk, after))
        return len(self.steps) - 1

    def build(self) -> Schedule:
        schedule = tuple(self.steps)
        check_schedule(schedule)
        return schedule


def local_slices(plan: OverlapPlan) -> list[int]:
    """Return the local slices that have a share of the rows."""
    if not plan.local_first:
        return []
    return [LOCAL_START] * (plan.local_start > 0) + [LOCAL_END] * (plan.local_start < LOCAL_PARTS)


@lru_cache(maxsize=KEPT_SCHEDULES)
def build_forward(
    plan: OverlapPlan, num_fillers: int = 0, *, has_copies: bool = False, relays_copies: bool = False
) -> Schedule:
    """Return the forward's steps; a serial plan waits for each exchange before anything else is started.

    Args:
        num_fillers: how much work there is of the caller's that needs no exchange: the first one runs under the first
            dispatch, a second one under the last combine.
        has_copies: whether experts have copies, whose weights then travel behind the first dispatch; own experts of a
            chunk are computed meanwhile, and then its copies. relays_copies: whether ranks pass pieces of them on to
            each other, before the other dispatches.
    """
    builder = _Builder()
    num_chunks, window = plan.num_chunks, 0 if plan.serial else plan.window
    metadata = builder.add(StepKind.METADATA, None)
    dispatches = [builder.add(StepKind.DISPATCH, c) for c in range(min(window, num_chunks, 1))]
    copies = _add_copies(builder, False) if has_copies and not plan.serial else ()
    if not relays_copies:
        dispatches += [builder.add(StepKind.DISPATCH, c) for c in range(1, min(window, num_chunks))]
    if num_fillers > 0:
        builder.add(StepKind.FILLER, 0)
    group = builder.add(StepKind.GROUP, None, metadata)
    if plan.serial and has_copies:
        copies = _add_copies(builder, relays_copies)
    at_start = (group, *copies) if plan.serial else (group,)
    slices = local_slices(plan)
    local = [builder.add(StepKind.EXPERTS, c, *at_start) for c in slices if plan.serial or c == LOCAL_START]
    if plan.serial and has_copies:
        local = _add_copies_of_local(builder, StepKind.COPY_EXPERTS, local, copies)
    if relays_copies and not plan.serial:
        copies = (*copies, builder.add(StepKind.SPREAD_COPIES, None, *copies))
        dispatches += [builder.add(StepKind.DISPATCH, c) for c in range(1, min(window, num_chunks))]
    combines: list[int] = []
    for c in range(num_chunks):
        if plan.serial:
            dispatches.append(builder.add(StepKind.DISPATCH, c, *copies))
        elif c + window < num_chunks:
            dispatches.append(builder.add(StepKind.DISPATCH, c + window, dispatches[c]))
        experts = builder.add(StepKind.EXPERTS, c, dispatches[c], group)
        if has_copies:
            experts = builder.add(StepKind.COPY_EXPERTS, c, experts, *copies)
        earlier = combines[c - window : c - window + 1] if 0 < window <= c else []
        combines.append(builder.add(StepKind.COMBINE, c, experts, *earlier))
        if plan.serial:
            builder.add(StepKind.REDUCE, c, combines[c], *local)
    if num_fillers > 1:
        builder.add(StepKind.FILLER, 1)
    if not plan.serial:
        local += [builder.add(StepKind.EXPERTS, c, group) for c in slices if c == LOCAL_END]
        local = _add_copies_of_local(builder, StepKind.COPY_EXPERTS, local, copies) if has_copies else local
        for c, combine in enumerate(combines):
            builder.add(StepKind.REDUCE, c, combine, *local)
    return builder.build()


@lru_cache(maxsize=KEPT_SCHEDULES)
def build_fetch(plan: OverlapPlan) -> Schedule:
    """Return the steps that bring the received rows once more, before a backward whose forward kept none."""
    builder = _Builder()
    metadata = builder.add(StepKind.METADATA, None)
    dispatches = [builder.add(StepKind.DISPATCH, c) for c in range(plan.num_chunks)]
    builder.add(StepKind.GROUP, None, metadata, *dispatches)
    return builder.build()


@lru_cache(maxsize=KEPT_SCHEDULES)
def build_backward(
    plan: OverlapPlan,
    *,
    needs_x: bool,
    needs_topk_weights: bool,
    sums_replicas: bool = False,
    has_copies: bool = False,
    sends_copies: bool = False,
    relays_copies: bool = False,
    returned_copies: tuple[int, ...] = (),
) -> Schedule:
    """Return the backward's steps; exchanges whose gradient no rank needs are left out.

    Args:
        has_copies, relays_copies: as in build_forward. sends_copies: whether the weights of copies travel once more.
        returned_copies: which parts of their gradients go home; one travels while the next one is computed.
    """
    builder = _Builder()
    num_chunks, window = plan.num_chunks, 0 if plan.serial else plan.backward_window
    sends = [builder.add(StepKind.COMBINE_BACKWARD, c) for c in range(min(window, num_chunks))]
    copies = _add_copies(builder, relays_copies) if sends_copies else ()
    local = [builder.add(StepKind.EXPERTS_BACKWARD, c, *copies * plan.serial) for c in local_slices(plan)]
    waits_for_copies = sends_copies and not plan.serial
    if has_copies and not waits_for_copies:
        local = _add_copies_of_local(builder, StepKind.COPY_EXPERTS_BACKWARD, local, copies)
    computed: list[int] = []
    returns: list[int] = []
    for c in range(num_chunks):
        if plan.serial:
            sends.append(builder.add(StepKind.COMBINE_BACKWARD, c, *copies))
        elif c + window < num_chunks:
            sends.append(builder.add(StepKind.COMBINE_BACKWARD, c + window, sends[c]))
        experts = builder.add(StepKind.EXPERTS_BACKWARD, c, sends[c])
        if has_copies:
            experts = builder.add(StepKind.COPY_EXPERTS_BACKWARD, c, experts, *copies)
        computed.append(experts)
        if needs_x:
            earlier = returns[c - window : c - window + 1] if 0 < window <= c else []
            returns.append(builder.add(StepKind.DISPATCH_BACKWARD, c, experts, *earlier))
            if plan.serial:
                builder.add(StepKind.REDUCE_BACKWARD, c, returns[c])
    if waits_for_copies:
        local = _add_copies_of_local(builder, StepKind.COPY_EXPERTS_BACKWARD, local, copies)
    computed += local
    routing = builder.add(StepKind.ROUTING_BACKWARD, None, *computed) if needs_topk_weights else None
    if plan.serial and routing is not None:
        builder.add(StepKind.REDUCE_ROUTING_BACKWARD, None, routing)
    copies_home = [] if plan.serial else _return_copies(builder, returned_copies, computed)
    weight_grad = builder.add(StepKind.WEIGHT_GRAD, None, *computed)
    replicas = builder.add(StepKind.REPLICA_BACKWARD, None, weight_grad) if sums_replicas else None
    if not plan.serial:
        for c, home in enumerate(returns):
            builder.add(StepKind.REDUCE_BACKWARD, c, home)
        if routing is not None:
            builder.add(StepKind.REDUCE_ROUTING_BACKWARD, None, routing)
    if replicas is not None:
        builder.add(StepKind.REDUCE_REPLICA_BACKWARD, None, replicas)
    for number, part in enumerate(returned_copies):
        home = _return_copies(builder, (part,), computed)[0] if plan.serial else copies_home[number]
        builder.add(StepKind.REDUCE_COPIES_BACKWARD, part, home, weight_grad)
    return builder.build()


def _add_copies(builder: _Builder, relays_copies: bool) -> tuple[int, ...]:
    """Add the way of copies' weights, one exchange right behind the other, and give the positions of both."""
    copies = builder.add(StepKind.COPIES, None)
    return (copies, builder.add(StepKind.SPREAD_COPIES, None, copies)) if relays_copies else (copies,)


def _add_copies_of_local(builder: _Builder, kind: StepKind, local: list[int], copies: tuple[int, ...]) -> list[int]:
    """Add what copies compute of local rows, and give its positions; local: those of what own experts do."""
    return [builder.add(kind, builder.steps[own].chunk, own, *copies) for own in local]


def _return_copies(builder: _Builder, parts: tuple[int, ...], computed: list[int]) -> list[int]:
    """Add parts of the gradients of copies, and their way to the owners, and give the positions of the exchanges."""
    return [
        builder.add(StepKind.COPIES_BACKWARD, part, builder.add(StepKind.COPY_WEIGHT_GRAD, part, *computed))
        for part in parts
    ]


@lru_cache(maxsize=KEPT_SCHEDULES)
def build_inside(step: Step, *, needs_x: bool) -> Schedule:
    """Return what a step of two levels does inside a node, where each exchange is waited for at once; () if nothing."""
    builder, c = _Builder(), step.chunk
    if step.kind is StepKind.GROUP:
        builder.add(StepKind.GROUP, None, builder.add(StepKind.NODE_METADATA, None))
    elif step.kind is StepKind.EXPERTS:
        experts = builder.add(StepKind.EXPERTS, c, builder.add(StepKind.NODE_DISPATCH, c))
        builder.add(StepKind.NODE_REDUCE, c, builder.add(StepKind.NODE_COMBINE, c, experts))
    elif step.kind is StepKind.EXPERTS_BACKWARD:
        experts = builder.add(StepKind.EXPERTS_BACKWARD, c, builder.add(StepKind.NODE_COMBINE_BACKWARD, c))
        if needs_x:
            home = builder.add(StepKind.NODE_DISPATCH_BACKWARD, c, experts)
            builder.add(StepKind.NODE_REDUCE_BACKWARD, c, home)
        routing = builder.add(StepKind.NODE_ROUTING_BACKWARD, c, experts)
        builder.add(StepKind.NODE_REDUCE_ROUTING_BACKWARD, c, routing)
    return builder.build()


def phase_ends(schedule: Schedule) -> tuple[int, int]:
    """Return the positions behind the first and the second of a pass's three phases, where other work may run.

    The first posts the exchanges that need no other step, and runs what a caller gave to run under them; the second
    computes and posts all others; the third are the sums that end the schedule, of what the last exchanges bring.
    """
    first = 0
    while first < len(schedule) and (schedule[first].lane == "comm" or schedule[first].kind is StepKind.FILLER):
        first += 1
    last = len(schedule)
    while last > first and schedule[last - 1].kind.is_sum_of_returned:
        last -= 1
    return first, last


class _Of(Enum):
    """Which steps of a kind must have ended before a step of another kind may start."""

    CHUNKS_IF_ANY = "the step of the same chunk and those of all earlier chunks, if the schedule has that kind of step"
    CHUNKS_SO_FAR = "the step of the same chunk, which the schedule must contain, and the steps of all earlier chunks"
    LOCAL_ROWS = "those of local rows"
    ALL = "every one"


NEEDS: dict[StepKind, tuple[tuple[StepKind, _Of], ...]] = {
    StepKind.GROUP: ((StepKind.METADATA, _Of.CHUNKS_SO_FAR),),
    StepKind.EXPERTS: (
        (StepKind.GROUP, _Of.ALL),
        (StepKind.DISPATCH, _Of.CHUNKS_SO_FAR),
        (StepKind.EXPERTS, _Of.CHUNKS_SO_FAR),
    ),
    StepKind.COPY_EXPERTS: (
        (StepKind.EXPERTS, _Of.CHUNKS_SO_FAR),
        (StepKind.COPIES, _Of.ALL),
        (StepKind.SPREAD_COPIES, _Of.ALL),
    ),
    StepKind.SPREAD_COPIES: ((StepKind.COPIES, _Of.ALL),),
    StepKind.COMBINE: ((StepKind.EXPERTS, _Of.CHUNKS_SO_FAR), (StepKind.COPY_EXPERTS, _Of.CHUNKS_IF_ANY)),
    StepKind.REDUCE: (
        (StepKind.COMBINE, _Of.CHUNKS_SO_FAR),
        (StepKind.EXPERTS, _Of.LOCAL_ROWS),
        (StepKind.COPY_EXPERTS, _Of.LOCAL_ROWS),
    ),
    StepKind.EXPERTS_BACKWARD: (
        (StepKind.COMBINE_BACKWARD, _Of.CHUNKS_SO_FAR),
        (StepKind.EXPERTS_BACKWARD, _Of.CHUNKS_SO_FAR),
    ),
    StepKind.COPY_EXPERTS_BACKWARD: (
        (StepKind.EXPERTS_BACKWARD, _Of.CHUNKS_SO_FAR),
        (StepKind.COPIES, _Of.ALL),
        (StepKind.SPREAD_COPIES, _Of.ALL),
    ),
    StepKind.DISPATCH_BACKWARD: (
        (StepKind.EXPERTS_BACKWARD, _Of.CHUNKS_SO_FAR),
        (StepKind.COPY_EXPERTS_BACKWARD, _Of.CHUNKS_IF_ANY),
    ),
    StepKind.REDUCE_BACKWARD: (
        (StepKind.DISPATCH_BACKWARD, _Of.CHUNKS_SO_FAR),
        (StepKind.EXPERTS_BACKWARD, _Of.LOCAL_ROWS),
        (StepKind.COPY_EXPERTS_BACKWARD, _Of.LOCAL_ROWS),
    ),
    StepKind.ROUTING_BACKWARD: ((StepKind.EXPERTS_BACKWARD, _Of.ALL), (StepKind.COPY_EXPERTS_BACKWARD, _Of.ALL)),
    StepKind.REDUCE_ROUTING_BACKWARD: ((StepKind.ROUTING_BACKWARD, _Of.CHUNKS_SO_FAR),),
    StepKind.WEIGHT_GRAD: ((StepKind.EXPERTS_BACKWARD, _Of.ALL),),
    StepKind.REPLICA_BACKWARD: ((StepKind.WEIGHT_GRAD, _Of.CHUNKS_SO_FAR),),
    StepKind.REDUCE_REPLICA_BACKWARD: ((StepKind.REPLICA_BACKWARD, _Of.CHUNKS_SO_FAR),),
    StepKind.COPY_WEIGHT_GRAD: ((StepKind.COPY_EXPERTS_BACKWARD, _Of.ALL),),
    StepKind.COPIES_BACKWARD: ((StepKind.COPY_WEIGHT_GRAD, _Of.CHUNKS_SO_FAR),),
    StepKind.REDUCE_COPIES_BACKWARD: ((StepKind.COPIES_BACKWARD, _Of.CHUNKS_SO_FAR), (StepKind.WEIGHT_GRAD, _Of.ALL)),
}
"""The steps whose results a step of each kind reads. With chunks of experts a row travels with the first chunk that
needs it, is computed by several chunks, and returns with the last: so a chunk needs the chunks before it too. Chunks
of tokens would not, but are held to the same order. A kind inside a node needs what its twin between nodes does."""


def check_schedule(schedule: Sequence[Step]) -> None:
    """Raise ValueError unless every step starts when all that it reads is there, and every exchange is waited for.

    What a step names in `after` must come before it. Beyond that, no order may read what is not there yet: see NEEDS.
    """
    waited_at: dict[int, int] = {}
    for position, step in enumerate(schedule):
        for earlier in step.after:
            if not 0 <= earlier < position:
                raise ValueError(f"step {position} ({step}) needs step {earlier}, which does not come before it")
            waited_at.setdefault(earlier, position)
    for position, step in enumerate(schedule):
        if step.lane == "comm" and position not in waited_at:
            raise ValueError(f"no step waits for the exchange of step {position} ({step})")
    _check_needs(schedule, waited_at)


def _check_needs(schedule: Sequence[Step], waited_at: dict[int, int]) -> None:
    """Raise ValueError where a step starts before what it reads has ended: an exchange ends where it is waited for."""
    positions = {(step.kind.twin, step.chunk): position for position, step in enumerate(schedule)}
    if len(positions) < len(schedule):
        raise ValueError(f"a step stands twice in {', '.join(map(str, schedule))}")
    chunks: dict[StepKind, set[int | None]] = {}
    for kind, chunk in positions:
        chunks.setdefault(kind, set()).add(chunk)
    for position, step in enumerate(schedule):
        for needed in _needed_by(step, positions, chunks):
            if needed >= position:
                name = f"step {needed} ({schedule[needed]})"
                raise ValueError(f"step {position} ({step}) reads what {name} gives, which does not come before it")
            if schedule[needed].lane == "comm" and waited_at[needed] > position:
                name = f"step {needed} ({schedule[needed]})"
                raise ValueError(f"step {position} ({step}) reads what {name} brings, and does not wait for it")


def _needed_by(
    step: Step, positions: dict[tuple[StepKind, int | None], int], chunks: dict[StepKind, set[int | None]]
) -> Iterator[int]:
    """Yield the positions of the steps whose results a step reads; ValueError where its own chunk's is missing.

    Args:
        chunks: those that each kind of step has a step for.
    """
    own = positions[step.kind.twin, step.chunk]
    for kind, which in NEEDS.get(step.kind.twin, ()):
        there = chunks.get(kind, set())
        is_local = step.chunk is not None and step.chunk < 0
        must_be_there = which is _Of.CHUNKS_SO_FAR or (which is _Of.CHUNKS_IF_ANY and there)
        if must_be_there and step.chunk not in there and not is_local:
            raise ValueError(f"{step} reads what {Step(kind, step.chunk)} gives, which is not in the schedule")
        found = (positions[kind, chunk] for chunk in _chunks_needed(which, step.chunk, there))
        yield from (position for position in found if position != own)


def _chunks_needed(which: _Of, own: int | None, there: set[int | None]) -> set[int | None]:
    """Return those of the chunks that are `there` whose steps must have ended before the step of chunk `own` starts."""
    if which is _Of.ALL:
        return there
    if which is _Of.LOCAL_ROWS:
        return there & {LOCAL_START, LOCAL_END}
    if own is None or own < 0:  # the whole layer, or rows that have come with no chunk
        return there & {own}
    return {chunk for chunk in there if chunk is not None and 0 <= chunk <= own}
