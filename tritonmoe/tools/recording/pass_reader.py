"""read_pass: a pass of one rank's call as its line has it, all numbers of which are looked at."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import TypeAlias

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.report import CallMarks
from tritonmoe.overlap.schedule import Schedule
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.tools.recording.call_recording import RecordedPass
from tritonmoe.tools.recording.json_fields import (
    MOST,
    Fields,
    amount,
    integer,
    list_of,
    number,
    optional,
    text,
    tuple_of,
)
from tritonmoe.tools.recording.pass_steps import TIMES, Layout, PassSteps, StepColumns, layout_of
from tritonmoe.tools.recording.schedules import inside_of, schedule_of

__all__ = ["NEAR_S", "read_pass"]

NEAR_S = 0.01
"""By so little the times of a step may lie outside of their pass: a device's are of another clock than the host's."""
NO_STEPS = layout_of((), (), 1)
_KINDS = frozenset(kind.value for kind in StepKind)
_values = itemgetter("kind", "chunk", "arrivals_s", *TIMES)


def read_pass(
    fields: Fields, plan: OverlapPlan, size: int, node_size: int | None, columns: StepColumns
) -> RecordedPass:
    """Read a pass of a call by this plan, whose steps are added to the columns.

    Raises:
        ValueError: a number is missing, or can't be; the message names the line and the key.
    """
    total_s = fields.take("total_s", amount)
    num_peers = size if node_size is None else size // node_size
    steps = fields.take("steps", lambda values: _read_steps(values, total_s, num_peers, columns))
    inside = columns.add(NO_STEPS, (), ())
    if node_size is not None:
        inside = fields.take("steps_inside", lambda values: _read_steps(values, total_s, node_size, columns))
    if not _follow(plan, steps.layout, inside.layout):
        schedule = schedule_of(plan, steps.layout.kinds)
        if node_size is not None:
            _check_steps(inside.layout, inside_of(schedule), f"{fields.where}: steps_inside")
        _check_steps(steps.layout, schedule, f"{fields.where}: steps")
    marks = fields.take("marks", optional(_marks))
    return RecordedPass(marks, fields.take("origin", number), total_s, steps, inside)


def _marks(values: object) -> CallMarks:
    of = Fields(values, "marks")
    return CallMarks(*(of.take(name, number) for name in CallMarks._fields))


def _read_steps(values: object, total_s: float, num_peers: int, columns: StepColumns) -> PassSteps:
    found = list_of(values, None)
    try:
        kinds, chunks, arrivals, *times = zip(*map(_values, found), strict=True)
    except (KeyError, TypeError, ValueError):
        return _one_by_one(found, total_s, num_peers, columns)
    known = [moments for moments in arrivals if moments is not None]
    are_sound = (
        set(map(type, kinds)) == {str}
        and set(map(type, chunks)) <= {int, type(None)}
        and _are_times(times, total_s)
        and _are_moments(known, total_s, num_peers)
    )
    are_known = are_sound and _KINDS.issuperset(kinds)
    if not are_known:
        return _one_by_one(found, total_s, num_peers, columns)
    layout = _layout(kinds, chunks, tuple(moments is not None for moments in arrivals), num_peers)
    return columns.add(layout, list(zip(*times, strict=True)), known)


def _are_times(times: Sequence[tuple], total_s: float) -> bool:
    """Return whether columns hold floats that can be times of a pass of this length."""
    flat = list(chain.from_iterable(times))
    if set(map(type, flat)) != {float} or not math.isfinite(sum(flat)):
        return False
    starts, ends, waits, posts, units = times
    latest_s = total_s + NEAR_S
    posted = [start_s + post_s for start_s, post_s in zip(starts, posts, strict=True)]
    return (
        min(*waits, *posts, *units) >= 0
        and max(units) <= MOST
        and min(*starts, *ends) >= -NEAR_S
        and max(*posted, *ends, *waits) <= latest_s
        and not any(end_s < start_s - NEAR_S for start_s, end_s in zip(starts, ends, strict=True))
    )


def _are_moments(arrivals: Sequence[object], total_s: float, num_peers: int) -> bool:
    """Return whether lists hold for every peer a float that is a moment within a pass of this length, or None."""
    if not all(type(moments) is list and len(moments) == num_peers for moments in arrivals):
        return False
    flat: list = list(chain.from_iterable(arrivals))  # type: ignore[arg-type]  # they are lists
    if not set(map(type, flat)) <= {float, type(None)}:
        return False
    known = [moment for moment in flat if moment is not None]
    return not known or (math.isfinite(sum(known)) and min(known) >= -NEAR_S and max(known) <= total_s + NEAR_S)


def _one_by_one(values: list, total_s: float, num_peers: int, columns: StepColumns) -> PassSteps:
    """Read steps of which a number is no float, or wrong: the error names it."""
    moments_of = optional(tuple_of(optional(number), num_peers))
    read = [_read_step(one, total_s, moments_of) for one in values]
    arrivals = [moments for _, _, moments in read]
    tell_arrivals = tuple(moments is not None for moments in arrivals)
    layout = layout_of(tuple(step for step, _, _ in read), tell_arrivals, num_peers)
    return columns.add(
        layout, [times for _, times, _ in read], [moments for moments in arrivals if moments is not None]
    )


_Moments: TypeAlias = tuple[float | None, ...] | None


def _read_step(
    values: object, total_s: float, moments_of: Callable[[object], _Moments]
) -> tuple[Step, tuple[float, ...], _Moments]:
    of = Fields(values, "a step")
    start_s, end_s = (of.take(name, number) for name in TIMES[:2])
    wait_s, post_s, units = (of.take(name, amount) for name in TIMES[2:])
    arrivals_s = of.take("arrivals_s", moments_of)
    chunk = of.take("chunk", optional(integer))
    which = of.take("kind", lambda kind: _step(text(kind), chunk))
    moments = [start_s, start_s + post_s, end_s, wait_s, *(at for at in arrivals_s or () if at is not None)]
    is_inside = min(moments) >= -NEAR_S and max(moments) <= total_s + NEAR_S
    if not is_inside or end_s < start_s - NEAR_S:
        raise ValueError(f"{which}: these are no times of a pass that takes {total_s} s: {moments}")
    return which, (start_s, end_s, wait_s, post_s, units), arrivals_s


@lru_cache(maxsize=1024)
def _step(kind: str, chunk: int | None) -> Step:
    return Step(StepKind.named(kind), chunk)


@lru_cache(maxsize=1024)
def _layout(
    kinds: tuple[str, ...], chunks: tuple[int | None, ...], tell_arrivals: tuple[bool, ...], num_peers: int
) -> Layout:
    return layout_of(tuple(map(_step, kinds, chunks)), tell_arrivals, num_peers)


@lru_cache(maxsize=1024)
def _follow(plan: OverlapPlan, steps: Layout, inside: Layout) -> bool:
    """Return whether a pass has the steps of its plan's schedule, each once."""
    schedule = schedule_of(plan, steps.kinds)
    expected = inside_of(schedule) if inside is not NO_STEPS else ()
    return _named(steps.steps) == _named(schedule) and _named(inside.steps) == _named(expected)


def _check_steps(found: Layout, expected: Schedule, where: str) -> None:
    if _named(found.steps) != _named(expected):
        there, due = (", ".join(map(str, of)) for of in (found.steps, expected))
        raise ValueError(f"{where}: the plan has the steps {due}, and here are {there}")


def _named(steps: Sequence[Step]) -> list[tuple[StepKind, int | None]]:
    return [(step.kind, step.chunk) for step in steps]
