"""S and M_W of a pipeline's timeline, as StragglerAnalysis defines them, so that its published figures can be compared.

S is what the steps took over what they would take with every computation at the mean of its kind and every transfer
at the median of its kind. M_W is the part of that slowdown that is gone when the slowest workers alone, 3 %, are so.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

from tritonmoe.doctor.graph import Graph, Key
from tritonmoe.doctor.walk import Walker

__all__ = ["Slowdown", "slowdown_of"]

SLOWEST = 0.03


@dataclass(frozen=True)
class Slowdown:
    """The figures of one job."""

    original_s: float
    ideal_s: float
    without_slowest_s: float
    slowest: tuple[int, ...]
    """Indices of the slowest workers."""

    @property
    def slowdown(self) -> float:
        """S."""
        return self.original_s / self.ideal_s if self.ideal_s else 0.0

    @property
    def share_of_slowest(self) -> float:
        """M_W."""
        lost_s = self.original_s - self.ideal_s
        return (self.original_s - self.without_slowest_s) / lost_s if lost_s else 0.0


def slowdown_of(graph: Graph) -> Slowdown:
    """Give S and M_W of a timeline's graph."""
    walker = Walker(graph)
    busy_s, transfer_s = graph.busy_s(), graph.transfers_s()
    of_runs: dict[Key, list[float]] = defaultdict(list)
    of_members: dict[Key, list[float]] = defaultdict(list)
    for run in graph.runs:
        of_runs[run.key].append(run.busy_s)
    for member in graph.members:
        of_members[member.key].append(member.transfer_s)
    means = {key: statistics.fmean(times) for key, times in of_runs.items()}
    medians = {key: statistics.median(times) for key, times in of_members.items()}
    ideal_busy_s = [means[run.key] for run in graph.runs]
    ideal_transfer_s = [medians[member.key] for member in graph.members]
    excess = [0.0] * len(graph.ranks)
    for run, was, ideal in zip(graph.runs, busy_s, ideal_busy_s, strict=True):
        excess[run.rank] += was - ideal
    count = max(1, math.floor(SLOWEST * len(graph.ranks)))
    slowest = tuple(sorted(range(len(graph.ranks)), key=lambda rank: -excess[rank])[:count])
    mended_busy_s = [
        ideal if run.rank in slowest else was for run, was, ideal in zip(graph.runs, busy_s, ideal_busy_s, strict=True)
    ]
    mended_transfer_s = [
        ideal if member.rank in slowest else was
        for member, was, ideal in zip(graph.members, transfer_s, ideal_transfer_s, strict=True)
    ]
    original, ideal, mended = (
        statistics.fmean(walker.step_times(*times))
        for times in ((busy_s, transfer_s), (ideal_busy_s, ideal_transfer_s), (mended_busy_s, mended_transfer_s))
    )
    return Slowdown(original, ideal, mended, slowest)
