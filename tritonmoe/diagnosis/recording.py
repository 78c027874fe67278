"""Recording: what layer calls did on every rank, as `record` wrote it; read, checked, on one clock.

A folder has a file for every rank, rank-0003.jsonl say: a header line, then one line for each call. Times are of the
rank's time.perf_counter(), those of steps count from the origin of their pass.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tritonmoe.config.layer import is_integer, is_number
from tritonmoe.config.overlap import WIRE_DTYPES, OverlapPlan
from tritonmoe.diagnosis.schedules import inside_of, schedule_of
from tritonmoe.overlap.report import CallMarks
from tritonmoe.overlap.schedule import Schedule
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.runtime.files import Json, check_regular, parse_json
from tritonmoe.simulation.cost_model import LayerWork, LinkCosts
from tritonmoe.simulation.two_level_work import TwoLevelWork

__all__ = [
    "FORMAT",
    "SCHEMA",
    "RankCall",
    "RecordedCall",
    "RecordedPass",
    "RecordedStep",
    "Recording",
    "file_name",
    "plain_plan",
    "read_recording",
]

FORMAT = "tritonmoe recording"
SCHEMA = 1
MAX_LINE_BYTES = 64 << 20
MOST = 1 << 53
"""No count and no moment is larger than the integers that a float holds exactly."""
NEAR_S = 0.01
"""By so little the times of a step may lie outside of their pass: a device's are of another clock than the host's."""
SAME_CLOCK_S = 5.0
"""By so little a rank may seem to have heard from another one before that spoke: it notes the time after it spoke."""
ALIKE = ("transport", "node_size", "shares_link", "uses_rendezvous")
"""What the headers of all ranks must say alike."""
Value = TypeVar("Value")


def file_name(rank: int) -> str:
    """Give the name of a rank's file: rank-0003.jsonl."""
    return f"rank-{rank:04d}.jsonl"


def plain_plan(plan: OverlapPlan) -> Json:
    """Give a plan as JSON has it."""
    wire_dtype = None if plan.wire_dtype is None else str(plan.wire_dtype).removeprefix("torch.")
    return {**vars(plan), "chunk_sizes": list(plan.chunk_sizes), "wire_dtype": wire_dtype}


@dataclass(frozen=True)
class RecordedStep:
    """One step of a pass on one rank, in seconds from the origin of the pass: see StepTiming."""

    step: Step
    start_s: float
    end_s: float
    wait_s: float
    post_s: float
    units: float
    """How many of its kind's units it has (steps.Unit)."""
    arrivals_s: tuple[float | None, ...] | None
    """When the rows of every rank had arrived; None where that is not known."""


@dataclass(frozen=True)
class RecordedPass:
    """One pass of a call on one rank, in seconds of the recording's clock."""

    marks: CallMarks | None
    """None where the pass began without hearing from the other ranks."""
    origin: float
    """The start of its first step."""
    total_s: float
    steps: tuple[RecordedStep, ...]
    steps_inside: tuple[RecordedStep, ...] = ()
    """On two levels: what some of the steps did inside the node."""

    @property
    def end(self) -> float:
        return self.origin + self.total_s

    @property
    def entered(self) -> float:
        return self.origin if self.marks is None else self.marks.entered


