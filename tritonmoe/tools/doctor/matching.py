"""matched: the exchanges of ranks' traces put together, and when those ended that were only noticed later."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

from tritonmoe.tools.doctor.trace import Part, RankTrace

__all__ = ["Matched", "OfSteps", "as_all_to_alls", "bound_ends", "idle_since", "matched"]

OfSteps: TypeAlias = list[list[Part]]
"""The exchanges of each step of one rank, in the order in which they were handed over."""
Matched: TypeAlias = dict[int, list[tuple[int, Part]]]
"""The parts of every exchange: (index of the rank, part)."""
PAIRS = ("send", "recv")
AT_ONCE_S = 1e-3
"""A send so shortly behind a receive is of the same exchange."""
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
            part.way = f"{kind} {'to' if kind == 'send' else 'from'} {which} rank"
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
        latest_s = max(part.start_s for _, part in parts)
        index, last = next((one for one in parts if one[1].kind == "recv"), parts[0])
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


def as_all_to_alls(traces: Sequence[RankTrace], limits: list[str]) -> None:
    """Join sends and receives that a trace has without their peers to exchanges of all ranks.

    So the layers of this package exchange rows over gloo: receives from all others, and the sends to them behind these.
    Labels tell the exchanges of newer traces; of older ones their order does, between two ranks even where some
    messages are missing, since they had no rows. Where it doesn't, the limits say that nobody knows with whom they are.
    """
    untold = [[part for part in trace.parts if part.kind in PAIRS and part.peer is None] for trace in traces]
    if not any(untold) or len(traces) < 2:
        return
    ordered = [sorted(parts, key=lambda part: part.posted_s) for parts in untold]
    batches = _of_all(ordered) or _of_two(ordered)
    if batches is None:
        limits.append(
            "the files don't name the other rank of sends and receives: each counts alone, and which rank waits "
            "for which is not known"
        )
        return
    for trace, parts, found in zip(traces, untold, batches, strict=True):
        joined = {id(part) for part in parts}
        trace.parts = [*(part for part in trace.parts if id(part) not in joined), *map(_exchange, found)]
        trace.parts.sort(key=lambda part: part.posted_s)


_Batches: TypeAlias = list[list[Part]]


def _of_all(ranks: Sequence[Sequence[Part]]) -> list[_Batches] | None:
    """Return each rank's batches of a receive from and a send to each other rank; None where they don't come so."""
    size = 2 * (len(ranks) - 1)
    batches = [[list(parts[first : first + size]) for first in range(0, len(parts), size)] for parts in ranks]
    wanted = ["recv"] * (size // 2) + ["send"] * (size // 2)
    are_whole = all([part.kind for part in batch] == wanted for found in batches for batch in found)
    return batches if are_whole and len({len(found) for found in batches}) == 1 else None


def _of_two(ranks: Sequence[Sequence[Part]]) -> list[_Batches] | None:
    """Return the batches of two ranks: the n-th send of one is the n-th receive of the other; None where none can be.

    What one rank has handed over at once is one exchange on both.
    """
    if len(ranks) != 2 or any(
        sum(part.kind == "send" for part in one) != sum(part.kind == "recv" for part in other)
        for one, other in (ranks, ranks[::-1])
    ):
        return None
    parts = [*ranks[0], *ranks[1]]
    together = list(range(len(parts)))

    def first_of(place: int) -> int:
        while together[place] != place:
            together[place] = place = together[together[place]]
        return place

    for first in (0, len(ranks[0])):
        own = range(first, first + len(ranks[first > 0]))
        for before, after in pairwise(own):
            is_batch = (parts[before].kind, parts[after].kind) == PAIRS[::-1]
            if is_batch and parts[after].posted_s - parts[before].posted_s < AT_ONCE_S:
                together[first_of(after)] = first_of(before)
    for one, other in (ranks, ranks[::-1]):
        offsets = {id(part): place for place, part in enumerate(parts)}
        sent, received = ([part for part in of if part.kind == kind] for of, kind in ((one, "send"), (other, "recv")))
        for source, target in zip(sent, received, strict=True):
            roots = sorted(first_of(offsets[id(part)]) for part in (source, target))
            together[roots[1]] = roots[0]
    found: list[dict[int, list[Part]]] = [{}, {}]
    for place, part in enumerate(parts):
        found[place >= len(ranks[0])].setdefault(first_of(place), []).append(part)
    return [list(of.values()) for of in found] if list(found[0]) == list(found[1]) else None


def _exchange(batch: Sequence[Part]) -> Part:
    last = batch[-1]
    ends = [part.end_s for part in batch if part.end_s is not None]
    whole = Part("all_to_all", last.posted_s, last.start_s, max(ends, default=None), last.lane, last.phase)
    whole.is_noticed = last.is_noticed
    return whole
