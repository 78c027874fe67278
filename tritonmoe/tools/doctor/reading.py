"""read_traces: a folder of traces of any kind, or a file, as one graph; files are known by what stands in them."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from tritonmoe.runtime.files import Json, nests_too_deep, num_elements, read_bytes
from tritonmoe.runtime.plain_pickle import read_plain_pickle
from tritonmoe.runtime.processes import read_files
from tritonmoe.tools.doctor.chrome_timeline import is_timeline, read_timeline
from tritonmoe.tools.doctor.exchange_names import ELEMENT_BYTES, as_run, kind_of_name
from tritonmoe.tools.doctor.graph import Graph
from tritonmoe.tools.doctor.inspector import is_inspector_line, name_ranks, on_one_clock, read_inspector
from tritonmoe.tools.doctor.joining import joined
from tritonmoe.tools.doctor.kineto import KinetoTrace
from tritonmoe.tools.doctor.matching import PAIRS
from tritonmoe.tools.doctor.trace import Part, RankTrace, Step
from tritonmoe.tools.doctor.trace_files import JsonPieces, damaged, first_bytes, number, open_text
from tritonmoe.tools.report.terminal import one_line

__all__ = ["ReadRun", "read_traces"]


def is_flight_record(found: object) -> TypeGuard[Json]:
    """Return whether a file's content is a dump of the flight recorder."""
    return (
        isinstance(found, dict)
        and isinstance(found.get("entries"), list)
        and ("version" in found or "pg_config" in found)
    )


def read_flight_record(path: Path, found: Json) -> RankTrace:
    """Return what a dump says of its rank: the exchanges, without anything of what was computed between them.

    Raises:
        ValueError: an entry is damaged, or there is none.
    """
    rank = found.get("rank")
    if type(rank) is int and not 0 <= rank < 1 << 24:
        raise damaged(path, f"rank is {rank}")
    if type(rank) is not int:
        numbers = re.findall(r"\d+", path.name.split(".")[0])
        rank = int(numbers[-1][:9]) if numbers else None
    trace = RankTrace(str(path), rank, None, "none", is_unix_clock=True)
    config = found.get("pg_config", {})
    if isinstance(config, dict):
        for name, group in config.items():
            ranks = group.get("ranks") if isinstance(group, dict) else None
            ranks = [int(text) for text in re.findall(r"\d{1,9}", ranks)] if isinstance(ranks, str) else ranks
            if isinstance(ranks, list) and all(type(one) is int for one in ranks):
                trace.groups[str(name)] = tuple(ranks)
    if trace.groups:
        trace.world_size = max(len(ranks) for ranks in trace.groups.values()) or None
    for count, entry in enumerate(found["entries"]):
        if not isinstance(entry, dict):
            raise damaged(path, f"entry {count} is {type(entry).__name__} and no object")
        trace.parts.append(_part(path, count, entry, trace))
    if not trace.parts:
        raise ValueError(
            f"{path} can't be judged: the flight recorder's dump has no exchange. Dump it while the job runs"
        )
    trace.parts.sort(key=lambda part: part.posted_s)
    if all(part.end_s is None for part in trace.parts):
        trace.limits.append(
            "the flight recorder doesn't have the ends of exchanges: the time that data travels counts as work "
            "of the ranks"
        )
    trace.limits.append("the flight recorder has exchanges only: whether a rank computes long or is late can't be told")
    return trace


