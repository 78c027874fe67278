"""num_chunks="auto": measure the first calls, then use the closed form; the ranks agree through the count header.

With B the time of a layer's exchanges, A that of its experts and eps what one more chunk costs the experts, the time
of C equal chunks is about A + C * eps + B / C where compute is the longer side, which is least at C = sqrt(B / eps).
Where the exchanges are the longer side, C = 3 is enough to hide the experts, and more only adds latency.
"""

import math
from dataclasses import dataclass, field

import torch

from ..config import LOCAL_PARTS, MAX_CHUNKS, OverlapConfig, OverlapPlan, equal_sizes, ramp_sizes
from .executor import PassReport

__all__ = ["ChunkChooser", "closed_form_num_chunks"]

PLAN = (1, 1, 2)
"""Chunks of the measured calls: one to warm up, one for A and B, one for eps."""
DETERMINISTIC_NUM_CHUNKS = 4
COMMUNICATION_BOUND_NUM_CHUNKS = 3
SMALLEST_EPS_S = 50e-6


def closed_form_num_chunks(experts_s: float, communication_s: float, eps_s: float) -> int:
    """Give the number of equal chunks that the model above predicts to be fastest, 1 where overlap can't pay.

    Args:
        experts_s: A, seconds of all experts in one chunk. communication_s: B, seconds of dispatch and combine.
        eps_s: seconds that one more chunk adds to A.
    Example:
        closed_form_num_chunks(0.010, 0.008, 0.000150) gives 7.
    """
    eps_s = max(eps_s, SMALLEST_EPS_S, 0.005 * experts_s)
    if communication_s <= 2 * eps_s or experts_s <= 2 * eps_s:
        return 1
    if communication_s > experts_s:
        return COMMUNICATION_BOUND_NUM_CHUNKS
    return max(1, min(MAX_CHUNKS, round(math.sqrt(communication_s / eps_s))))


def fixed_plan(config: OverlapConfig, num_chunks: int, size: int) -> OverlapPlan:
    """Give the plan of so many chunks where nothing is measured: half of the local pairs at either end."""
    if isinstance(config.shape, tuple):
        sizes = config.shape
    else:
        sizes = (ramp_sizes if config.shape == "ramp" else equal_sizes)(num_chunks)
    local_start = LOCAL_PARTS if size == 1 else LOCAL_PARTS // 2
    return OverlapPlan(sizes, config.local_first, local_start, serial=config.serial)


@dataclass
class ChunkChooser:
    """The state of "auto" for one transport and one kind of call; the same on every rank at every call."""

    reports: list[PassReport] = field(default_factory=list)
    agreed: int | None = None

    def num_chunks(self, config: OverlapConfig, size: int) -> int:
        """Give the number of chunks of the next call."""
        if config.num_chunks != "auto":
            return config.num_chunks
        if size == 1:
            return 1
        if torch.are_deterministic_algorithms_enabled():
            return DETERMINISTIC_NUM_CHUNKS
        if self.agreed is not None:
            return self.agreed
        return PLAN[min(len(self.reports), len(PLAN) - 1)]

    def plan(self, config: OverlapConfig, size: int) -> OverlapPlan:
        """Give the plan of the next call."""
        return fixed_plan(config, self.num_chunks(config, size), size)

    def vote(self) -> int:
        """Give this rank's wish: 0 until all of PLAN is measured, and again once the ranks have agreed."""
        if self.agreed is not None or len(self.reports) < len(PLAN):
            return 0
        _, one, two = self.reports[: len(PLAN)]
        experts_s = one.lane_s("experts")
        communication_s = one.lane_s("dispatch") + one.lane_s("combine")
        return closed_form_num_chunks(experts_s, communication_s, two.lane_s("experts") - experts_s)

    def observe(self, votes: list[int], report: PassReport) -> None:
        """Take in one call: its report while measuring, then the votes that every rank has seen."""
        if len(self.reports) < len(PLAN):
            self.reports.append(report)
        elif self.agreed is None and all(votes):
            self.agreed = max(votes)
