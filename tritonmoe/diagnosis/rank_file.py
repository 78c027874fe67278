"""RankFile: one rank's file of a recording, read line by line; each error names the line and the key."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from tritonmoe.config.numbers import is_integer, is_number
from tritonmoe.config.overlap import WIRE_DTYPES, OverlapPlan
from tritonmoe.diagnosis.call_recording import FORMAT, SCHEMA, RankCall, RecordedPass, RecordedStep
from tritonmoe.diagnosis.schedules import inside_of, schedule_of
from tritonmoe.overlap.report import CallMarks
from tritonmoe.overlap.schedule import Schedule
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.runtime.files import Json, check_regular, parse_json

__all__ = ["CallLine", "RankFile", "read_rank_file"]

MAX_LINE_BYTES = 64 << 20
MOST = 1 << 53
"""No count and no moment is larger than the integers that a float holds exactly."""
NEAR_S = 0.01
"""By so little the times of a step may lie outside of their pass: a device's are of another clock than the host's."""
JUMP_S = 3600.0
"""A call that began so long before the one with the number before it has another clock. By less it may: half a batch
that runs again begins after the other half."""
TIMES = ("start_s", "end_s", "wait_s", "post_s", "units")
"""Of a step; the last three are never negative."""
Value = TypeVar("Value")


class _Fields:
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

    def inside(self, key: str) -> "_Fields":
        return self.take(key, lambda value: _Fields(value, f"{self.where}: {key}"))


def _integer(value: object) -> int:
    if not is_integer(value) or abs(value) > MOST:
        raise ValueError(f"must be a whole number, got {value!r}")
    return value


def _count(value: object) -> int:
    count = _integer(value)
    if count < 0:
        raise ValueError(f"must not be negative, got {value!r}")
    return count


def _number(value: object) -> float:
    if not is_number(value) or abs(value) > MOST:  # type: ignore[arg-type]  # is_number knows it
        raise ValueError(f"must be a finite number, got {value!r}")
    return float(value)  # type: ignore[arg-type]  # as above


def _amount(value: object) -> float:
    amount = _number(value)
    if amount < 0:
        raise ValueError(f"must not be negative, got {value!r}")
    return amount


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be words, got {value!r}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


HEADER: dict[str, Callable[[object], object]] = {
    "host": _text,
    "transport": _text,
    "shares_link": _flag,
    "uses_rendezvous": _flag,
    "wall_clock": _number,
    "perf_counter": _number,
}


def _optional(convert: Callable[[object], Value]) -> Callable[[object], Value | None]:
    return lambda value: None if value is None else convert(value)


def _tuple_of(convert: Callable[[object], Value], length: int | None = None) -> Callable[[object], tuple[Value, ...]]:
    def converted(values: object) -> tuple[Value, ...]:
        return tuple(map(convert, _list_of(values, length)))

    return converted


def _list_of(values: object, length: int | None) -> list:
    if not isinstance(values, list) or length not in (None, len(values)):
        raise ValueError(f"must be a list{'' if length is None else f' of {length}'}, got {str(values)[:60]}")
    return values


def _counts_of(length: int | None = None) -> Callable[[object], tuple[int, ...]]:
    """Return _tuple_of(_count, length), which looks at all numbers at once where nothing is wrong with them."""

    def converted(values: object) -> tuple[int, ...]:
        found = _list_of(values, length)
        if set(map(type, found)) == {int} and min(found) >= 0 and max(found) <= MOST:
            return tuple(found)
        return tuple(map(_count, found))

    return converted


def _moments_of(length: int) -> Callable[[object], tuple[float | None, ...]]:
    """Return _tuple_of(_optional(_number), length), which looks at all numbers at once likewise."""

    def converted(values: object) -> tuple[float | None, ...]:
        found = _list_of(values, length)
        if set(map(type, found)) <= {float, type(None)}:
            known = [moment for moment in found if moment is not None]
            if not known or (min(known) >= -MOST and max(known) <= MOST):
                return tuple(found)
        return tuple(map(_optional(_number), found))

    return converted


@lru_cache(maxsize=1024)
def _step(kind: str, chunk: int | None) -> Step:
    return Step(StepKind.named(kind), chunk)


def _plan(values: object) -> OverlapPlan:
    if not isinstance(values, dict):
        raise ValueError(f"must be an object, got {values!r}")
    named = {None if dtype is None else str(dtype).removeprefix("torch."): dtype for dtype in WIRE_DTYPES}
    wire_dtype = values.get("wire_dtype")
    if wire_dtype not in named:
        raise ValueError(f"wire_dtype must be one of {', '.join(map(str, named))}, got {wire_dtype!r}")
    sizes = _tuple_of(_integer)(values.get("chunk_sizes"))
    return OverlapPlan(**{**values, "chunk_sizes": sizes, "wire_dtype": named[wire_dtype]})


@dataclass
class CallLine:
    """A call as one rank's file has it, times by the rank's own clock."""

    where: str
    agreed: tuple[int, bool, int, OverlapPlan, int, int, int, Mapping[str, int]]
    """What all ranks must say alike: the fields of RecordedCall from `layer` to `sizes`."""
    call: RankCall
    ran_twice: bool
    """Whether rows of some rank didn't fit into a capacity; then it is the second run."""


