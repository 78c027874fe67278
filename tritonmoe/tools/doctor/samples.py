"""Samples: times of operations that do the same work, what is usual of them, and lines and medians through them."""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonmoe.tools.doctor.pattern import grows

__all__ = [
    "ALIKE",
    "LEAST_S",
    "Samples",
    "by_step",
    "far_out",
    "fit_relative_line",
    "medians",
    "middle",
    "rows_of",
    "slope",
    "weighted_median",
]

JUMP = 1.12
"""Ranks whose medians are further apart than that, and than their noise, are two groups."""
LEAST_FAST = 0.25
"""Such a part of the ranks must be fast for it to be known that it can be done."""
LEAST_VARIED = 0.03
"""Rows that differ by a smaller part of their mean say nothing of what a row costs."""
CERTAIN = 3.0
"""A rank's median is another one if it is so many times its own uncertainty away."""
FAR_OUT = 4.5
"""One operation is out of the noise if it is so many standard deviations away."""
MOST_SKEW = 3.0
"""So much wider than below its median may noise be above it."""
LEAST_S = 20e-6
"""Differences below that are those of clocks."""
ALIKE = 1.05
"""Sizes of which the largest is at most so many times the smallest are one size."""


def middle(table: Tensor) -> Tensor:
    """Return the median of each row of (G, L), of which NaN are no values; of an even number the mean of both."""
    ordered = table.sort(1).values  # NaN last
    counts = (~table.isnan()).sum(1)
    low, high = (((counts - 1 + more) // 2).clamp(min=0) for more in (0, 1))
    return (ordered.gather(1, low[:, None])[:, 0] + ordered.gather(1, high[:, None])[:, 0]) / 2


def level(medians: Sequence[float], noise: float = 0.0) -> float:
    """Return what is usual of ranks' medians: their median, or that of the faster group's where there are two."""
    ordered = sorted(medians)
    best, cut = 1.0, 0
    for place in range(1, len(ordered)):
        low, high = ordered[place - 1], ordered[place]
        if place < LEAST_FAST * len(ordered) or high - low <= CERTAIN * noise:
            continue
        jump = high / low if low > 0 else float("inf")
        if jump > max(JUMP, best):
            best, cut = jump, place
    return statistics.median(ordered[:cut] if cut else ordered)


def rows_of(groups: Tensor, values: Tensor) -> Tensor:
    """Put values (n,) of groups into (G, L), a row for each group that there is, in their order; NaN where it ends."""
    kept, number, counts = groups.unique(return_inverse=True, return_counts=True)
    order = number.argsort(stable=True)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[number[order]]
    table = torch.full((len(kept), int(counts.max())), torch.nan, dtype=torch.float64, device="cpu")
    table[number[order], place] = values[order]
    return table


def slope(rank: Tensor, step: Tensor, size: Tensor, value: Tensor) -> float:
    """Return how much values (n,) grow with their sizes: the median of pairs, by their distance.

    Pairs are of one rank in two steps, or of two ranks in one step.
    """
    largest = float((value / size).nan_to_num(posinf=0.0, neginf=0.0).clamp(min=0).max()) if len(size) else 0.0
    found, weights = [], []
    for groups in (rank, step):
        sizes, values = rows_of(groups, size), rows_of(groups, value)
        by_value = values.argsort(dim=1, stable=True)
        order = by_value.gather(1, sizes.gather(1, by_value).argsort(dim=1, stable=True))
        sizes, values = sizes.gather(1, order), values.gather(1, order)
        counts = (~sizes.isnan()).sum(1, keepdim=True)
        first = torch.arange(sizes.shape[1])[None].expand_as(sizes)
        last = (counts - 1 - first).clamp(min=0)
        distance, height = sizes.gather(1, last) - sizes, values.gather(1, last) - values
        counts_here = (distance > 0) & (first < last)
        found.append((height / distance)[counts_here])
        weights.append(distance[counts_here])
    slopes, distances = torch.cat(found), torch.cat(weights)
    if not len(slopes):
        return 0.0
    return min(max(0.0, float(medians(slopes, distances))), largest)


class Samples:
    """The times of all operations of one key: what each takes too long, and what its size makes of it."""

    def __init__(
        self,
        rank: Tensor,
        step: Tensor,
        sizes: Tensor | None,
        times: Tensor,
        num_steps: int,
        fair: Tensor | None = None,
        unit_s: float | None = None,
        can_last: bool = True,
    ) -> None:
        """sizes: None of times in which nothing is done: if they are of two clearly different lengths, on every rank,
        that is no noise, and the shorter ones are usual, however often the others come.

        fair: the size that every rank would have in a step if all had the same; None: the mean of ranks. unit_s: what
        one more of a size costs; None: found by comparison. can_last: whether a rank that always takes longer than
        others is at fault.
        """
        has_modes = sizes is None
        if sizes is None:
            sizes = torch.zeros_like(times)
        if fair is None:
            fair = by_step(step, sizes, "mean", num_steps)
        mean = float(sizes.mean())
        if unit_s is not None:
            mean = float(fair[step].mean())
        elif mean > 0 and float(sizes.max() - sizes.min()) > LEAST_VARIED * mean:
            unit_s = slope(rank, step, sizes, times)
        else:
            unit_s = 0.0
        self.of_size = unit_s * (sizes - fair[step])
        """Seconds that each takes more than at the mean size of its step."""
        rest = times - unit_s * (sizes - mean)
        table = rows_of(rank, rest)
        medians = table.nanmedian(1).values
        noise = float(middle(1.4826 * middle((table - middle(table)[:, None]).abs())[None])[0])
        count = len(rest) / len(medians)
        uncertain = max(LEAST_S, noise * 1.25 / count**0.5, _uncertainty(table)) if count > 1 else LEAST_S
        usual = level(medians.tolist(), uncertain)
        of_rank = rank.unique(return_inverse=True)[1]
        short = _shorter_mode(table) if has_modes else None
        if short is not None:
            medians = short.nanmedian(1).values
            usual = level(medians.tolist(), uncertain)
        residuals = rest - medians[of_rank]
        of_noise = residuals if short is None else (short - medians[:, None])[~short.isnan()]
        far = max(FAR_OUT * _deviation(of_noise), LEAST_S)
        if len(medians) == 1 and grows(rest.tolist(), JUMP):  # no other rank tells what is usual: its first steps do
            usual = float(rest[: len(rest) // 3].min())
            medians, residuals, far = medians.new_full((1,), usual), rest - usual, LEAST_S
        is_certain = can_last & ((medians - usual).abs() > CERTAIN * uncertain)
        lasting = torch.where(is_certain, medians - usual, 0.0)[of_rank]
        # What takes far less than its rank's others takes what is usual: nothing is wrong with it.
        less = torch.maximum(lasting + residuals, lasting.clamp(max=0))
        self.excess = torch.where(residuals > far, lasting + residuals, torch.where(residuals < -far, less, lasting))
        """Seconds above (or below) what is usual, without noise."""
        self.scattered = torch.where(residuals > far, residuals, 0.0)
        """What of that is not there in most steps."""
        self.levels = (usual + unit_s * (fair[step] - mean) + self.of_size).clamp(min=0)


def _uncertainty(table: Tensor) -> float:
    """Return how far medians of the rows of (G, L) may be off, in the middle of all rows; NaN are no values.

    Where values are now of one kind and now of another, as if drawn, medians are too: the values beside them tell.
    """
    ordered, counts = table.sort(1).values, (~table.isnan()).sum(1)
    low, high = ((counts - 1) / 2 + side * counts.sqrt() / 2 for side in (-1, 1))
    last = (counts - 1).clamp(min=0)
    low, high = (of.round().to(torch.int64).clamp(min=0).minimum(last) for of in (low, high))
    widths = ordered.gather(1, high[:, None]) - ordered.gather(1, low[:, None])
    return float(middle(widths.T / 2)[0])


def _shorter_mode(table: Tensor) -> Tensor | None:
    """Return (G, L) with NaN for all but the shorter values, where there are two lengths on every rank; else None."""
    values = table[~table.isnan()].sort().values
    few = max(2, math.ceil(LEAST_FAST * len(values)))
    if len(values) < 2 * few:
        return None
    gaps = values.diff()[few - 1 : len(values) - few]
    place = few + int(gaps.argmax())
    if float(gaps.max()) <= CERTAIN * max(float(values[place - 1] - values[0]), LEAST_S):
        return None
    short = torch.where(table < values[place], table, torch.nan)
    has_both = (~short.isnan()).sum(1) >= LEAST_FAST * (~table.isnan()).sum(1)
    return short if bool(has_both.all()) else None


def by_step(step: Tensor, values: Tensor, what: str, num_steps: int) -> Tensor:
    """Return the mean, or the largest (amax) or smallest (amin) value of each step or exchange (S,); else NaN."""
    found = torch.full((num_steps,), torch.nan, dtype=torch.float64, device="cpu")
    return found.scatter_reduce(0, step, values, what, include_self=False)


def _deviation(residuals: Tensor) -> float:
    """Return the standard deviation of noise, of which up to a third of all values above is none."""
    ordered = residuals.sort().values
    quarter, half, above = (float(ordered[int((len(ordered) - 1) * part)]) for part in (0.25, 0.5, 0.65))
    below_s, above_s = (half - quarter) / 0.674, (above - half) / 0.385
    return max(below_s, min(above_s, MOST_SKEW * below_s))


def far_out(values: Tensor) -> Tensor:
    """Return by how much values (n,) are above the middle one where that is more than noise, else 0."""
    more = values - values.nanmedian()
    return torch.where(more > max(FAR_OUT * _deviation(more), LEAST_S), more, 0.0)


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
    points = torch.tensor(values, dtype=torch.float64, device="cpu")
    return float(medians(*points.T))


def medians(values: Tensor, weights: Tensor) -> Tensor:
    """Return weighted_median along the first axis of values and weights (n, ...); NaN where all weights are 0."""
    ordered, order = torch.where(weights > 0, values, torch.inf).sort(0)
    reached = weights.gather(0, order).cumsum(0)
    is_enough = reached >= 0.5 * reached[-1]
    found = ordered.gather(0, is_enough.to(torch.int8).argmax(0)[None])[0]
    return torch.where(reached[-1] > 0, found, torch.nan)
