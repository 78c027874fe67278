"""Calls of a day: which cases a call of so many seconds runs, and what is left for the next one."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from bench.gpu.plan import Case
from tritonmoe.runtime.files import Json

__all__ = ["Choice", "calls", "expected_s", "run_call", "words"]


def words(text: str) -> tuple[str, ...]:
    """Return what stands between commas."""
    return tuple(filter(None, (word.strip() for word in text.split(","))))


class Choice(NamedTuple):
    """Which cases are run."""

    only: tuple[str, ...]
    skip: tuple[str, ...]

    def has(self, case: Case) -> bool:
        def is_one_of(words: tuple[str, ...]) -> bool:
            return any(word == case.name[0] or (len(word) > 1 and word in case.name) for word in words)

        return (not self.only or is_one_of(self.only)) and not is_one_of(self.skip)


def expected_s(case: Case, plan: Sequence[Case], by_case: Mapping[str, Json]) -> float:
    """Return how long a case may last: a quarter longer than any that measured the same, if one did."""
    alike = [by_case.get(one.name, {}).get("seconds") for one in plan if one.measure == case.measure]
    measured = [seconds for seconds in alike if seconds is not None]
    return min(1.25 * max(measured), case.limit_s) if measured else case.usual_s


def run_call(cases: Sequence[Case], fits: Callable[[Case], bool], run: Callable[[Case], bool]) -> list[Case]:
    """Run every case that fits when its turn comes, and return those that are left.

    run: says whether the case was run.
    """
    left: list[Case] = []
    for case in cases:
        # What waits for tiles that were measured waits for all of them.
        waits = case.needs_tuned and any(one.name[0] == "C" for one in left)
        if waits or not fits(case) or not run(case):
            left.append(case)
    return left


class Call:
    """What one call would run."""

    def __init__(self, budget_s: float, last_s: Callable[[Case], float]) -> None:
        self.cases: list[Case] = []
        self.seconds = 0.0
        self._budget_s, self._last_s = budget_s, last_s

    def fits(self, case: Case) -> bool:
        return self.seconds + self._last_s(case) <= self._budget_s

    def add(self, case: Case) -> bool:
        self.cases.append(case)
        self.seconds += self._last_s(case)
        return True

    def __str__(self) -> str:
        counts = collections.Counter((case.name[0], case.measure) for case in self.cases)
        names = (f"{stage} {measure}{f' x{count}' * (count > 1)}" for (stage, measure), count in counts.items())
        return f"{self.seconds:.0f} s: {', '.join(names)}"


def calls(
    missing: Sequence[Case], plan: Sequence[Case], by_case: Mapping[str, Json], budget_s: float
) -> Iterator[Call]:
    """Return the calls that run what is missing, each case as long as it may last; what never fits is in none."""
    left = list(missing)
    while left:
        call = Call(budget_s, lambda case: expected_s(case, plan, by_case))
        left = run_call(left, call.fits, call.add)
        if not call.cases:
            return
        yield call
