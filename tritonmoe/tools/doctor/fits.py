"""Lines and medians through measured times, whose error grows with the time."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ALIKE", "fit_relative_line", "medians", "weighted_median"]

ALIKE = 1.05
"""Sizes of which the largest is at most so many times the smallest are one size."""


def fit_relative_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (fixed, slope), neither negative, of the line through (x, y) with the least squared relative error.

    Points of one x tell the slope alone.
    """
    points = [(x, y) for x, y in points if x > 0 and y > 0]
    if not points:
        return 0.0, 0.0
    only_slope = sum(x / y for x, y in points) / sum((x / y) ** 2 for x, y in points)
    if max(x for x, _ in points) < ALIKE * min(x for x, _ in points):
        return 0.0, only_slope
    # Least squares of (fixed + slope x - y) / y.
    ones, cross = sum(1 / y**2 for _, y in points), sum(x / y**2 for x, y in points)
    squares, right, slanted = (
        sum((x / y) ** 2 for x, y in points),
        sum(1 / y for _, y in points),
        sum(x / y for x, y in points),
    )
    determinant = ones * squares - cross**2
    fixed, slope = (right * squares - cross * slanted) / determinant, (ones * slanted - cross * right) / determinant
    if fixed < 0:
        return 0.0, only_slope
    if slope < 0:
        return right / ones, 0.0
    return fixed, slope


def weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """Return the smallest value of (value, weight) that, with all smaller ones, has half of the weight."""
    ordered = sorted(values)
    half, reached = 0.5 * sum(weight for _, weight in ordered), 0.0
    for value, weight in ordered:
        reached += weight
        if reached >= half:
            return value
    return ordered[-1][0]


def medians(values: Tensor, weights: Tensor) -> Tensor:
    """Return weighted_median along the first axis of values and weights (n, ...); NaN where all weights are 0."""
    ordered, order = torch.where(weights > 0, values, torch.inf).sort(0)
    reached = weights.gather(0, order).cumsum(0)
    is_enough = reached >= 0.5 * reached[-1]
    found = ordered.gather(0, is_enough.to(torch.int8).argmax(0)[None])[0]
    return torch.where(reached[-1] > 0, found, torch.nan)
