"""read_rank_file: one rank's file of a recording, read line by line; each error names the line and the key."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TypeAlias, TypeVar

from tritonmoe.config.numbers import is_integer, is_number
from tritonmoe.config.overlap import WIRE_DTYPES, OverlapPlan
from tritonmoe.dispatch.count_exchange import CallMarks
from tritonmoe.overlap.schedule import Schedule
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.runtime.files import Json, check_regular, load_json
from tritonmoe.tools.recording.call_recording import CALLS_WITH_COPIES, FORMAT, SCHEMA, RankCall, RecordedPass
from tritonmoe.tools.recording.pass_steps import TIMES, Layout, PassSteps, StepColumns, layout_of
from tritonmoe.tools.recording.rank_columns import Agreed, CallLine, RankColumns
from tritonmoe.tools.recording.schedules import inside_of, schedule_of

__all__ = ["read_rank_file"]

MOST = 1 << 53
"""No count and no moment is larger than the integers that a float holds exactly."""
Value = TypeVar("Value")


class Fields:
    """An object of JSON whose values are checked where they are taken; errors name the place and the key."""

    def __init__(self, values: object, where: str) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise ValueError(f"{where} must be an object, got {type(values).__name__}")
        self.values: Json = values

    def take(self, key: str, convert: Callable[[object], Value]) -> Value:
        """Return a value as `convert` makes it, which raises ValueError or TypeError for one that doesn't fit."""
        if key not in self.values:
            raise ValueError(f"{self.where}: {key} is missing")
        try:
            return convert(self.values[key])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.where}: {key}: {error}") from error

    def inside(self, key: str) -> "Fields":
        return self.take(key, lambda value: Fields(value, f"{self.where}: {key}"))


def integer(value: object) -> int:
    if not is_integer(value) or abs(value) > MOST:
        raise ValueError(f"must be a whole number, got {value!r}")
    return value


def count(value: object) -> int:
    found = integer(value)
    if found < 0:
        raise ValueError(f"must not be negative, got {value!r}")
    return found


def number(value: object) -> float:
    if not is_number(value) or abs(value) > MOST:  # type: ignore[arg-type]  # is_number knows it
        raise ValueError(f"must be a finite number, got {value!r}")
    return float(value)  # type: ignore[arg-type]  # as above


def amount(value: object) -> float:
    found = number(value)
    if found < 0:
        raise ValueError(f"must not be negative, got {value!r}")
    return found


def text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"must be words that can be printed, got {value!r}")
    return value


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


def optional(convert: Callable[[object], Value]) -> Callable[[object], Value | None]:
    return lambda value: None if value is None else convert(value)


def tuple_of(convert: Callable[[object], Value], length: int | None = None) -> Callable[[object], tuple[Value, ...]]:
    def converted(values: object) -> tuple[Value, ...]:
        return tuple(map(convert, list_of(values, length)))

    return converted


def list_of(values: object, length: int | None) -> list:
    if not isinstance(values, list) or length not in (None, len(values)):
        raise ValueError(f"must be a list{'' if length is None else f' of {length}'}, got {str(values)[:60]}")
    return values


def counts_of(length: int | None = None) -> Callable[[object], Sequence[int]]:
    """Return tuple_of(count, length), which looks at all numbers at once where nothing is wrong with them."""

    def converted(values: object) -> Sequence[int]:
        found = list_of(values, length)
        if set(map(type, found)) == {int} and min(found) >= 0 and max(found) <= MOST:
            return found
        return tuple(map(count, found))

    return converted