@dataclass
class RankFile:
    """What one rank has recorded, checked by itself."""

    path: Path
    header: Json
    rank: int
    size: int
    calls: dict[int, CallLine]
    notes: list[str]
    """What is left out of it."""


def read_rank_file(path: Path) -> RankFile:
    """Read a rank's file. Raises as read_recording()."""
    check_regular(path)
    lines = path.read_bytes().split(b"\n")
    tail = lines.pop()  # what stands behind the last line's end
    notes = [f"{path.name} ends in the middle of line {len(lines) + 1}, which is left out"] if tail else []
    if not lines:
        raise ValueError(f"{path} line 1: it ends before its header does: there is nothing to read")
    header = _parse(lines[0], path, 1)
    if header.values.get("format") != FORMAT:
        raise ValueError(f"{path} line 1: this is no recording: format is {str(header.values.get('format'))[:60]!r}")
    schema = header.take("schema", _integer)
    if schema != SCHEMA:
        raise ValueError(f"{path} line 1: schema {schema} is not the one that is read here, {SCHEMA}")
    rank, size = header.take("rank", _integer), header.take("size", _integer)
    if not 0 <= rank < size:
        raise ValueError(f"{path} line 1: rank must lie in 0..{size - 1}, got {rank}")
    for key, convert in HEADER.items():
        header.take(key, convert)
    node_size = None if header.values.get("node_size") is None else header.take("node_size", _integer)
    if node_size is not None and not (1 < node_size < size and size % node_size == 0):
        raise ValueError(f"{path} line 1: node_size must make two or more nodes of {size} ranks, got {node_size}")
    found = RankFile(path, header.values, rank, size, {}, notes)
    for number, line in enumerate(lines[1:], 2):
        fields = _parse(line, path, number)
        sequence = fields.take("call", _integer)
        found.calls[sequence] = read = _read_call(fields, size, node_size)  # a call that ran twice: the second one
        for layer_pass in read.call.passes:
            moments = [*(layer_pass.marks or ()), layer_pass.origin, layer_pass.end]
            if any(later < earlier - NEAR_S for earlier, later in pairwise(moments)):
                raise ValueError(f"{fields.where}: the clock went back: {moments}")
    _check_order(found)
    return found


def _check_order(found: RankFile) -> None:
    """Raise ValueError unless forwards began in the order of their calls' numbers; lines are in that of their ends."""
    in_order = [found.calls[number] for number in sorted(found.calls)]
    for before, after in pairwise(in_order):
        from_s, to_s = before.call.forward.entered, after.call.forward.entered
        if to_s < from_s - JUMP_S:
            raise ValueError(f"{after.where}: the clock went back, to {to_s} from {from_s} at {before.where}")


def _parse(line: bytes, path: Path, number: int) -> _Fields:
    where = f"{path} line {number}"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"{where}: it has {len(line)} bytes, and no call needs more than {MAX_LINE_BYTES}")
    return _Fields(parse_json(line, where), where)


