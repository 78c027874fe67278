"""check_schedule(): whether every step of a schedule starts when all that it reads is there."""

from collections.abc import Iterator, Sequence
from enum import Enum

from tritonmoe.overlap.steps import LOCAL_END, LOCAL_START, Step, StepKind

__all__ = ["NEEDS", "check_schedule"]


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