NEAR_S = 0.01
"""By so little the times of a step may lie outside of their pass: a device's are of another clock than the host's."""
NO_STEPS = layout_of((), (), 1)
_KINDS = frozenset(kind.value for kind in StepKind)
_values = itemgetter("kind", "chunk", "arrivals_s", *TIMES[:-1])  # of experts in memory a step has no load_s


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
        times.append(tuple(one.get("load_s", 0.0) for one in found))
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
    starts, ends, waits, posts, units, loads = times
    latest_s = total_s + NEAR_S
    posted = [start_s + post_s for start_s, post_s in zip(starts, posts, strict=True)]
    return (
        min(*waits, *posts, *units, *loads) >= 0
        and max(units) <= MOST
        and min(*starts, *ends) >= -NEAR_S
        and max(*posted, *ends, *waits, *loads) <= latest_s
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
    wait_s, post_s, units = (of.take(name, amount) for name in TIMES[2:-1])
    load_s = of.take("load_s", amount) if "load_s" in of.values else 0.0
    arrivals_s = of.take("arrivals_s", moments_of)
    chunk = of.take("chunk", optional(integer))
    which = of.take("kind", lambda kind: _step(text(kind), chunk))
    moments = [start_s, start_s + post_s, end_s, wait_s, load_s, *(at for at in arrivals_s or () if at is not None)]
    is_inside = min(moments) >= -NEAR_S and max(moments) <= total_s + NEAR_S
    if not is_inside or end_s < start_s - NEAR_S:
        raise ValueError(f"{which}: these are no times of a pass that takes {total_s} s: {moments}")
    return which, (start_s, end_s, wait_s, post_s, units, load_s), arrivals_s


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


MAX_LINE_BYTES = 64 << 20
JUMP_S = 3600.0
"""A call that began so long before the one with the number before it has another clock. By less it may: half a batch
that runs again begins after the other half."""
MOST_PLANS = 1024
_PLANS: dict[str, OverlapPlan] = {}
HEADER: dict[str, Callable[[object], object]] = {
    "host": text,
    "transport": text,
    "shares_link": flag,
    "uses_rendezvous": flag,
    "wall_clock": number,
    "perf_counter": number,
}


def _plan(values: object) -> OverlapPlan:
    """Return a plan of JSON, of equal ones the same: a recording has few."""
    key = repr(values)
    if key not in _PLANS:
        if len(_PLANS) > MOST_PLANS:
            _PLANS.clear()
        _PLANS[key] = _new_plan(values)
    return _PLANS[key]


def _new_plan(values: object) -> OverlapPlan:
    if not isinstance(values, dict):
        raise ValueError(f"must be an object, got {values!r}")
    named = {None if dtype is None else str(dtype).removeprefix("torch."): dtype for dtype in WIRE_DTYPES}
    wire_dtype = values.get("wire_dtype")
    if wire_dtype not in named:
        raise ValueError(f"wire_dtype must be one of {', '.join(map(str, named))}, got {wire_dtype!r}")
    sizes = tuple_of(integer)(values.get("chunk_sizes"))
    return OverlapPlan(**{**values, "chunk_sizes": sizes, "wire_dtype": named[wire_dtype]})


def read_rank_file(path: Path) -> RankColumns:
    """Return what stands in a rank's file. Raises as read_recording()."""
    lines, tail = _lines(path)
    notes = [f"{path.name} ends in the middle of line {len(lines) + 1}, which is left out"] if tail else []
    if not lines:
        raise ValueError(
            f"{path} line 1: the file ends inside its header, so it has no call: remove it, or copy it again"
        )
    header = _parse(lines[0], path, 1)
    if header.values.get("format") != FORMAT:
        raise ValueError(
            f"{path} line 1: not a recording of tritonmoe.tools.recording.record(): format is "
            f"{str(header.values.get('format'))[:60]!r}"
        )
    schema = header.take("schema", integer)
    if schema != SCHEMA:
        raise ValueError(f"{path} line 1: schema {schema} is of another version of tritonmoe, this one reads {SCHEMA}")
    rank, size = header.take("rank", integer), header.take("size", integer)
    if not 0 <= rank < size:
        raise ValueError(f"{path} line 1: rank must lie in 0..{size - 1}, got {rank}")
    for key, convert in HEADER.items():
        header.take(key, convert)
    node_size = None if header.values.get("node_size") is None else header.take("node_size", integer)
    if node_size is not None and not (1 < node_size < size and size % node_size == 0):
        raise ValueError(f"{path} line 1: node_size must make two or more nodes of {size} ranks, got {node_size}")
    found = RankColumns(path, header.values, rank, size, notes)
    begun: dict[int, tuple[float, int]] = {}
    for line_number, line in enumerate(lines[1:], 2):
        fields = _parse(line, path, line_number)
        if CALLS_WITH_COPIES in fields.values:
            num_left_out = fields.take(CALLS_WITH_COPIES, count)
            notes.append(
                f"{num_left_out} calls whose hot experts had copies (OverlapConfig.balance) are not in the recording, "
                "and nothing here is said of them: last_report says what copies did"
            )
            continue
        sequence = fields.take("call", integer)
        agreed, call, ran_twice = _read_call(fields, size, node_size, found.steps)
        for layer_pass in call.passes:
            moments = [*(layer_pass.marks or ()), layer_pass.origin, layer_pass.end]
            if any(later < earlier - NEAR_S for earlier, later in pairwise(moments)):
                raise ValueError(f"{fields.where}: the clock went back: {moments}")
        begun[sequence] = call.forward.entered, line_number  # of a call that ran twice the second one counts
        found.add(CallLine(path, line_number, agreed, call, ran_twice), sequence)
    _check_order(path, begun)
    return found


def _lines(path: Path) -> tuple[list[bytes], bytes]:
    """Return the lines of a file, and what stands behind the last line's end."""
    check_regular(path)
    lines = []
    with path.open("rb") as file:
        while (line := file.readline(MAX_LINE_BYTES + 1)).endswith(b"\n"):
            lines.append(line[:-1])
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(
            f"{path} line {len(lines) + 1}: it has more than {MAX_LINE_BYTES} bytes, which no call needs: remove the "
            "line, or copy the file again"
        )
    return lines, line


def _check_order(path: Path, begun: Mapping[int, tuple[float, int]]) -> None:
    """Raise ValueError unless forwards began in the order of their calls' numbers; lines are in that of their ends."""
    for (from_s, before), (to_s, after) in pairwise(begun[sequence] for sequence in sorted(begun)):
        if to_s < from_s - JUMP_S:
            raise ValueError(
                f"{path} line {after}: the clock went back, to {to_s} from {from_s} at {path} line {before}"
            )


def _parse(line: bytes, path: Path, number: int) -> Fields:
    where = f"{path} line {number}"
    return Fields(load_json(line, where), where)


def _read_call(fields: Fields, size: int, node_size: int | None, columns: StepColumns) -> tuple[Agreed, RankCall, bool]:
    names = ("num_experts", "hidden_size", "intermediate_size")
    sizes = fields.inside("sizes")
    agreed = _agreed(
        fields.take("layer", integer),
        fields.take("recomputed", flag),
        fields.take("half", integer),
        fields.take("part", count) if "part" in fields.values else 0,
        fields.take("plan", _plan),
        fields.take("row_bytes", count),
        fields.take("gradient_row_bytes" if "gradient_row_bytes" in fields.values else "other_row_bytes", count),
        fields.take("other_row_bytes", count),
        fields.take("top_k", count),
        tuple((name, sizes.take(name, count)) for name in names),
    )
    plan = agreed[4]
    backward = fields.take("backward", lambda value: value)
    call = RankCall(
        fields.take("rows", counts_of(size)),
        fields.take("pairs", counts_of(size)),
        fields.take("pairs_per_expert", counts_of()),
        read_pass(fields.inside("forward"), plan, size, node_size, columns),
        None if backward is None else read_pass(fields.inside("backward"), plan, size, node_size, columns),
        None if node_size is None else fields.take("rows_to_nodes", counts_of(size // node_size)),
        fields.take("load_balance_loss_weight", optional(amount))
        if "load_balance_loss_weight" in fields.values
        else None,
    )
    to_nodes = call.rows_to_nodes or ()
    for node, rows in enumerate(to_nodes):
        of_node = size // len(to_nodes)
        of_ranks = call.rows[node * of_node : (node + 1) * of_node]
        if not max(of_ranks) <= rows <= sum(of_ranks):
            raise ValueError(f"{fields.where}: rows_to_nodes: {rows} of node {node} contradict rows {list(of_ranks)}")
    ran_twice = "overflowed" in fields.values and fields.take("overflowed", flag)
    return agreed, call, ran_twice


@lru_cache(maxsize=1024)
def _agreed(
    layer: int,
    is_recompute: bool,
    half: int,
    part: int,
    plan: OverlapPlan,
    row_bytes: int,
    gradient_row_bytes: int,
    other_row_bytes: int,
    top_k: int,
    sizes: tuple[tuple[str, int], ...],
) -> Agreed:
    """Return what ranks must say alike: one object of equal ones."""
    return layer, is_recompute, half, part, plan, row_bytes, gradient_row_bytes, other_row_bytes, top_k, dict(sizes)