def _read_call(fields: _Fields, size: int, node_size: int | None) -> CallLine:
    names = ("num_experts", "hidden_size", "intermediate_size")
    sizes = fields.inside("sizes")
    agreed = (
        fields.take("layer", _integer),
        fields.take("recomputed", _flag),
        fields.take("half", _integer),
        fields.take("plan", _plan),
        fields.take("row_bytes", _count),
        fields.take("other_row_bytes", _count),
        fields.take("top_k", _count),
        {name: sizes.take(name, _count) for name in names},
    )
    plan = agreed[3]
    backward = fields.take("backward", lambda value: value)
    call = RankCall(
        fields.take("rows", _counts_of(size)),
        fields.take("pairs", _counts_of(size)),
        fields.take("pairs_per_expert", _counts_of()),
        _read_pass(fields.inside("forward"), plan, size, node_size),
        None if backward is None else _read_pass(fields.inside("backward"), plan, size, node_size),
        None if node_size is None else fields.take("rows_to_nodes", _counts_of(size // node_size)),
    )
    for node, rows in enumerate(call.rows_to_nodes or ()):
        assert node_size is not None
        of_ranks = call.rows[node * node_size : (node + 1) * node_size]
        if not max(of_ranks) <= rows <= sum(of_ranks):
            raise ValueError(f"{fields.where}: rows_to_nodes: {rows} of node {node} contradict rows {list(of_ranks)}")
    ran_twice = "overflowed" in fields.values and fields.take("overflowed", _flag)
    return CallLine(fields.where, agreed, call, ran_twice)


def _read_pass(fields: _Fields, plan: OverlapPlan, size: int, node_size: int | None) -> RecordedPass:
    total_s = fields.take("total_s", _amount)

    def step(values: object, moments_of: Callable[[object], tuple[float | None, ...]]) -> RecordedStep:
        of = _Fields(values, "a step")
        times: list[Any] = [of.values.get(name) for name in TIMES]
        if set(map(type, times)) == {float} and min(times[2:]) >= 0 and times[4] <= MOST:  # nothing is wrong with them
            start_s, end_s, wait_s, post_s, units = times
        else:
            start_s, end_s = (of.take(name, _number) for name in TIMES[:2])
            wait_s, post_s, units = (of.take(name, _amount) for name in TIMES[2:])
        arrivals_s = of.take("arrivals_s", _optional(moments_of))
        chunk = of.take("chunk", _optional(_integer))
        which = of.take("kind", lambda kind: _step(_text(kind), chunk))
        moments = [start_s, start_s + post_s, end_s, wait_s, *(at for at in arrivals_s or () if at is not None)]
        is_inside = min(moments) >= -NEAR_S and max(moments) <= total_s + NEAR_S
        if not is_inside or end_s < start_s - NEAR_S:
            raise ValueError(f"{which}: these are no times of a pass that takes {total_s} s: {moments}")
        return RecordedStep(which, start_s, end_s, wait_s, post_s, units, arrivals_s)

    def marks(values: object) -> CallMarks:
        of = _Fields(values, "marks")
        return CallMarks(*(of.take(name, _number) for name in CallMarks._fields))

    num_peers = size if node_size is None else size // node_size
    moments_of = _moments_of(num_peers)
    steps = fields.take("steps", _tuple_of(lambda values: step(values, moments_of)))
    inside: tuple[RecordedStep, ...] = ()
    schedule = schedule_of(plan, [one.step.kind for one in steps])
    if node_size is not None:
        moments_inside = _moments_of(node_size)
        inside = fields.take("steps_inside", _tuple_of(lambda values: step(values, moments_inside)))
        _check_steps(inside, inside_of(schedule), f"{fields.where}: steps_inside")
    _check_steps(steps, schedule, f"{fields.where}: steps")
    return RecordedPass(fields.take("marks", _optional(marks)), fields.take("origin", _number), total_s, steps, inside)


def _check_steps(steps: Sequence[RecordedStep], schedule: Schedule, where: str) -> None:
    """Raise ValueError unless a pass has the steps of its plan's schedule, each once."""
    found, expected = ([(step.kind, step.chunk) for step in of] for of in ([one.step for one in steps], schedule))
    if found != expected:
        there, due = (", ".join(str(Step(*one)) for one in of) for of in (found, expected))
        raise ValueError(f"{where}: the plan has the steps {due}, and here are {there}")
