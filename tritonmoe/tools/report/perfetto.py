"""Timelines as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing open.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.tools.report.timeline import LANES, Timeline

__all__ = ["chrome_trace", "write_chrome_trace"]


def chrome_trace(runs: Mapping[str, Sequence[Timeline]]) -> Json:
    """Return the trace of several runs, each with one timeline per rank, all beginning at time 0.

    A process is a rank (pid), a thread a lane of a run (tid = 3 * run + lane: compute, comm, inside the node), and an
    event a step, named as in the schedule, with kind, chunk and run among its arguments, and how long it waited for
    experts that are read from a file, where it did. Times are in microseconds.
    """
    events: list[Json] = []
    for rank in sorted({timeline.rank for timelines in runs.values() for timeline in timelines}):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        events.append({"name": "process_sort_index", "ph": "M", "pid": rank, "tid": 0, "args": {"sort_index": rank}})
    for run_idx, (run, timelines) in enumerate(runs.items()):
        for timeline in timelines:
            for lane in timeline.lanes:
                where = {"pid": timeline.rank, "tid": len(LANES) * run_idx + LANES.index(lane)}
                events.append({"name": "thread_name", "ph": "M", **where, "args": {"name": f"{run}: {lane}"}})
                events.append({"name": "thread_sort_index", "ph": "M", **where, "args": {"sort_index": where["tid"]}})
                for span in timeline.spans:
                    if span.lane != lane:
                        continue
                    args: Json = {"chunk": span.chunk, "kind": span.kind, "run": run}
                    if lane == "comm":
                        args["posted_us"] = _microseconds(span.posted_s)
                    if span.load_s:
                        args["waited_for_experts_us"] = _microseconds(span.load_s)
                    start_us = _microseconds(span.start_s)
                    events.append(
                        {
                            "name": span.name,
                            "cat": lane,
                            "ph": "X",
                            **where,
                            "ts": start_us,
                            "dur": round(_microseconds(span.end_s) - start_us, 3),
                            "args": args,
                        }
                    )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_chrome_trace(path: Path, runs: Mapping[str, Sequence[Timeline]]) -> None:
    """Write chrome_trace(runs) as JSON.

    Raises:
        OSError: it could not be written, on a full disk for example; then no part of it is left.
    """
    write_whole(path, json.dumps(chrome_trace(runs)), "trace")


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
