"""Lines and medians through measured times, whose error grows with the time."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ALIKE", "fit_relative_line", "quantiles", "trimmed_mean", "weighted_median", "weighted_quantile"]

ALIKE = 1.05
"""Sizes of which the largest is at most so many times the smallest are one size."""


def fit_relative_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Give (fixed, slope), neither negative, of the line through (x, y) with the least squared relative error.

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


def trimmed_mean(values: Sequence[float]) -> float:
    """Give the mean without the largest of every eight values.

    Times have long tails, which the steps of a call share out among themselves: the sum of their medians would be less
    than the median of their sums.
    """
    ordered = sorted(values)
    kept = ordered[: len(ordered) - len(ordered) // 8]
    return sum(kept) / len(kept)


def weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """Give the value in the middle of (value, weight), of two the smaller one."""
    return weighted_quantile(values, 0.5)


def weighted_quantile(values: Sequence[tuple[float, float]], share: float) -> float:
    """Give the smallest value of (value, weight) that, with all smaller ones, has so large a share of the weight."""
    ordered = sorted(values)
    wanted, reached = share * sum(weight for _, weight in ordered), 0.0
    for value, weight in ordered:
        reached += weight
        if reached >= wanted:
            return value
    return ordered[-1][0]


def quantiles(values: Tensor, weights: Tensor, share: float) -> Tensor:
    """Give weighted_quantile along the first axis of values and weights (n, ...); NaN where all weights are 0."""
    ordered, order = torch.where(weights > 0, values, torch.inf).sort(0)
    reached = weights.gather(0, order).cumsum(0)
    is_enough = reached >= share * reached[-1] * (1 - 1e-12)
    found = ordered.gather(0, is_enough.to(torch.int8).argmax(0)[None])[0]
    return torch.where(reached[-1] > 0, found, torch.nan)
