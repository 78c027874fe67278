"""S and M_W of a pipeline's timeline, as StragglerAnalysis defines them, so that its published figures can be compared.

S is what the steps took over what they would take with every computation at the mean of its kind and every transfer
at the median of its kind. M_W is the part of that slowdown that is gone when the slowest workers alone, 3 %, are so.
"""

import math
import statistics
from typing import NamedTuple

import torch

from tritonmoe.tools.doctor.graph import Graph
from tritonmoe.tools.doctor.walk import walker_of

__all__ = ["Slowdown", "slowdown_of"]

SLOWEST = 0.03


class Slowdown(NamedTuple):
    """The figures of one job."""

    slowdown: float
    """S."""
    share_of_slowest: float
    """M_W."""
    slowest: tuple[int, ...]
    """Indices of the slowest workers."""


def slowdown_of(graph: Graph) -> Slowdown:
    """Return S and M_W of a timeline's graph."""
    walker, tables = walker_of(graph), graph.tables
    ideal_busy_s, ideal_transfer_s = torch.zeros_like(tables.busy_s), torch.zeros_like(tables.transfer_s)
    for key in range(len(tables.keys)):
        runs, members = tables.run_key == key, tables.member_key == key
        if bool(runs.any()):
            ideal_busy_s[runs] = tables.busy_s[runs].mean()
        if bool(members.any()):
            ideal_transfer_s[members] = statistics.median(tables.transfer_s[members].tolist())
    excess = torch.zeros(len(graph.ranks), dtype=torch.float64, device="cpu")
    excess.index_add_(0, tables.run_rank, tables.busy_s - ideal_busy_s)
    count = max(1, math.floor(SLOWEST * len(graph.ranks)))
    slowest = tuple(excess.argsort(descending=True, stable=True)[:count].tolist())
    of_slowest = torch.tensor(slowest)
    busy_s, transfer_s = (
        torch.stack([was, ideal, torch.where(torch.isin(rank, of_slowest), ideal, was)])
        for was, ideal, rank in (
            (tables.busy_s, ideal_busy_s, tables.run_rank),
            (tables.transfer_s, ideal_transfer_s, tables.member_rank),
        )
    )
    original, ideal, mended = map(statistics.fmean, walker.all_step_times(busy_s, transfer_s))
    lost_s = original - ideal
    return Slowdown(original / ideal if ideal else 0.0, (original - mended) / lost_s if lost_s else 0.0, slowest)
