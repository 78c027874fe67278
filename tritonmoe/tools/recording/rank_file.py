"""read_rank_file: one rank's file of a recording, read line by line; each error names the line and the key."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from tritonmoe.config.overlap import WIRE_DTYPES, OverlapPlan
from tritonmoe.runtime.files import check_regular, load_json
from tritonmoe.tools.recording.call_recording import CALLS_WITH_COPIES, FORMAT, SCHEMA, RankCall
from tritonmoe.tools.recording.json_fields import (
    Fields,
    amount,
    count,
    counts_of,
    flag,
    integer,
    number,
    optional,
    text,
    tuple_of,
)
from tritonmoe.tools.recording.pass_reader import NEAR_S, read_pass
from tritonmoe.tools.recording.pass_steps import StepColumns
from tritonmoe.tools.recording.rank_columns import Agreed, CallLine, RankColumns

__all__ = ["read_rank_file"]

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
        fields.take("plan", _plan),
        fields.take("row_bytes", count),
        fields.take("other_row_bytes", count),
        fields.take("top_k", count),
        tuple((name, sizes.take(name, count)) for name in names),
    )
    plan = agreed[3]
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
    plan: OverlapPlan,
    row_bytes: int,
    other_row_bytes: int,
    top_k: int,
    sizes: tuple[tuple[str, int], ...],
) -> Agreed:
    """Return what ranks must say alike: one object of equal ones."""
    return layer, is_recompute, half, plan, row_bytes, other_row_bytes, top_k, dict(sizes)
