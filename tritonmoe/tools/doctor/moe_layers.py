"""layers_of: the passes of expert-parallel layers in a graph: rows go to experts, experts compute, rows come home."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tritonmoe.tools.doctor.graph import Graph, Key, Kind

__all__ = ["LayerPass", "layers_of"]

ALIKE = 0.02
"""What comes home is what was sent, up to so small a share."""
LEAST_RATIO, MOST_RATIO = 0.24, 4.1
"""Rows may travel home in another format, but ids that go to the same ranks are no rows."""
HIDDEN = 0.2
"""An exchange beside which so large a share of its time is computed is overlapped already."""


@dataclass(frozen=True)
class LayerPass:
    """One pass of one layer in one step: an all-to-all, what ranks compute with its rows, and the all-to-all back."""

    key: Key
    """Of the first exchange."""
    step: int
    there: tuple[int, ...]
    """Members of the exchange that brings rows to the experts, by their ranks in the group."""
    back: tuple[int, ...]
    compute_s: tuple[float, ...]
    """What each rank computes between them."""
    sent: tuple[tuple[int, ...], ...]
    """Bytes from rank i of the group to rank k."""
    is_overlapped: bool
    """Whether something is computed beside the exchanges already."""

    @property
    def phase(self) -> str:
        return str(self.key[0])


@dataclass
class _Visit:
    """An exchange as one rank goes through it."""

    member: int
    beside_s: float
    """What the rank computes between handing it over and waiting for it."""
    after_s: float = 0.0
    """What it computes from when the rows are there until the next exchange of rows."""
    is_waited_for: bool = False
    is_last: bool = False
    """Whether it waits for something else before it hands over the next exchange of rows."""


def layers_of(graph: Graph) -> list[LayerPass]:
    """Return the passes of layers of which all ranks and all splits are known; none where that is not so."""
    rows = [index for index, member in enumerate(graph.members) if _has_rows(graph, index) and member.sent]
    if not rows:
        return []
    known = set(rows)
    by_rank = [list(_visits(graph, rank, known)) for rank in range(len(graph.ranks))]
    following: dict[int, int] = {}
    visits: dict[int, _Visit] = {}
    for of_rank in by_rank:
        for place, visit in enumerate(of_rank):
            visits[visit.member] = visit
            if place + 1 < len(of_rank):
                following[visit.member] = of_rank[place + 1].member
    found = []
    taken: set[int] = set()
    for members in _in_order(graph, by_rank):
        exchange = graph.members[members[0]].exchange
        if exchange in taken:
            continue
        back = [following.get(one, -1) for one in members]
        if min(back) < 0 or len({graph.members[one].exchange for one in back}) > 1:
            continue
        if not _comes_home(graph, members, back) or any(visits[one].is_last for one in members):
            continue
        if not all(visits[one].is_waited_for for one in members):
            continue
        taken |= {exchange, graph.members[back[0]].exchange}
        beside_s = sum(visits[one].beside_s for one in (*members, *back))
        transfers_s = sum(graph.members[one].transfer_s for one in (*members, *back))
        first = graph.members[members[0]]
        found.append(
            LayerPass(
                first.key,
                first.step,
                tuple(members),
                tuple(back),
                tuple(visits[one].after_s for one in members),
                tuple(graph.members[one].sent or () for one in members),
                beside_s > HIDDEN * transfers_s,
            )
        )
    return found


def _has_rows(graph: Graph, index: int) -> bool:
    """Return whether this is an all-to-all of a group whose ranks are all there, with all splits."""
    member = graph.members[index]
    members = graph.exchanges[member.exchange]
    return (
        "all_to_all" in member.key
        and member.sent is not None
        and member.received is not None
        and len(members) == len(member.sent)
        and len(members) > 1
        and all(graph.members[one].sent is not None for one in members)
        and sum(member.sent) + sum(member.received) > 0
    )


def _visits(graph: Graph, rank: int, known: set[int]) -> Iterator[_Visit]:
    """Go through a rank's program; give its exchanges of rows in order."""
    open_visits: dict[int, _Visit] = {}
    last: _Visit | None = None
    computed_s = 0.0
    for kind, index in graph.programs[rank]:
        if kind == Kind.RUN:
            run = graph.runs[index]
            computed_s += run.busy_s + run.idle_s
            if last is not None and last.is_waited_for:
                last.after_s += run.busy_s + run.idle_s
        elif kind == Kind.POST and index in known:
            if last is not None:
                yield last
            last = open_visits[index] = _Visit(index, -computed_s)
        elif kind == Kind.WAIT:
            if index in open_visits:
                visit = open_visits.pop(index)
                visit.beside_s += computed_s
                visit.is_waited_for = True
            elif last is not None and last.is_waited_for:
                last.is_last = True
        elif kind == Kind.STEP and last is not None:
            last.is_last = True
    for visit in open_visits.values():
        visit.beside_s += computed_s
    if last is not None:
        yield last


def _in_order(graph: Graph, by_rank: Sequence[Sequence[_Visit]]) -> Iterator[list[int]]:
    """Return the members of each exchange of rows, in the order in which the first of its ranks comes to them."""
    seen: set[int] = set()
    places: dict[int, list[int]] = defaultdict(list)
    for rank, of_rank in enumerate(by_rank):
        for visit in of_rank:
            exchange = graph.members[visit.member].exchange
            if exchange not in seen:
                seen.add(exchange)
                places[rank].append(exchange)
    for exchanges in places.values():
        for exchange in exchanges:
            yield sorted(graph.exchanges[exchange], key=lambda one: graph.members[one].rank)


def _comes_home(graph: Graph, there: Sequence[int], back: Sequence[int]) -> bool:
    """Return whether each rank sends back what it has received, in this or another format."""
    received = [graph.members[one].received or () for one in there]
    sent = [graph.members[one].sent or () for one in back]
    total, total_back = (sum(map(sum, of)) for of in (received, sent))
    if not total or not LEAST_RATIO <= total_back / total <= MOST_RATIO:
        return False
    ratio = total_back / total
    far = sum(
        abs(own - ratio * of)
        for owns, ofs in zip(sent, received, strict=True)
        for own, of in zip(owns, ofs, strict=True)
    )
    return far <= ALIKE * total_back
