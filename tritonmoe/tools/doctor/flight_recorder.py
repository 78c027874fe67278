"""Reader of the dumps of PyTorch's flight recorder: the last exchanges of a rank, with group and sequence number."""

import re
from pathlib import Path
from typing import TypeGuard

from tritonmoe.runtime.files import Json, num_elements
from tritonmoe.tools.doctor.exchange_names import ELEMENT_BYTES, kind_of_name
from tritonmoe.tools.doctor.trace import Part, RankTrace
from tritonmoe.tools.doctor.trace_files import damaged, number

__all__ = ["is_flight_record", "read_flight_record"]


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
