"""on_one_clock: when the exchanges were of which the Inspector has only how long they took on each rank."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from tritonmoe.tools.doctor.trace import Part, RankTrace

__all__ = ["on_one_clock"]

_Name: TypeAlias = tuple[int, str | None, bool]
"""Number, group, and whether it is of sends and receives, which are counted apart."""


def on_one_clock(traces: Sequence[RankTrace]) -> None:
    """Place exchanges without times one after the other, and in each its ranks.

    All leave a collective together, so who took less came later. A send and its receive end together: where there are
    both, they tell by how much one rank came later than the other, whenever each of them was done.
    """
    traces = [trace for trace in traces if trace.lanes == "inspector" and not trace.is_unix_clock]
    parts: dict[_Name, dict[int, Part]] = defaultdict(dict)
    last: dict[tuple, int] = defaultdict(int)
    for index, trace in enumerate(traces):
        for part in trace.parts:
            name = (part.sequence or 0, part.group, part.kind in ("all_to_all", "send", "recv"))
            parts[name][index] = part
            last[name[1:]] = max(last[name[1:]], name[0])
    now_s = 0.0
    # Collectives and pairs are taken to be spread alike over the run.
    for name in sorted(parts, key=lambda name: (name[0] / (last[name[1:]] or 1), not name[2], str(name[1]))):
        own = parts[name]
        starts = _starts(own, {index: traces[index].rank_in.get(str(name[1])) for index in own})
        first = min(starts.values())
        for index, part in own.items():
            seconds = (part.end_s or 0.0) - part.start_s
            part.posted_s = part.start_s = now_s + starts[index] - first
            part.end_s = part.start_s + seconds
        now_s = max(part.end_s or 0.0 for part in own.values())
    for trace in traces:
        trace.parts.sort(key=lambda part: part.posted_s)


def _starts(parts: Mapping[int, Part], number: Mapping[int, int | None]) -> dict[int, float]:
    """Return when each rank came to an exchange, from some moment on."""
    if all(part.links for part in parts.values()):
        took = {(index, way, peer): seconds for index, part in parts.items() for way, peer, _, seconds in part.links}
        first = min(parts)
        starts = {first: 0.0}
        for index in parts:
            later = [
                took[first, way, number[index]] - took[index, back, number[first]]  # type: ignore[index]
                for way, back in (("send", "recv"), ("recv", "send"))
                if (first, way, number[index]) in took and (index, back, number[first]) in took
            ]
            if index != first and later:
                starts[index] = statistics.fmean(later)
        if len(starts) == len(parts):
            return starts
    return {index: part.start_s - (part.end_s or 0.0) for index, part in parts.items()}