def _part(path: Path, count: int, entry: Json, trace: RankTrace) -> Part:
    where = f"entry {count}"
    name = entry.get("profiling_name", "")
    kind = kind_of_name(str(name).partition(":")[2] or str(name)) or "exchange"
    created = number(path, where, entry, "time_created_ns") / 1e9
    started, completed = (
        number(path, where, entry, key, 0.0) / 1e9 if entry.get(key) is not None else 0.0
        for key in ("time_discovered_started_ns", "time_discovered_completed_ns")
    )
    duration = entry.get("duration_ms")
    start = started if started >= created else created
    end: float | None = completed if completed >= start > 0 and completed else None
    if isinstance(duration, int | float) and not isinstance(duration, bool) and 0 <= duration < 1e9:
        if end is not None:
            start = max(created, end - duration / 1e3)
        elif started:
            end = start + duration / 1e3
    part = Part(kind, created, start, end)
    group = entry.get("process_group")
    part.group = str(group[0]) if isinstance(group, list | tuple) and group else None
    is_pair = entry.get("is_p2p") is True
    sequence = entry.get("p2p_seq_id" if is_pair else "collective_seq_id")
    if type(sequence) is int:
        part.sequence = sequence
    part.group_ranks = trace.groups.get(part.group or "")
    sizes, types = entry.get("input_sizes"), entry.get("input_dtypes")
    if isinstance(sizes, list | tuple) and sizes and isinstance(sizes[0], list | tuple):
        total = 1 if len(sizes[0]) == 0 else num_elements(sizes[0]) or 0
        kind_of_element = str(types[0]).lower() if isinstance(types, list | tuple) and types else ""
        part.num_bytes = total * ELEMENT_BYTES.get(kind_of_element, 4)
    return part


KINDS = {"gpu": "Kineto (GPU)", "cpu": "Kineto (CPU)", "inspector": "NCCL Inspector", "none": "flight recorder"}
NO_TRACE = (".txt", ".md", ".yaml", ".yml", ".log", ".csv", ".py", ".sh", ".html", ".png", ".err", ".out")
REPEATED = 0.97
"""So many of the exchanges must be what was so many exchanges before."""
MOST_EXCHANGES = 4096
FEW_FOR_NODES = 4
"""Fewer ranks are no two nodes of two."""


@dataclass
class ReadRun:
    """A run as its files tell it."""

    path: Path
    graph: Graph
    kinds: dict[str, int]
    """How many files of each kind were read."""
    lanes: str
    """Of traces what is known of the computing, see RankTrace; recording; timeline."""
    limits: list[str]
    """What the files can't tell."""

    def __post_init__(self) -> None:
        if self.graph.stages and len(set(self.graph.replicas)) == 1:
            self.limits.append("with one data-parallel rank a slow machine can't be told from a stage with more work")


def read_traces(path: Path, ranks_per_node: int | None = None) -> ReadRun:
    """Read a trace, or a folder of them.

    ranks_per_node: so many neighbours share a host; None: as the files tell.
    Raises:
        ValueError: a file is damaged, files contradict each other, or there is no trace; the message says which and
            why. OSError: a file can't be read.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no files in it")
    found = list(read_files(_read, [file for file in files if not file.name.startswith(".")]))
    read = [one for one in found if not isinstance(one, str)]
    others = [one for one in found if isinstance(one, str)]
    if not read:
        raise ValueError("; ".join(others[:3]) or f"{path} has no trace in it")
    limits = [f"{len(others)} files are not traces: {_shortened(others)}"] if others else []
    timelines = [one for one in read if isinstance(one, tuple)]
    if timelines:
        if len(read) > 1:
            raise ValueError(f"{path} has a pipeline's timeline and other traces: give the files of one run at a time")
        graph, own = timelines[0]
        return ReadRun(path, graph, {"pipeline timeline": 1}, "timeline", [*own, *limits])
    traces = [one for one in read if isinstance(one, RankTrace)]
    kinds = Counter(KINDS[trace.lanes] for trace in traces)
    name_ranks(traces)
    traces = _merged(traces)
    unmarked = [trace for trace in traces if not trace.steps]
    if unmarked and len(unmarked) < len(traces):
        missing = ", ".join(str(trace.rank) for trace in unmarked[:5])
        raise ValueError(
            f"{path}: rank {missing} has only a record of exchanges, and other ranks have whole traces: give files of "
            "one kind for all ranks"
        )
    if unmarked:
        on_one_clock(traces)
        mark_steps(traces, limits)
    if any(part.kind in PAIRS and part.peer is None for trace in traces[1:] for part in trace.parts):
        limits.append(
            "the files don't name the other rank of sends and receives: each counts alone, and which rank waits for "
            "which is not known"
        )
    graph, own = joined(traces, ranks_per_node)
    return ReadRun(path, graph, kinds, traces[0].lanes, [*own, *_unknown(graph), *limits])


def _unknown(graph: Graph) -> Iterator[str]:
    """Yield what the exchanges of a graph don't tell."""
    if not graph.members:
        yield "there is no exchange in the files: what ranks wait for is not known"
        return
    rows = [member for member in graph.members if {"all_to_all", "dispatch", "combine"} & set(member.key)]
    if rows and all(member.sent is None for member in rows):
        yield (
            "the splits of all-to-alls are not in the files: a rank that gets more rows can't be told from a slow one, "
            "and what chunks or narrower rows would gain is not known (on a CPU they need record_shapes=True)"
        )
    whole = [member for member in rows if member.sent and len(graph.exchanges[member.exchange]) == len(member.sent)]
    if any(len(graph.exchanges[member.exchange]) >= FEW_FOR_NODES for member in whole):
        yield from _unknown_of_nodes(graph)


