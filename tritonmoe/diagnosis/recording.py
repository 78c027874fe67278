"""Recording: what layer calls did on every rank, as `record` wrote it; read, checked, on one clock.

A folder has a file for every rank, rank-0003.jsonl say: a header line, then one line for each call. Times are of the
rank's time.perf_counter(), those of steps count from the origin of their pass.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tritonmoe.config.layer import is_integer, is_number
from tritonmoe.config.overlap import WIRE_DTYPES, OverlapPlan
from tritonmoe.overlap.report import CallMarks
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
    files = sorted(file for file in path.iterdir() if re.fullmatch(r"rank-\d{4,}\.jsonl", file.name))
    if not files:
        raise ValueError(f"{path} has no recording: there is no file rank-0000.jsonl in it")
    notes: list[str] = []
    ranks = [_read_rank(file, notes) for file in files]
    size = ranks[0].size
    for found in ranks:
        if found.size != size:
            raise ValueError(f"{found.path} is of {found.size} ranks and {ranks[0].path} of {size}: two recordings")
        if found.path.name != file_name(found.rank):
            raise ValueError(f"{found.path} line 1: it is of rank {found.rank}, its name says another one")
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
    if not is_integer(value):
        raise ValueError(f"must be a whole number, got {value!r}")
    return value


def _number(value: object) -> float:
    if not is_number(value):
        raise ValueError(f"must be a finite number, got {value!r}")
    return float(value)  # type: ignore[arg-type]


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
    for key, convert in (("host", str), ("transport", str), ("shares_link", bool), ("wall_clock", _number)):
        header.take(key, convert)
    header.take("uses_rendezvous", bool)
    header.take("perf_counter", _number)
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
            moments = [layer_pass.entered, layer_pass.origin, layer_pass.end]
            if moments != sorted(moments):
                raise ValueError(f"{fields.where}: the clock went back: {moments}")
        if read.call.forward.entered < latest - 3600:
            raise ValueError(f"{fields.where}: the clock went back, to {read.call.forward.entered} from {latest}")
        latest = max(latest, read.call.forward.entered)
    return found


def _parse(line: bytes, path: Path, number: int) -> _Fields:
    where = f"{path} line {number}"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"{where}: it has {len(line)} bytes, and no call needs more than {MAX_LINE_BYTES}")
    try:
        return _Fields(parse_json(line, path), where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_call(fields: _Fields, size: int, node_size: int | None) -> _CallLine:
    names = ("num_experts", "hidden_size", "intermediate_size")
    sizes = fields.inside("sizes")
    agreed = (
        fields.take("layer", _integer),
        fields.take("recomputed", bool),
        fields.take("half", _integer),
        fields.take("plan", _plan),
        fields.take("row_bytes", _integer),
        fields.take("other_row_bytes", _integer),
        fields.take("top_k", _integer),
        {name: sizes.take(name, _integer) for name in names},
    )
    backward = fields.take("backward", lambda value: value)
    call = RankCall(
        fields.take("rows", _tuple_of(_integer, size)),
        fields.take("pairs", _tuple_of(_integer, size)),
        fields.take("pairs_per_expert", _tuple_of(_integer)),
        _read_pass(fields.inside("forward"), node_size is not None),
        None if backward is None else _read_pass(fields.inside("backward"), node_size is not None),
        None if node_size is None else fields.take("rows_to_nodes", _tuple_of(_integer, size // node_size)),
    )
    for node, rows in enumerate(call.rows_to_nodes or ()):
        assert node_size is not None
        of_ranks = call.rows[node * node_size : (node + 1) * node_size]
        if not max(of_ranks) <= rows <= sum(of_ranks):
            raise ValueError(f"{fields.where}: rows_to_nodes: {rows} of node {node} contradict rows {list(of_ranks)}")
    return _CallLine(fields.where, agreed, call)


def _read_pass(fields: _Fields, has_two_levels: bool) -> RecordedPass:
    def step(values: object) -> RecordedStep:
        of = _Fields(values, "a step")
        return RecordedStep(
            Step(of.take("kind", _kind), of.take("chunk", _optional(_integer))),
            start_s=of.take("start_s", _number),
            end_s=of.take("end_s", _number),
            wait_s=of.take("wait_s", _number),
            post_s=of.take("post_s", _number),
            units=of.take("units", _number),
            arrivals_s=of.take("arrivals_s", _optional(_tuple_of(_optional(_number)))),
        )

    def marks(values: object) -> CallMarks:
        of = _Fields(values, "marks")
        return CallMarks(*(of.take(name, _number) for name in CallMarks._fields))

    return RecordedPass(
        fields.take("marks", _optional(marks)),
        fields.take("origin", _number),
        fields.take("total_s", _number),
        fields.take("steps", _tuple_of(step)),
        fields.take("steps_inside", _tuple_of(step)) if has_two_levels else (),
    )


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
        joined.append(RecordedCall(sequence, *lines[0].agreed, tuple(line.call for line in lines)))
    return tuple(joined)
