"""When a cause costs time: in all steps, growing, in every n-th step, or now and then."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

__all__ = ["FEW_STEPS", "Pattern", "When", "costly_steps", "grows", "pattern_of"]

When: TypeAlias = Literal["always", "growing", "periodic", "at random", "once", "unknown"]
FEW_STEPS = 3
GROWN = 2.0
"""The last third costs so many times what the first one does."""
MONOTONE = 0.75
FEW_GROWING = 6
"""Of fewer values nobody can say that they grow."""


@dataclass(frozen=True)
class Pattern:
    """When something costs time."""

    when: When
    period: int = 0
    """Of a periodic one: every so many steps."""
    num_costly: int = 0
    num_steps: int = 0

    def __str__(self) -> str:
        return {
            "always": "in every step",
            "growing": "growing from step to step",
            "periodic": f"in every {_ordinal(self.period)} step" + ", seen twice" * (self.num_costly == 2),
            "at random": f"in {self.num_costly} of {self.num_steps} steps, at no regular distance",
            "once": f"in one of {self.num_steps} steps",
            "unknown": "in the few steps of these files",
        }[self.when]


def _ordinal(count: int) -> str:
    return f"{count}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(count if count < 20 else count % 10, 'th') }"


def costly_steps(costs_s: Sequence[float]) -> list[int]:
    """Return the steps that cost at least half of what the costly ones do; a single one may be an accident."""
    *_, second, most = sorted([0.0, 0.0, *costs_s])
    half = (second if second >= 0.4 * most else most) / 2
    return [step for step, cost in enumerate(costs_s) if cost > half > 0]


def pattern_of(costs_s: Sequence[float]) -> Pattern:
    """Return when a cause costs time, by its cost in each step."""
    count = len(costs_s)
    costly = costly_steps(costs_s)
    if count < FEW_STEPS or not costly:
        return Pattern("unknown", 0, len(costly), count)
    if grows(costs_s, GROWN):
        return Pattern("growing", 0, len(costly), count)
    if len(costly) >= 0.75 * count:
        return Pattern("always", 0, len(costly), count)
    if len(costly) == 1:
        return Pattern("once", 0, 1, count)
    period = _period(costly, count)
    if period:
        return Pattern("periodic", period, len(costly), count)
    return Pattern("at random", 0, len(costly), count)


def grows(values: Sequence[float], times: float) -> bool:
    """Return whether values get larger from one to the next, in the end so many times as large as in the beginning."""
    third = max(1, len(values) // 3)
    first, last = statistics.fmean(values[:third]), statistics.fmean(values[-third:])
    return len(values) >= FEW_GROWING and last > times * max(first, 0.0) and _rank_correlation(values) > MONOTONE


def _period(costly: Sequence[int], count: int) -> int:
    """Return the distance of costly steps if it is one and the same, a step more or less of them allowed; else 0."""
    gaps = [after - before for before, after in pairwise(costly)]
    period = statistics.mode(gaps)
    if period < 2:
        return 0
    phase = statistics.mode(step % period for step in costly)
    expected = [step for step in range(count) if step % period == phase]
    hits = len(set(expected) & set(costly))
    odd = len(set(expected) ^ set(costly))
    return period if hits >= 2 and odd <= max(0, len(expected) // 4) else 0


def _rank_correlation(values: Sequence[float]) -> float:
    """Return Spearman's correlation of values with their place."""
    count = len(values)
    order = sorted(range(count), key=lambda place: values[place])
    ranks = [0] * count
    for rank, place in enumerate(order):
        ranks[place] = rank
    return 1 - 6 * sum((rank - place) ** 2 for place, rank in enumerate(ranks)) / (count * (count * count - 1))
