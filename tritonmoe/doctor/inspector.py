"""Reader of what the NCCL Inspector writes: how long each exchange took on each rank, and with verbose output when."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tritonmoe.doctor.exchange_names import kind_of_name
from tritonmoe.doctor.trace import Part, RankTrace
from tritonmoe.doctor.trace_files import damaged, number, open_text

__all__ = ["is_inspector_line", "on_one_clock", "read_inspector"]

LINE_KEYS = ('"header"', '"dump_stats"', '"coll_perf"', '"p2p_perf"', '"proxy_trace"')


def is_inspector_line(begin: bytes) -> bool:
    """Say whether a file that begins so is of the Inspector."""
    text = begin.decode("utf-8", "replace")
    return text[:1] == "{" and any(text[1:40].lstrip().startswith(key) for key in LINE_KEYS)


def read_inspector(path: Path) -> RankTrace:
    """Read a file of the Inspector: records of format 4.3, or of older ones in which each has its own header.

    Raises:
        ValueError: a line is damaged, or there is no exchange.
    """
    trace: RankTrace | None = None
    header: dict[str, Any] = {}
    dropped = 0
    decode = json.JSONDecoder().raw_decode
    with open_text(path) as file:
        try:
            text = file.read()
        except (UnicodeDecodeError, EOFError, OSError) as error:
            raise damaged(path, f"it is no text: {error}") from None
    at, count = 0, 0
    is_timed = True
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at >= len(text):
            break
        count += 1
        try:
            record, at = decode(text, at)
        except (ValueError, RecursionError) as error:
            raise damaged(path, f"record {count}: {str(error)[:80]}") from None
        if not isinstance(record, dict):
            raise damaged(path, f"record {count} is no object")
        if isinstance(record.get("header"), dict):
            header = record["header"]
        stats = record.get("dump_stats")
        if isinstance(stats, dict):
            for key in ("coll_dropped_since_last_dump", "p2p_dropped_since_last_dump"):
                dropped += int(number(path, f"record {count}", stats, key, 0))
        performance = record.get("coll_perf")
        if not isinstance(performance, dict):
            continue
        if trace is None:
            rank = int(number(path, f"record {count}: header", header, "rank"))
            world = int(number(path, f"record {count}: header", header, "n_ranks"))
            trace = RankTrace(str(path), rank, world, "inspector")
        part, has_time = _part(path, count, performance, str(header.get("id")))
        is_timed &= has_time
        trace.parts.append(part)
    if trace is None:
        raise ValueError(f"{path} can't be judged: the Inspector wrote no collective into it")
    trace.is_unix_clock = is_timed
    if dropped:
        trace.limits.append(f"the Inspector dropped {dropped} records: set NCCL_INSPECTOR_DUMP_COLL_RING_SIZE higher")
    if not is_timed:
        trace.limits.append(
            "the Inspector wrote how long exchanges took, not when: only who comes last is known, not what is computed "
            "(NCCL_INSPECTOR_DUMP_VERBOSE=1 writes when)"
        )
    trace.limits.append(
        "the Inspector has exchanges only: a rank that computes long can't be told from one that is late"
    )
    return trace


def _part(path: Path, count: int, performance: dict[str, Any], group: str) -> tuple[Part, bool]:
    where = f"record {count}"
    seconds = number(path, where, performance, "coll_exec_time_us") / 1e6
    if seconds < 0:
        raise damaged(path, f"{where}: an exchange takes less than no time")
    kind = kind_of_name(str(performance.get("coll", ""))) or "exchange"
    times = performance.get("event_trace_ts")
    kernels = times.get("kernel_events") if isinstance(times, dict) else None
    part = Part(kind, 0.0, 0.0, seconds, group=group)
    has_time = isinstance(kernels, list) and bool(kernels) and all(isinstance(one, dict) for one in kernels)
    if has_time:
        assert isinstance(kernels, list)
        start = min(number(path, where, one, "kernel_start_ts") for one in kernels) / 1e6
        part.posted_s = part.start_s = start
        part.end_s = start + seconds
    part.sequence = int(number(path, where, performance, "coll_sn"))
    part.num_bytes = int(number(path, where, performance, "coll_msg_size_bytes", 0))
    return part, has_time


def on_one_clock(traces: Sequence[RankTrace]) -> None:
    """Give exchanges without times such that those of one number end together: who took less came later."""
    traces = [trace for trace in traces if trace.lanes == "inspector" and not trace.is_unix_clock]
    longest: dict[tuple[str | None, int | None], float] = defaultdict(float)
    for trace in traces:
        for part in trace.parts:
            name = (part.group, part.sequence)
            longest[name] = max(longest[name], part.end_s or 0.0)
    now_s, ends = 0.0, {}
    for name, seconds in sorted(longest.items(), key=lambda item: (item[0][1] or 0, item[0][0] or "")):
        now_s += seconds
        ends[name] = now_s
    for trace in traces:
        for part in trace.parts:
            end_s = ends[part.group, part.sequence]
            part.posted_s = part.start_s = end_s - (part.end_s or 0.0)
            part.end_s = end_s
        trace.parts.sort(key=lambda part: part.posted_s)
