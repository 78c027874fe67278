"""slow_links: which links are slow, and which end of them, by how long every send and receive took."""

import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tritonmoe.tools.doctor.graph import LinkFault
from tritonmoe.tools.doctor.trace import Part, RankTrace

__all__ = ["SlowLinks", "group_indices", "slow_links"]

SLOW = 1.5
"""A link is slow if a byte takes so many times as long as on the usual one."""
FEW_LINKS = 3
"""Fewer links have nothing to compare them with."""
NO_WAIT = 0.1
"""Of a link's times those count that are shorter than all but this part: the others waited for somebody."""


@dataclass(frozen=True)
class SlowLinks(LinkFault):
    """Links that are slow, and how long a byte takes on all of them."""

    of_byte_s: dict[tuple[int, int], float]
    """Seconds of a byte, of every link."""
    usual_s: dict[tuple[int, int], float]
    """What is usual for links like it: of those within hosts, or of those between them."""

    def lost_s(self, part: Part, index: int, ranks: Sequence[int | None], transfer_s: float) -> float:
        """Return by how much a part of a rank, given by its index, would end sooner with links like the others.

        ranks: the indices of the group's ranks.
        """
        needed_s, is_slow = 0.0, False
        for way, peer, num_bytes, _ in part.links:
            other = ranks[peer] if 0 <= peer < len(ranks) else None
            if other is not None and other != index:
                link = (index, other) if way == "send" else (other, index)
                of_byte_s = self.usual_s if link in self.links else self.of_byte_s
                is_slow |= link in self.links
                needed_s = max(needed_s, num_bytes * of_byte_s.get(link, 0.0))
        return max(0.0, transfer_s - needed_s) if is_slow else 0.0


def group_indices(traces: Sequence[RankTrace], index: int, group: str | None) -> list[int | None]:
    """Return the indices of the ranks of a group, by their numbers in it."""
    index_of = {trace.rank: place for place, trace in enumerate(traces)}
    return [index_of.get(rank) for rank in traces[index].groups.get(str(group), ())]


def _of_byte(traces: Sequence[RankTrace]) -> dict[tuple[int, int], float]:
    """Return what a byte takes on every link: on the wire, where that is known, else from when both ends were there."""
    ends: dict[tuple[int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    has_wires = any(trace.wires for trace in traces)
    for index, trace in enumerate(traces):
        wires = trace.wires if has_wires else [(str(part.group), *link) for part in trace.parts for link in part.links]
        indices = {group: group_indices(traces, index, group) for group in {wire[0] for wire in wires}}
        for group, way, peer, num_bytes, seconds in wires:
            other = indices[group][peer] if 0 <= peer < len(indices[group]) else None
            if other is not None and other != index and num_bytes > 0 and seconds > 0:
                ends[(index, other) if way == "send" else (other, index)][way].append(seconds / num_bytes)
    return {
        link: min(sorted(times)[int(NO_WAIT * (len(times) - 1))] for times in own.values())
        for link, own in ends.items()
    }


def slow_links(traces: Sequence[RankTrace], hosts: Sequence[str] = ()) -> SlowLinks | None:
    """Find slow links in traces that have times for every peer; None where there are none, or nothing to compare.

    hosts: of every trace, where they are known: links that leave a host are compared with each other.
    """
    of_byte = _of_byte(traces)
    usual: dict[tuple[int, int], float] = {}
    alike: dict[bool, list[tuple[int, int]]] = defaultdict(list)
    for link in of_byte:
        alike[bool(hosts) and hosts[link[0]] != hosts[link[1]]].append(link)
    for links in alike.values():
        if len(links) >= FEW_LINKS:
            usual |= dict.fromkeys(links, statistics.median_low(of_byte[link] for link in links))
    slow = tuple(sorted((link for link in usual if of_byte[link] > SLOW * usual[link]), key=lambda one: -of_byte[one]))
    if not slow:
        return None
    ranks, words = _ends(slow, of_byte, [trace.rank for trace in traces])
    times = statistics.median(of_byte[link] / usual[link] for link in slow)
    return SlowLinks("slow link", slow, ranks, words.format(f"{times:.1f} times as long"), of_byte, usual)


def _ends(
    slow: Sequence[tuple[int, int]], links: Collection[tuple[int, int]], names: Sequence[int | None]
) -> tuple[tuple[int, ...], str]:
    """Return the ranks whose ends are slow, and words for it in which how slow is left open."""
    for ends, what in (((0,), "sends"), ((1,), "receives"), ((0, 1), "sends and receives")):
        for rank in range(len(names)):
            own = [link for link in links if any(link[end] == rank for end in ends)]
            if len(own) > 1 and set(own) == set(slow):
                return (rank,), f"needs {{}} as usual for all data that it {what}, so the fault is at this rank"
    both = tuple(dict.fromkeys(rank for link in slow for rank in link))
    shown = " and ".join(f"from {names[sender]} to {names[receiver]}" for sender, receiver in slow[:4])
    return both, f"need {{}} as usual for data {shown}, but not over other links, so the fault lies between the ranks"