@dataclass(frozen=True)
class RankCall:
    """One call on one rank."""

    rows: tuple[int, ...]
    """(W,): the tokens of this rank that need an expert of each rank."""
    pairs: tuple[int, ...]
    """(W,): their routed pairs."""
    pairs_per_expert: tuple[int, ...]
    """Of this rank's experts, in the order of its slots."""
    forward: RecordedPass
    backward: RecordedPass | None
    rows_to_nodes: tuple[int, ...] | None = None
    """On two levels, by node: the tokens of this rank that need any of its ranks."""

    @property
    def passes(self) -> tuple[RecordedPass, ...]:
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call on all ranks."""

    sequence: int
    """Its number among the calls on the transport."""
    layer: int
    """The number of its layer there; -1 for the function."""
    is_recompute: bool
    half: int
    """Which half of a batch in two_batches it is of, 1 or 2; 0 for a whole batch."""
    plan: OverlapPlan
    row_bytes: int
    other_row_bytes: int
    top_k: int
    sizes: Mapping[str, int]
    """num_experts (slots, with a placement), hidden_size, intermediate_size."""
    ranks: tuple[RankCall, ...]

    @cached_property
    def work(self) -> LayerWork:
        """What all ranks sent and computed."""
        rows, pairs = ([of.rows for of in self.ranks], [of.pairs for of in self.ranks])
        return LayerWork(_matrix(rows), _matrix(pairs), self.row_bytes, self.top_k, self.other_row_bytes)

    @property
    def rows_to_nodes(self) -> Tensor | None:
        """(W, nodes) on two levels: the tokens of each rank that need any rank of each node."""
        rows = [of.rows_to_nodes for of in self.ranks if of.rows_to_nodes is not None]
        return _matrix(rows) if rows else None

    @property
    def inside_row_bytes(self) -> int:
        """The bytes of a row inside a node, where rows have no wire format."""
        if self.plan.wire_dtype is torch.bfloat16:
            return 4 * self.sizes["hidden_size"]
        return self.row_bytes if self.plan.wire_dtype is None else self.other_row_bytes

    @cached_property
    def levels(self) -> TwoLevelWork | None:
        """What all ranks sent and computed on each of two levels; None on one."""
        to_nodes = self.rows_to_nodes
        if to_nodes is None:
            return None
        return TwoLevelWork.of(self.work, to_nodes, FREE, inside_row_bytes=self.inside_row_bytes)

    @property
    def has_backward(self) -> bool:
        return all(of.backward is not None for of in self.ranks)

    @property
    def by_pass(self) -> list[tuple[RecordedPass, ...]]:
        """The passes that every rank ran, all ranks' of each."""
        found = [tuple(of.forward for of in self.ranks)]
        backward = tuple(of.backward for of in self.ranks if of.backward is not None)
        return [*found, backward] if self.has_backward else found


FREE = LinkCosts(0.0, float("inf"))
"""Of work whose links are told by what was recorded."""


