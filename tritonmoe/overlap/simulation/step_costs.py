"""StepCosts: what steps of the compute lane cost, lines and curves through measured times; read by the simulator."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from tritonmoe.overlap.steps import StepKind

__all__ = ["StepCosts", "fit_line"]

Size = TypeVar("Size", float, Tensor)


@dataclass(frozen=True)
class StepCosts:
    """The seconds of the compute lane that steps of each kind take: fixed_s of a step, and unit_s of each of its units.

    The kind of a step says what its unit is (steps.Unit). A kind that is missing costs nothing, and so does a step
    without a unit. The cost of an exchange is that of posting it, which packs its rows.
    """

    fixed_s: Mapping[str, float]
    unit_s: Mapping[str, float]
    bends: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Where the line of a kind bends: (units, seconds that each unit beyond them costs more, or less), ascending."""
    slowness: Mapping[str, Tensor] = field(default_factory=dict)
    """(W,) how many times as long as that steps of a kind take on each rank; a kind that is missing: once."""

    def on_ranks(self, kind: str, units: Tensor) -> Tensor:
        """Return the seconds (W,) of a step with so many units (W,) on each rank."""
        seconds = torch.as_tensor(self.seconds(kind, units), dtype=torch.float64, device="cpu")
        return seconds * self.slowness[kind] if kind in self.slowness else seconds

    def seconds(self, kind: str, units: Size) -> Size:
        total = units * self.unit_s.get(kind, 0.0) + (units > 0) * self.fixed_s.get(kind, 0.0)
        for bend, unit_s in self.bends.get(kind, ()):
            total = total + (units > bend) * (units - bend) * unit_s
        return total

    def with_copies(self) -> "StepCosts":
        """Return costs in which copies take for their pairs what own experts take for theirs."""
        pairs = [(kind, kind.copy_kind) for kind in StepKind if kind.copy_kind is not None]
        parts = (self.fixed_s, self.unit_s, self.bends, self.slowness)
        return StepCosts(*({**part, **{copies: part[own] for own, copies in pairs if own in part}} for part in parts))

    def of_one_more_chunk(self, kind: str, units: float) -> float:
        """Return the seconds by which two steps of half the units take longer than one step."""
        return 2 * self.seconds(kind, units / 2) - self.seconds(kind, units)

    @classmethod
    def fit(cls, samples: Iterable[tuple[str, float, float]]) -> "StepCosts":
        """Fit a line to (kind, units, seconds) of measured steps, kind by kind; neither part is negative."""
        lines = {kind: fit_line(points) for kind, points in _by_kind(samples).items()}
        return cls({k: fixed for k, (fixed, _) in lines.items()}, {k: unit for k, (_, unit) in lines.items()})

    @classmethod
    def through(cls, samples: Iterable[tuple[str, float, float]]) -> "StepCosts":
        """Join (kind, units, seconds) of measured steps by straight lines, kind by kind.

        More units never cost less. The first and the last line go on beyond the smallest and the largest step, though
        not below zero.
        """
        lines = {kind: _join(points) for kind, points in _by_kind(samples).items()}
        return cls(
            {kind: fixed for kind, (fixed, _) in lines.items()},
            {kind: slopes[0][1] for kind, (_, slopes) in lines.items()},
            {
                kind: [(at, after - before) for (_, before), (at, after) in pairwise(slopes)]
                for kind, (_, slopes) in lines.items()
            },
        )


def _by_kind(samples: Iterable[tuple[str, float, float]]) -> dict[str, list[tuple[float, float]]]:
    """Return (units, seconds) by kind."""
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for kind, units, seconds in samples:
        by_kind.setdefault(kind, []).append((units, seconds))
    return by_kind


ALIKE = 1.05
"""Two numbers of units are taken for the same one if the larger is at most this many times the smaller."""


def _join(points: Sequence[tuple[float, float]]) -> tuple[float, list[tuple[float, float]]]:
    """Return seconds at zero units, and a curve's slopes through the points as (units from which, seconds per unit).

    Points of about the same number of units (ALIKE) are taken as one with their median time, of two with the shorter
    one: the slope of a line through them would be noise.

    Example:
        _join([(2, 3), (4, 4), (8, 12)]) gives (2, [(0, 0.5), (4, 2)]).
    """
    alike: list[list[tuple[float, float]]] = []
    for point in sorted(point for point in points if point[0] > 0):
        if alike and point[0] <= ALIKE * alike[-1][0][0]:
            alike[-1].append(point)
        else:
            alike.append([point])
    if not alike:
        return 0.0, [(0.0, 0.0)]
    sizes = [statistics.mean(units for units, _ in group) for group in alike]
    times = list(accumulate((statistics.median_low([seconds for _, seconds in group]) for group in alike), max))
    slopes = [(b - a) / (v - u) for (u, v), (a, b) in zip(pairwise(sizes), pairwise(times), strict=True)]
    fixed = max(0.0, times[0] - slopes[0] * sizes[0]) if slopes else 0.0
    first = (times[0] - fixed) / sizes[0]
    joined = [(0.0, first), *zip(sizes, slopes, strict=False)]
    return fixed, [piece for n, piece in enumerate(joined) if n == 0 or piece[1] != joined[n - 1][1]]


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (fixed, slope), neither negative, of the line through (x, y) with the least squared error.

    Example:
        fit_line([(0, 1), (2, 2), (4, 3)]) gives (1, 0.5).
    """
    count = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    fixed = mean_y - slope * mean_x
    if slope <= 0 or not spread:
        # All alike, or falling: with nothing to tell them apart, the cost is proportional where it can be.
        return (0.0, max(0.0, mean_y / mean_x)) if mean_x > 0 and not spread else (max(0.0, mean_y), 0.0)
    if fixed < 0:
        squares = sum(x * x for x, _ in points)
        return 0.0, sum(x * y for x, y in points) / squares
    return fixed, slope
