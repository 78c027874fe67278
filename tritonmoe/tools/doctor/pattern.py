"""When a cause costs time: in all steps, growing, in every n-th step, or now and then."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

__all__ = ["FEW_STEPS", "Pattern", "When", "costly_steps", "grows", "pattern_of"]

When: TypeAlias = Literal["always", "growing", "for a while", "warm-up", "periodic", "at random", "once", "unknown"]
FEW_STEPS = 3
GROWN = 2.0
"""The last third costs so many times what the first one does."""
MONOTONE = 0.75
FEW_GROWING = 6
"""Of fewer values nobody can say that they grow."""
STEADY = 0.5
"""Costs are there in most steps if so much of them is left where no step has more than twice the median."""
LEVEL = 1.25
"""What is there for a while has so many times as much in its second half at most."""
WARMED = 0.25
"""What only such a part of the steps has, the first ones, is warming up."""


@dataclass(frozen=True)
class Pattern:
    """When something costs time."""

    when: When
    period: int = 0
    """Of a periodic one: every so many steps."""
    num_costly: int = 0
    num_steps: int = 0
    since: int | None = None
    """Of what is there for a while: the number of the first step that has it; None: the first one of all."""
    until: int | None = None
    """And of the last one; None: the last one of all."""

    def __str__(self) -> str:
        return {
            "always": "in every step",
            "growing": "growing from step to step",
            "for a while": _while_words(self.since, self.until),
            "warm-up": f"up to step {self.until}, which is warm-up",
            "periodic": f"in every {_ordinal(self.period)} step" + ", seen twice" * (self.num_costly == 2),
            "at random": f"in {self.num_costly} of {self.num_steps} steps, at no regular distance",
            "once": f"in one of {self.num_steps} steps",
            "unknown": "in the few steps of these files",
        }[self.when]


def _while_words(since: int | None, until: int | None) -> str:
    if since is None:
        return f"up to step {until}"
    return f"from step {since} on" if until is None else f"from step {since} to step {until}"


def _ordinal(count: int) -> str:
    return f"{count}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(count if count < 20 else count % 10, 'th') }"


def costly_steps(costs_s: Sequence[float]) -> list[int]:
    """Return the steps that cost at least half of what the costly ones do; a single one may be an accident.

    Where most steps have a cost, and a few of them more, it is half of the median.
    """
    middle = statistics.median(costs_s) if costs_s else 0.0
    if middle > 0 and sum(min(cost, 2 * middle) for cost in costs_s) >= STEADY * sum(costs_s):
        return [step for step, cost in enumerate(costs_s) if cost > middle / 2]
    *_, second, most = sorted([0.0, 0.0, *costs_s])
    half = (second if second >= 0.4 * most else most) / 2
    return [step for step, cost in enumerate(costs_s) if cost > half > 0]


def pattern_of(costs_s: Sequence[float], steps: Sequence[int]) -> Pattern:
    """Return when a cause costs time, by its cost in each step; steps: their numbers."""
    count = len(costs_s)
    costly = costly_steps(costs_s)
    if count < FEW_STEPS or not costly:
        return Pattern("unknown", 0, len(costly), count)
    while_there = _stretch_of(costs_s, costly)
    if while_there is not None:
        first, last = while_there
        when: When = "for a while" if first or last + 1 > WARMED * count else "warm-up"
        since, until = steps[first] if first else None, steps[last] if last + 1 < count else None
        return Pattern(when, 0, len(costly), count, since, until)
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


def _stretch_of(costs_s: Sequence[float], costly: Sequence[int]) -> tuple[int, int] | None:
    """Return the first and the last of costly steps that follow each other, but for a few; None where they don't.

    Some steps are without it, and these cost next to nothing. Of first steps, which may be warm-up, one is enough.
    """
    first, last = costly[0], costly[-1]
    inside = last + 1 - first
    is_warm_up = first == 0 and inside <= WARMED * len(costs_s)
    fewest = min(len(costly), len(costs_s) - inside)
    if (fewest < FEW_STEPS and not is_warm_up) or inside - len(costly) > inside // 5:
        return None
    own = costs_s[first : last + 1]
    mean_s, half = statistics.fmean(own), (inside + 1) // 2
    if statistics.fmean(own[-half:]) > LEVEL * statistics.fmean(own[:half]):
        return None  # it grows
    outside = [cost for step, cost in enumerate(costs_s) if not first <= step <= last]
    return (first, last) if statistics.fmean(outside) < mean_s / 4 else None


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