def _unknown_of_nodes(graph: Graph) -> Iterator[str]:
    """Yield what is not known of the nodes of a run whose ranks send each other rows."""
    hosts_of = ({graph.hosts[graph.members[one].rank] for one in members} for members in graph.exchanges if members[1:])
    if not graph.hosts:
        yield (
            "the files don't say which ranks share a host: what two levels would gain is not known "
            "(--ranks-per-node COUNT says it)"
        )
    elif len(set(graph.hosts)) > 1 and not graph.routed:
        yield (
            "the files don't say how many tokens a rank has: what two levels would gain is not known "
            "(a trace of the router's torch.topk with record_shapes=True says it)"
        )
    elif len(set(graph.hosts)) > 1 and not any(len(hosts) == 1 for hosts in hosts_of):
        yield (
            "no exchange is of the ranks of one host alone: what rows take inside a host is not known, so two levels "
            "may gain more than is said"
        )


def _shortened(others: Sequence[str]) -> str:
    names = [one_line(one.split(" ")[0].rsplit("/", 1)[-1]) for one in others]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


_Read = RankTrace | tuple[Graph, list[str]] | str


def _read(path: Path) -> _Read:
    """Read one file: a rank's trace, or a timeline's graph; a text says that it is no trace, and why."""
    try:
        return _read_kind(path)
    except RecursionError:  # of a text that is made of a value, say
        raise nests_too_deep(path) from None


def _read_kind(path: Path) -> _Read:
    begin = first_bytes(path)
    if not begin.strip():
        raise damaged(path, "it is empty")
    if begin[:4] == b"PAR1":
        return f"{path} is a parquet file, which the doctor doesn't read: give the same as JSON"
    if begin[:1] == b"\x80":
        return _read_pickle(path)
    text = begin.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] not in (b"{", b"["):
        if path.name.endswith(NO_TRACE) or not path.name.endswith(
            (".json", ".gz", ".jsonl", ".pickle", ".pkl", ".trace")
        ):
            return f"{path} is no trace"
        raise damaged(path, "it is neither JSON nor a pickle")
    if is_inspector_line(text):
        return read_inspector(path)
    return _read_json(path)


def _read_pickle(path: Path) -> _Read:
    content = read_bytes(path)
    try:
        found = read_plain_pickle(content)
    except ValueError as error:
        raise damaged(path, str(error)) from None
    if not is_flight_record(found):
        return f"{path} is a pickle, but no dump of the flight recorder"
    return read_flight_record(path, found)


def _read_json(path: Path) -> _Read:
    of_trace = KinetoTrace(path)
    events: list[object] | None = None
    pieces = JsonPieces(path, "traceEvents")
    pieces.scan = of_trace.scan
    for key, value in pieces:
        if key == "traceEvents":
            if events is None and of_trace.num_events == 0 and is_timeline(value):
                events = []
            if events is not None:
                events.append(value)
                continue
        of_trace.take(key, value)
    if pieces.is_cut and events is not None:
        raise damaged(path, f"it ends too soon, after {pieces.num_elements} elements")
    if events is not None:
        return read_timeline(path, events)
    if is_flight_record(of_trace.top):
        return read_flight_record(path, of_trace.top)
    if of_trace.num_events == 0 and "traceEvents" not in of_trace.top:
        with open_text(path) as file:
            if '"traceEvents"' not in file.read(1 << 16):
                return f"{path} is JSON, but no trace"
    return of_trace.trace(pieces.is_cut)


