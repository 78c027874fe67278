"""matched: the exchanges of ranks' traces put together, when those ended, and their ranks' clocks moved onto one."""

import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple, TypeAlias

from tritonmoe.tools.doctor.exchange_names import SYMMETRIC
from tritonmoe.tools.doctor.trace import Part, RankTrace

__all__ = ["PAIRS", "Matched", "OfSteps", "align_clocks", "bound_ends", "idle_since", "matched"]

OfSteps: TypeAlias = list[list[Part]]
"""The exchanges of each step of one rank, in the order in which they were handed over."""
Matched: TypeAlias = dict[int, list[tuple[int, Part]]]
"""The parts of every exchange: (index of the rank, part)."""
PAIRS = ("send", "recv")
NO_WAIT_S = 50e-6
USUALLY = 0.25
"""A transfer whose end nobody waited for is taken to last as long as this part of those like it at most."""


def matched(traces: Sequence[RankTrace], of_steps: Sequence[OfSteps], limits: list[str]) -> Matched:
    """Match exchanges over ranks: by group and sequence, where files have them, else by their order in a step."""
    peers = _peers(traces, of_steps)
    lists: dict[tuple, dict[int, list[Part]]] = defaultdict(lambda: defaultdict(list))
    for index, steps in enumerate(of_steps):
        for step, parts in enumerate(steps):
            for part in parts:
                group: object = part.group
                if group is not None:
                    # Groups of one name but other ranks are different ones: each has its own on every rank.
                    group = (part.group, part.group_ranks or traces[index].groups.get(str(part.group)))
                kind = part.kind
                if kind in PAIRS:
                    other = peers.get((index, kind, part.group, part.peer))
                    pair = (index, other) if kind == "send" else (other, index)
                    group, kind = (("alone", index), kind) if other is None else (("pair", *pair), "transfer")
                lists[step, group, kind][index].append(part)
    found: Matched = {}
    unmatched = 0
    for (_, group, _), by_rank in lists.items():
        counts = {len(parts) for parts in by_rank.values()}
        if len(counts) == 1 and (group is not None or len(by_rank) == len(traces)):
            for together in zip(*by_rank.values(), strict=True):
                found[len(found)] = list(zip(by_rank, together, strict=True))
            continue
        by_sequence: dict[object, list[tuple[int, Part]]] = defaultdict(list)
        for index, parts in by_rank.items():
            for part in parts:
                key: object = ("alone", id(part)) if part.sequence is None else part.sequence
                by_sequence[key].append((index, part))
        for parts_of_one in by_sequence.values():
            found[len(found)] = parts_of_one
            unmatched += len(parts_of_one) == 1 and len(traces) > 1
    if unmatched:
        limits.append(
            f"{unmatched} exchanges match no exchange of other ranks (groups or numbers of calls differ): each "
            "counts alone"
        )
    return found


_Way: TypeAlias = tuple[int, str, str | None, int | None]
"""Sends or receives of a rank, by the index of the rank, kind, group, and what the file says of the other rank."""


def _peers(traces: Sequence[RankTrace], of_steps: Sequence[OfSteps]) -> dict[_Way, int]:
    """Return the other rank of sends and receives, by its index, and tell parts which way they go.

    A file has the other rank's number in the group, but over gloo not which group that is: of the groups that the rank
    is in, it is the one in which the other rank has as many receives (or sends) from this one.
    """
    index_of = {trace.rank: index for index, trace in enumerate(traces) if trace.rank is not None}
    ways: dict[_Way, list[Part]] = defaultdict(list)
    for index, steps in enumerate(of_steps):
        for parts in steps:
            for part in parts:
                if part.kind in PAIRS:
                    ways[index, part.kind, part.group, part.peer].append(part)
    found: dict[_Way, int] = {}
    for (index, kind, group, peer), parts in ways.items():
        other_kind = PAIRS[1 - PAIRS.index(kind)]
        for ranks in _groups_of(traces[index], parts[0]):
            other = index_of.get(ranks[peer]) if peer is not None and 0 <= peer < len(ranks) else None
            if other is None or other == index or traces[index].rank not in ranks:
                continue
            back = ranks.index(traces[index].rank)
            if len(ways.get((other, other_kind, group, back), ())) == len(parts):
                found[index, kind, group, peer] = other
                break
    for (index, kind, group, peer), other in found.items():
        which = "a later" if other > index else "an earlier"
        for part in ways[index, kind, group, peer]:
            part.way, part.other = f"{kind} {'to' if kind == 'send' else 'from'} {which} rank", other
    return found


def _groups_of(trace: RankTrace, part: Part) -> Iterator[Sequence[int]]:
    """Return the groups that a send or receive may be of: its own if that is known, else small ones first, then all."""
    known = part.group_ranks or trace.groups.get(str(part.group))
    if known is not None:
        yield known
    else:
        yield from sorted((ranks for ranks in trace.groups.values() if trace.rank in ranks), key=len)
    yield range(1 << 24)  # its number in the job


def idle_since(trace: RankTrace, moment_s: float) -> float:
    """Return since when the computing lane has been idle at this moment."""
    before = bisect_left(trace.busy_start_s, moment_s)
    return trace.busy_end_s[before - 1] if before else float("-inf")


def bound_ends(traces: Sequence[RankTrace], found: Matched) -> None:
    """Estimate the ends of transfers whose trace has only when the host noticed their completion.

    A send ends no later than the receive of the same rows. A receive for which nobody stood still ended before it was
    noticed: it is taken to last as long as others of that pair do which were waited for.
    """
    waited: dict[tuple, list[float]] = defaultdict(list)
    open_ended: list[tuple[tuple, float, list[tuple[int, Part]]]] = []
    for parts in found.values():
        if parts[0][1].kind not in PAIRS or not all(part.is_noticed for _, part in parts):
            continue
        index, last = next((one for one in parts if one[1].kind == "recv"), parts[0])
        for _, part in parts:  # a send may be noted later than its rows arrive
            part.start_s = max(part.posted_s, min(part.start_s, last.end_s or part.start_s))
        latest_s = max(part.start_s for _, part in parts)
        end_s = max(latest_s, last.end_s or latest_s)
        for _, part in parts:
            part.end_s = min(max(latest_s, part.end_s or end_s), end_s)
        pair = tuple(sorted((part.kind, one) for one, part in parts))
        if end_s - max(idle_since(traces[index], end_s), last.posted_s) > NO_WAIT_S:
            waited[pair].append(end_s - latest_s)
        else:
            open_ended.append((pair, latest_s, parts))
    for pair, latest_s, parts in open_ended:
        like = sorted(waited.get(pair, ()))
        if like:
            most_s = latest_s + like[int(USUALLY * (len(like) - 1))]
            for _, part in parts:
                part.end_s = min(part.end_s or most_s, most_s)


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
