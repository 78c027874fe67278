"""align_clocks: ranks whose clocks can't be the same moved onto the first one's, by when all leave an exchange."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from tritonmoe.doctor.exchange_names import SYMMETRIC
from tritonmoe.doctor.matching import Matched
from tritonmoe.doctor.trace import RankTrace

__all__ = ["align_clocks"]

CLOCK_S = 0.002
"""Clocks that agree no better than that show a rank that has heard from one that had not spoken."""
OFTEN = 0.1


def align_clocks(traces: Sequence[RankTrace], together: Matched, limits: list[str]) -> None:
    """Move ranks onto the first one's clock where theirs can't be the same: all leave an exchange at one moment."""
    broken, all_of_them = 0, 0
    apart: dict[int, list[float]] = defaultdict(list)
    for parts in together.values():
        if len(parts) < 2 or parts[0][1].kind not in SYMMETRIC or any(part.end_s is None for _, part in parts):
            continue
        latest, first = max(part.start_s for _, part in parts), min(part.end_s or 0.0 for _, part in parts)
        all_of_them += 1
        broken += first < latest - CLOCK_S
        base = parts[0][1].end_s or 0.0
        for index, part in parts[1:]:
            if parts[0][0] == 0:
                apart[index].append((part.end_s or 0.0) - base)
    if not all_of_them or broken <= OFTEN * all_of_them:
        return
    moved = {index: statistics.median(values) for index, values in apart.items()}
    for index, by_s in moved.items():
        trace = traces[index]
        for times in (trace.busy_start_s, trace.busy_end_s):
            for place, time in enumerate(times):
                times[place] = time - by_s
        for part in trace.parts:
            part.posted_s -= by_s
            part.start_s -= by_s
            part.end_s = None if part.end_s is None else part.end_s - by_s
        for step in trace.steps:
            step.start_s -= by_s
            step.end_s -= by_s
    largest = max((abs(by_s) for by_s in moved.values()), default=0.0)
    limits.append(
        f"the ranks' clocks don't agree (by {1e3 * largest:.1f} ms): they are aligned by when exchanges ended"
    )
