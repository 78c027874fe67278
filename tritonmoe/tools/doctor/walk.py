"""Walker: what the steps of a graph take, with given times for its stretches of work and its exchanges.

What comes after what is found once; then all ranks are walked together, level by level, with several sets of times at
once: what would be without this, without that, and so on.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.tools.doctor.graph import Graph
from tritonmoe.tools.doctor.uniform_walk import UniformWalk, Walked, uniform_walk
from tritonmoe.tools.doctor.walk_levels import LevelWalk

__all__ = ["Moments", "Walker", "walker_of"]


@dataclass(frozen=True)
class Moments:
    """When everything of a graph happened, as a walk gives it: seconds from when the first rank begins."""

    step_s: list[float]
    """How long each step took."""
    step_ends_s: Tensor
    """(S, W): when each rank had ended each step."""
    started_s: Tensor
    """(M,): when each exchange had started on its rank."""
    ended_s: Tensor
    """(M,)."""
    waits_since_s: Tensor
    """(M,): since when its rank had nothing to do but to wait for it; NaN where it never waits."""


class Walker:
    """Walks one graph, as often as somebody asks what would be with other times.

    Raises:
        ValueError: the graph has no end: ranks wait for each other in a circle, so files contradict each other.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.tables = graph, graph.tables
        self._way: UniformWalk | LevelWalk = uniform_walk(graph) or LevelWalk(graph)

    def step_times(self, run_s: Tensor, transfer_s: Tensor) -> list[float]:
        """Return the seconds of every step, from when the last rank has ended the one before until it ends this one."""
        (found,) = self.all_step_times(run_s[None], transfer_s[None])
        return found

    def all_step_times(self, run_s: Tensor, transfer_s: Tensor) -> list[list[float]]:
        """Return the same for B sets of times, (B, N) and (B, M)."""
        count = self.num_at_once
        found: list[list[float]] = []
        for first in range(0, len(run_s), count):
            found += self._walk(run_s[first : first + count], transfer_s[first : first + count])[0]
        return found

    @property
    def num_at_once(self) -> int:
        """How many sets of times are walked together."""
        return self._way.num_at_once

    def moments(self, run_s: Tensor, transfer_s: Tensor) -> Moments:
        """Return when every exchange started and ended, and every step."""
        (step_s,), found = self._walk(run_s[None], transfer_s[None], has_moments=True)
        return Moments(step_s, *(of[..., 0] for of in found))

    @torch.no_grad()
    def _walk(self, run_s: Tensor, transfer_s: Tensor, has_moments: bool = False) -> tuple[list[list[float]], Walked]:
        """Return the seconds of every step of each set, and all else that a walk gives."""
        found = self._way.walk(run_s, transfer_s, has_moments)
        ends = found[0].amax(1)
        begin_s = max(self.graph.begin_s, default=0.0)
        first = torch.full((1, len(run_s)), begin_s, dtype=torch.float64, device="cpu")
        ends = torch.cat([first, ends]).cummax(0).values
        return ends.diff(dim=0).clamp(min=0).T.tolist(), found


@functools.lru_cache(maxsize=1)
def walker_of(graph: Graph) -> Walker:
    """Return the walker of a graph, which is kept: what is asked of a run is asked of one graph."""
    return Walker(graph)
