"""align_clocks: ranks whose clocks aren't the same moved onto the first one's, by when all leave short exchanges."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple, TypeAlias

from tritonmoe.tools.doctor.exchange_names import SYMMETRIC
from tritonmoe.tools.doctor.matching import Matched
from tritonmoe.tools.doctor.trace import RankTrace

__all__ = ["align_clocks"]

CLOCK_S = 0.002
"""Clocks that agree no better than that show a rank that has heard from one that had not spoken."""
OFTEN = 0.1
SHORT = 2.0
"""Exchanges tell clocks that take at most so many times as long as one in ten does."""
FEW, FEW_FOR_DRIFT, MOST_FOR_DRIFT = 4, 8, 100


_Meeting: TypeAlias = tuple[float, float, float]
"""An exchange of ranks of two clocks: how long it took (no rank can have left it later after another), and when the
first rank of the one clock left it, and of the other, each on its own."""


class _Shift(NamedTuple):
    """By how much a clock is ahead of another one, at any time of it."""

    ahead_s: float
    drift: float
    since_s: float
    certain_s: float
    lasts_s: float

    @property
    def most_s(self) -> float:
        """How far ahead, or behind, it is at most."""
        return max(self.ahead_s, self.ahead_s + self.drift * self.lasts_s, key=abs)

    def moved(self, moment_s: float) -> float:
        """Return the moment on the other clock."""
        return moment_s - self.ahead_s - self.drift * (moment_s - self.since_s)


def align_clocks(traces: Sequence[RankTrace], hosts: Sequence[str], together: Matched, limits: list[str]) -> None:
    """Move hosts onto the first one's clock, and where clocks still can't be the same, every rank.

    hosts: of every rank; empty where they are not known.
    """
    largest_s = 0.0
    names = list(dict.fromkeys(hosts))
    if len(names) > 1:
        largest_s = _move(traces, [names.index(host) for host in hosts], together)
    if _is_broken(together):
        largest_s = max(largest_s, _move(traces, list(range(len(traces))), together))
    if largest_s:
        limits.append(
            f"the ranks' clocks don't agree (by {1e3 * largest_s:.1f} ms): they are aligned by when exchanges ended"
        )


def _is_broken(together: Matched) -> bool:
    """Return whether ranks leave exchanges before others have come so often that their clocks can't be the same."""
    broken, all_of_them = 0, 0
    for parts in together.values():
        ends = [part.end_s for _, part in parts if part.end_s is not None]
        if len(parts) < 2 or parts[0][1].kind not in SYMMETRIC or len(ends) < len(parts):
            continue
        all_of_them += 1
        broken += min(ends) < max(part.start_s for _, part in parts) - CLOCK_S
    return broken > OFTEN * all_of_them


def _move(traces: Sequence[RankTrace], clocks: Sequence[int], together: Matched) -> float:
    """Move all clocks onto the first one; return by how much at most, 0 where they agree already."""
    meetings = _meetings(clocks, together)
    known: dict[int, list[_Shift]] = {0: []}
    reached = [0]
    for clock in reached:
        for one, other in meetings:
            if clock not in (one, other):
                continue
            new = other if clock == one else one
            if new in known:
                continue
            of_both = meetings[one, other]
            if new == one:
                of_both = [(took_s, end_s, other_end_s) for took_s, other_end_s, end_s in of_both]
            known[new] = [_shift_of(of_both), *known[clock]]
            reached.append(new)
    largest_s = 0.0
    for trace, clock in zip(traces, clocks, strict=True):
        shifts = known.get(clock, [])
        ahead_s = abs(sum(shift.most_s for shift in shifts))
        if ahead_s > sum(shift.certain_s for shift in shifts):
            largest_s = max(largest_s, ahead_s)
            for shift in shifts:
                trace.move(shift.moved)
    return largest_s


def _meetings(clocks: Sequence[int], together: Matched) -> dict[tuple[int, int], list[_Meeting]]:
    """Return the exchanges of the first clock in them with each other one, by both."""
    found: dict[tuple[int, int], list[_Meeting]] = defaultdict(list)
    for parts in together.values():
        if len(parts) < 2 or parts[0][1].kind not in SYMMETRIC:
            continue
        ends: dict[int, float] = {}
        took_s = float("inf")
        for index, part in parts:
            if part.end_s is None:
                break
            clock = clocks[index]
            ends[clock] = min(part.end_s, ends.get(clock, part.end_s))
            took_s = min(took_s, max(0.0, part.end_s - part.start_s))
        else:
            first = min(ends)
            for clock, end_s in ends.items():
                if clock != first:
                    found[first, clock].append((took_s, ends[first], end_s))
    return found


def _shift_of(meetings: Sequence[_Meeting]) -> _Shift:
    """Return by how much the other clock is ahead of the one."""
    ordered = sorted(meetings)
    most_s = SHORT * ordered[len(ordered) // 10][0]
    short = [met for place, met in enumerate(ordered) if met[0] <= most_s or place < FEW]
    since_s = min(other_end_s for _, _, other_end_s in short)
    ahead_s = [other_end_s - end_s for _, end_s, other_end_s in short]
    at_s = [other_end_s - since_s for _, _, other_end_s in short]
    certain_s = statistics.median(took_s for took_s, _, _ in short)
    middle_s = statistics.median(ahead_s)
    begun_s, drift = middle_s, 0.0
    if len(short) >= FEW_FOR_DRIFT:
        some = range(0, len(short), -(-len(short) // MOST_FOR_DRIFT))
        slopes = [
            (ahead_s[last] - ahead_s[first]) / (at_s[last] - at_s[first])
            for first, last in combinations(some, 2)
            if at_s[last] != at_s[first]
        ]
        slope = statistics.median(slopes) if slopes else 0.0
        if abs(slope) * max(at_s) > statistics.median(abs(one - middle_s) for one in ahead_s):
            begun_s = statistics.median(one - slope * at for one, at in zip(ahead_s, at_s, strict=True))
            drift = slope
    return _Shift(begun_s, drift, since_s, certain_s, max(at_s))