def _matrix(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Recording:
    """What all ranks recorded, on the clock of rank 0."""

    path: Path
    headers: tuple[Json, ...]
    """Of every rank."""
    calls: tuple[RecordedCall, ...]
    """Those that every rank has recorded, in their order."""
    notes: tuple[str, ...]
    """What is to be known of it: lines left out, clocks that were aligned."""

    @property
    def size(self) -> int:
        """W."""
        return len(self.headers)

    @property
    def transport(self) -> str:
        return str(self.headers[0]["transport"])

    @property
    def node_size(self) -> int | None:
        """How many neighbours are a node: as a transport of two levels says, else those on one host; None: no nodes."""
        if self.has_two_levels:
            return int(self.headers[0]["node_size"])
        hosts = [str(header["host"]) for header in self.headers]
        node_size = hosts.count(hosts[0])
        nodes = [hosts[first : first + node_size] for first in range(0, self.size, node_size)]
        are_alike = all(len(node) == node_size and len(set(node)) == 1 for node in nodes)
        return node_size if are_alike and 1 < node_size < self.size and len(set(hosts)) == len(nodes) else None

    @property
    def has_two_levels(self) -> bool:
        return self.headers[0].get("node_size") is not None

    @property
    def uses_rendezvous(self) -> bool:
        """As Transport.uses_rendezvous says."""
        return bool(self.headers[0]["uses_rendezvous"])

    @property
    def shares_link(self) -> bool:
        """As Transport.shares_link says."""
        return bool(self.headers[0]["shares_link"])

    @property
    def has_arrivals(self) -> bool:
        """Whether it is known of some exchange when each rank's rows had arrived."""
        passes = (layer_pass for call in self.calls for of in call.ranks for layer_pass in of.passes)
        return any(step.arrivals_s is not None for layer_pass in passes for step in layer_pass.steps)


def read_recording(path: Path) -> Recording:
    """Read a folder that `record` wrote.

    A last line that was not written to its end is left out, and so are calls that some rank has not recorded.

    Raises:
        ValueError: a file is no recording or damaged, a rank is missing, ranks recorded different calls, or a clock
            went back; the message names the file, and the line where there is one. OSError: a file can't be read.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: give the one that record() has written")
    files = sorted(file for file in path.iterdir() if re.fullmatch(r"rank-\d{4,}\.jsonl", file.name))
    if not files:
        raise ValueError(
            f"{path} has no recording: there is no file {file_name(0)} in it, which the first call of an "
            "expert-parallel layer makes while record() lasts"
        )
    notes: list[str] = []
    ranks = [_read_rank(file, notes) for file in files]
    size = ranks[0].size
    for found in ranks:
        if found.size != size:
            raise ValueError(f"{found.path} is of {found.size} ranks and {ranks[0].path} of {size}: two recordings")
        if found.path.name != file_name(found.rank):
            raise ValueError(f"{found.path} line 1: it is of rank {found.rank}, its name says another one")
        for key in ALIKE:
            here, there = found.header.get(key), ranks[0].header.get(key)
            if here != there:
                raise ValueError(f"{found.path} line 1: {key} is {here!r}, and {there!r} in {ranks[0].path}")
    missing = sorted(set(range(size)) - {found.rank for found in ranks})
    if missing:
        raise ValueError(f"{path}: of {size} ranks {missing} are missing: copy the files of all ranks into one folder")
    _align_clocks(ranks, notes)
    return Recording(path, tuple(found.header for found in ranks), _join_calls(ranks, notes), tuple(notes))


class _Fields:
    """An object of JSON whose values are checked where they are taken; errors name the place and the key."""

    def __init__(self, values: object, where: str) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise ValueError(f"{where} must be an object, got {type(values).__name__}")
        self.values: Json = values

    def take(self, key: str, convert: Callable[[object], Value]) -> Value:
        """Give a value as `convert` makes it, which raises ValueError or TypeError for one that doesn't fit."""
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
    if _integer(value) < 0:
        raise ValueError(f"must not be negative, got {value!r}")
    return _integer(value)


def _number(value: object) -> float:
    if not is_number(value) or abs(value) > MOST:  # type: ignore[arg-type]
        raise ValueError(f"must be a finite number, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def _amount(value: object) -> float:
    if _number(value) < 0:
        raise ValueError(f"must not be negative, got {value!r}")
    return _number(value)


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
        if not isinstance(values, list) or length not in (None, len(values)):
            raise ValueError(f"must be a list{'' if length is None else f' of {length}'}, got {str(values)[:60]}")
        return tuple(map(convert, values))

    return converted


def _kind(value: object) -> StepKind:
    if not isinstance(value, str):
        raise ValueError(f"must be the name of a kind of step, got {value!r}")
    return StepKind.named(value)


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
class _CallLine:
    """A call as one rank's file has it, times by the rank's own clock."""

    where: str
    agreed: tuple[int, bool, int, OverlapPlan, int, int, int, Mapping[str, int]]
    """What all ranks must say alike: the fields of RecordedCall from `layer` to `sizes`."""
    call: RankCall


@dataclass
class _RankFile:
    path: Path
    header: Json
    rank: int
    size: int
    calls: dict[int, _CallLine]


def _read_rank(path: Path, notes: list[str]) -> _RankFile:
    check_regular(path)
    lines = path.read_bytes().split(b"\n")
    tail = lines.pop()  # what stands behind the last line's end
    if tail:
        notes.append(f"{path.name} ends in the middle of line {len(lines) + 1}, which is left out")
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
    found = _RankFile(path, header.values, rank, size, {})
    latest = -float("inf")
    for number, line in enumerate(lines[1:], 2):
        fields = _parse(line, path, number)
        sequence = fields.take("call", _integer)
        found.calls[sequence] = read = _read_call(fields, size, node_size)  # a call that ran twice: the second one
        for layer_pass in read.call.passes:
            moments = [*(layer_pass.marks or ()), layer_pass.origin, layer_pass.end]
            if any(later < earlier - NEAR_S for earlier, later in pairwise(moments)):
                raise ValueError(f"{fields.where}: the clock went back: {moments}")
        if read.call.forward.entered < latest - 3600:
            raise ValueError(f"{fields.where}: the clock went back, to {read.call.forward.entered} from {latest}")
        latest = max(latest, read.call.forward.entered)
    return found


def _parse(line: bytes, path: Path, number: int) -> _Fields:
    where = f"{path} line {number}"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"{where}: it has {len(line)} bytes, and no call needs more than {MAX_LINE_BYTES}")
    return _Fields(parse_json(line, where), where)


def _read_call(fields: _Fields, size: int, node_size: int | None) -> _CallLine:
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
        fields.take("rows", _tuple_of(_count, size)),
        fields.take("pairs", _tuple_of(_count, size)),
        fields.take("pairs_per_expert", _tuple_of(_count)),
        _read_pass(fields.inside("forward"), plan, size, node_size),
        None if backward is None else _read_pass(fields.inside("backward"), plan, size, node_size),
        None if node_size is None else fields.take("rows_to_nodes", _tuple_of(_count, size // node_size)),
    )
    for node, rows in enumerate(call.rows_to_nodes or ()):
        assert node_size is not None
        of_ranks = call.rows[node * node_size : (node + 1) * node_size]
        if not max(of_ranks) <= rows <= sum(of_ranks):
            raise ValueError(f"{fields.where}: rows_to_nodes: {rows} of node {node} contradict rows {list(of_ranks)}")
    return _CallLine(fields.where, agreed, call)


def _read_pass(fields: _Fields, plan: OverlapPlan, size: int, node_size: int | None) -> RecordedPass:
    total_s = fields.take("total_s", _amount)

    def step(values: object, num_peers: int) -> RecordedStep:
        of = _Fields(values, "a step")
        found = RecordedStep(
            Step(of.take("kind", _kind), of.take("chunk", _optional(_integer))),
            start_s=of.take("start_s", _number),
            end_s=of.take("end_s", _number),
            wait_s=of.take("wait_s", _amount),
            post_s=of.take("post_s", _amount),
            units=of.take("units", _amount),
            arrivals_s=of.take("arrivals_s", _optional(_tuple_of(_optional(_number), num_peers))),
        )
        arrivals_s = [at for at in found.arrivals_s or () if at is not None]
        moments = [found.start_s, found.start_s + found.post_s, found.end_s, found.wait_s, *arrivals_s]
        is_inside = min(moments) >= -NEAR_S and max(moments) <= total_s + NEAR_S
        if not is_inside or found.end_s < found.start_s - NEAR_S:
            raise ValueError(f"{found.step}: these are no times of a pass that takes {total_s} s: {moments}")
        return found

    def marks(values: object) -> CallMarks:
        of = _Fields(values, "marks")
        return CallMarks(*(of.take(name, _number) for name in CallMarks._fields))

    num_peers = size if node_size is None else size // node_size
    steps = fields.take("steps", _tuple_of(lambda values: step(values, num_peers)))
    inside: tuple[RecordedStep, ...] = ()
    schedule = schedule_of(plan, [one.step.kind for one in steps])
    if node_size is not None:
        inside = fields.take("steps_inside", _tuple_of(lambda values: step(values, node_size)))
        _check_steps(inside, inside_of(schedule), f"{fields.where}: steps_inside")
    _check_steps(steps, schedule, f"{fields.where}: steps")
    return RecordedPass(fields.take("marks", _optional(marks)), fields.take("origin", _number), total_s, steps, inside)


def _check_steps(steps: Sequence[RecordedStep], schedule: Schedule, where: str) -> None:
    """Raise ValueError unless a pass has the steps of its plan's schedule, each once."""
    found, expected = ([(step.kind, step.chunk) for step in of] for of in ([one.step for one in steps], schedule))
    if found != expected:
        there, due = (", ".join(str(Step(*one)) for one in of) for of in (found, expected))
        raise ValueError(f"{where}: the plan has the steps {due}, and here are {there}")


def _align_clocks(ranks: Sequence[_RankFile], notes: list[str]) -> None:
    """Move the times of every rank to the clock of rank 0.

    On one host all processes have one clock. Between hosts all ranks leave a count exchange at about the same moment:
    the median of the differences counts.
    """
    first = ranks[0]
    for found in ranks[1:]:
        if found.header["host"] == first.header["host"]:
            continue
        pairs = [
            (line.call.forward.marks, found.calls[n].call.forward.marks)
            for n, line in first.calls.items()
            if n in found.calls
        ]
        ahead = [
            theirs.counts_left - ours.counts_left for ours, theirs in pairs if ours is not None and theirs is not None
        ]
        if not ahead:
            raise ValueError(f"{found.path}: nothing tells how its clock stands to that of {first.path.name}")
        shift_s = statistics.median(ahead)
        spread_s = statistics.median(abs(one - shift_s) for one in ahead)
        notes.append(f"clock of rank {found.rank} ({found.header['host']}) aligned, within {spread_s * 1e6:.0f} us")
        for line in found.calls.values():
            line.call = _shifted(line.call, shift_s)


def _shifted(call: RankCall, shift_s: float) -> RankCall:
    def shifted(layer_pass: RecordedPass) -> RecordedPass:
        marks = layer_pass.marks and CallMarks(*(moment - shift_s for moment in layer_pass.marks))
        return replace(layer_pass, marks=marks, origin=layer_pass.origin - shift_s)

    backward = None if call.backward is None else shifted(call.backward)
    return replace(call, forward=shifted(call.forward), backward=backward)


def _join_calls(ranks: Sequence[_RankFile], notes: list[str]) -> tuple[RecordedCall, ...]:
    everywhere = set.intersection(*(set(found.calls) for found in ranks))
    left_out = set.union(*(set(found.calls) for found in ranks)) - everywhere
    if left_out:
        notes.append(f"{len(left_out)} calls that not every rank has recorded are left out")
    joined = []
    for sequence in sorted(everywhere):
        lines = [found.calls[sequence] for found in ranks]
        for line in lines[1:]:
            if line.agreed != lines[0].agreed:
                raise ValueError(
                    f"{line.where}: call {sequence} is not the one of {lines[0].where}: {line.agreed} there and "
                    f"{lines[0].agreed} here"
                )
            both = zip(_exchanges(line.call), _exchanges(lines[0].call), strict=False)
            if any(here != there for here, there in both):
                raise ValueError(f"{line.where}: call {sequence} has other exchanges than at {lines[0].where}")
        _check_clocks(lines)
        joined.append(RecordedCall(sequence, *lines[0].agreed, tuple(line.call for line in lines)))
    return tuple(joined)


def _check_clocks(lines: Sequence[_CallLine]) -> None:
    """Raise ValueError where a rank has heard from all before one of them spoke, by their times: these are no one's."""
    for passes in zip(*(line.call.passes for line in lines), strict=False):
        marks = [one.marks for one in passes if one.marks is not None]
        if len(marks) < len(lines):
            continue
        last = max(range(len(lines)), key=lambda rank: marks[rank].counts_posted)
        first = min(range(len(lines)), key=lambda rank: marks[rank].counts_left)
        early_s = marks[last].counts_posted - marks[first].counts_left
        if early_s > SAME_CLOCK_S:
            raise ValueError(
                f"{lines[first].where}: this rank has heard from all {early_s:.1f} s before the one of "
                f"{lines[last].where} sent its counts: a clock has jumped, or these are files of two runs"
            )


def _exchanges(call: RankCall) -> list[list[Step]]:
    """Give the exchanges of each pass, which are matched by their order."""
    return [[step.step for step in one.steps if step.step.lane == "comm"] for one in call.passes]