def _merged(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """Return a trace for each rank, its exchanges with the groups and numbers of its flight record where it has one."""
    whole = [trace for trace in traces if trace.lanes in ("gpu", "cpu")]
    by_rank = {trace.rank: trace for trace in whole}
    records = [trace for trace in traces if trace.lanes not in ("gpu", "cpu")]
    for record in records:
        if record.rank in by_rank:
            _number(by_rank[record.rank], record)
    return [*whole, *(record for record in records if record.rank not in by_rank)]


def _number(trace: RankTrace, record: RankTrace) -> None:
    """Return a trace's exchanges the group and sequence of its flight record, made shortly after they were posted."""
    if not trace.is_unix_clock:
        return
    place = 0
    for part in sorted(trace.parts, key=lambda part: part.posted_s):
        for at in range(place, len(record.parts)):
            other = record.parts[at]
            if other.posted_s < part.posted_s - 1e-4:
                place = at + 1
                continue
            if other.posted_s > max(part.posted_s + 0.05, part.start_s + 0.05):
                break
            if as_run(other.kind) == as_run(part.kind) and part.group_ranks is None:
                part.group, part.sequence, place = other.group, other.sequence, at + 1
                part.group_ranks = trace.groups.get(part.group or "") or other.group_ranks
                break


def mark_steps(traces: Sequence[RankTrace], limits: list[str]) -> None:
    """Mark steps in traces without any, the same ones on every rank; say how they were found."""
    common = _common(traces)
    period, first = _period([(part.kind, part.group) for part in common[0]])
    count = (len(common[0]) - first - 1) // period if period else 0  # the last step has no end before another begins
    if count < 3:
        limits.append("no steps are marked, and nothing repeats: the whole recording counts as one step")
        period, first, count = len(common[0]), 0, 1
    else:
        limits.append(
            f"no steps are marked: the same exchanges repeat after {period} exchanges, which count as one step"
        )
    for trace, parts in zip(traces, common, strict=True):
        ends = [part.start_s if part.end_s is None else part.end_s for part in parts]
        trace.steps = []
        for index in range(count):
            own = slice(first + index * period, first + (index + 1) * period)
            after = own.stop < len(parts)
            end_s = parts[own.stop].posted_s if after else max(ends[own]) + 1e-9
            trace.steps.append(Step(index, parts[own.start].posted_s, end_s))
        trace.parts = parts


def _common(traces: Sequence[RankTrace]) -> list[list[Part]]:
    """Return each trace's exchanges that all traces of that group have: dumps keep the last so many of each rank."""
    known = [{(part.group, part.sequence) for part in trace.parts if part.sequence is not None} for trace in traces]
    found = []
    for trace in traces:
        parts = []
        for part in trace.parts:
            name = (part.group, part.sequence)
            others = [
                one for one, of in zip(known, traces, strict=True) if any(p.group == part.group for p in of.parts[:1])
            ]
            if part.sequence is None or all(name in one for one in others):
                parts.append(part)
        found.append(parts)
    shortest = min(len(parts) for parts in found)
    if not shortest:
        raise ValueError(
            f"{traces[0].source} and the other files have no exchange in common: dump all ranks at one time"
        )
    return [parts[-shortest:] for parts in found] if len({len(parts) for parts in found}) > 1 else found


def _period(tokens: Sequence[object]) -> tuple[int, int]:
    """Return the smallest number of exchanges after which they repeat, and the first from where they do; 0 for none."""
    tokens = tokens[-MOST_EXCHANGES:]
    count = len(tokens)
    for period in range(1, count // 3 + 1):
        start = 0
        alike = [tokens[place] == tokens[place + period] for place in range(count - period)]
        while start < len(alike) and not alike[start]:
            start += 1
        tail = alike[start:]
        if len(tail) >= 2 * period and sum(tail) >= REPEATED * len(tail) and start <= count // 2:
            if period == 1 and len(set(tokens[start:])) == 1 and count - start < 3:
                continue
            return period, start
    return 0, 0
