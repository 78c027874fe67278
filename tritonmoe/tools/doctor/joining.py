"""joined: the traces of ranks as one graph, their exchanges matched, on one clock."""

import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

from tritonmoe.tools.doctor.exchange_names import SYMMETRIC
from tritonmoe.tools.doctor.graph import Graph, Item, Key, Kind, LinkFault, Member, Run, floats
from tritonmoe.tools.doctor.matching import Matched, OfSteps, align_clocks, bound_ends, idle_since, matched
from tritonmoe.tools.doctor.pipelines import Batches, lines_of
from tritonmoe.tools.doctor.trace import Busy, Part, RankTrace, union
from tritonmoe.tools.report.terminal import one_line

__all__ = ["SlowLinks", "joined", "slow_links"]

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


SHORT_WAIT_S = {"gpu": 5e-6, "cpu": 50e-6, "none": 0.0, "inspector": 0.0}
"""Shorter pauses are no wait for an exchange."""
ROUNDED_S = 1e-6


class Programs:
    """Builds each rank's program, and the exchanges between them.

    A stretch of work is known by the exchange that it comes before: the n-th of its kind in its phase of the step.
    Where ranks do different things in a step, as stages of a pipeline do, it is known by the exchange before it too.
    """

    def __init__(
        self,
        graph: Graph,
        traces: Sequence[RankTrace],
        of_steps: Sequence[OfSteps],
        matched: Matched,
        bounds: Sequence[Sequence[tuple[float, float]]],
        slow: SlowLinks | None,
    ) -> None:
        self.graph, self.traces, self.of_steps, self.matched, self.bounds = graph, traces, of_steps, matched, bounds
        self.slow = slow
        self.batches: dict[int, Batches] = {}

    def build(self) -> None:
        """Add all exchanges and programs to the graph."""
        self._name_parts()
        graph = self.graph
        linked_s: list[float] = []
        step_of = {id(part): step for steps in self.of_steps for step, parts in enumerate(steps) for part in parts}
        for exchange, parts in self.matched.items():
            own = range(len(graph.members), len(graph.members) + len(parts))
            graph.exchanges.append(list(own))
            latest = max(part.start_s for _, part in parts)
            for part_member, (index, part) in zip(own, parts, strict=True):
                end_s = part.end_s or part.start_s
                needs, since = None, latest
                if end_s < latest:
                    needed = [one for one, (_, other) in zip(own, parts, strict=True) if other.start_s <= end_s]
                    needs = tuple(needed) or (own[[i for i, _ in parts].index(index)],)
                    since = max(parts[one - own.start][1].start_s for one in needs)
                part.member = part_member
                graph.members.append(Member(
                    index, step_of[id(part)], exchange, part.key, part.lane, 0.0, end_s - since, needs,
                    self._to_others(index, part, part.sent), self._to_others(index, part, part.received),
                    part.num_bytes, part.element_bytes,
                    row_bytes=sum(part.received) // part.rows if part.received and part.rows else 0,
                ))  # fmt: skip
                if self.slow is not None:
                    ranks = group_indices(self.traces, index, part.group)
                    linked_s.append(self.slow.lost_s(part, index, ranks, end_s - since))
        graph.linked_s = None if self.slow is None else floats(linked_s)
        self._find_waits()
        lines = lines_of(self.of_steps) if all(trace.backward_start_s for trace in self.traces) else []
        for replica, line in enumerate(lines):
            for stage, index in enumerate(line):
                self.batches[index] = Batches(self.traces[index], self.of_steps[index], (stage, replica), line)
        in_order = [self.batches[index] for index in range(len(self.batches))]
        graph.stages, graph.replicas = (tuple(getattr(one, name) for one in in_order) for name in ("stage", "replica"))
        graph.programs = [self._program(index) for index in range(len(self.traces))]

    def _to_others(self, index: int, part: Part, sizes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Return the bytes for each rank of the group without those that stay on this one, where it is known which."""
        if sizes is None:
            return None
        rank = self.graph.ranks[index]
        group = part.group_ranks or self.traces[index].groups.get(str(part.group)) or tuple(range(len(sizes)))
        if len(group) != len(sizes) or rank not in group:
            return sizes
        place = group.index(rank)
        return (*sizes[:place], 0, *sizes[place + 1 :])

    def _name_parts(self) -> None:
        """Set the key of every part."""
        orders = {tuple((part.phase, _what(part)) for parts in steps for part in parts) for steps in self.of_steps}
        for parts in chain.from_iterable(self.of_steps):
            seen: dict[tuple, int] = defaultdict(int)
            before: Part | None = None
            for part in parts:
                what = _what(part)
                if len(orders) > 1:
                    of = "" if before is None or before.phase == part.phase else f" of {before.phase}"
                    what += f" after {_what(before)}{of}" if before else " first"
                part.key = (part.phase, what, seen[part.phase, what])
                seen[part.phase, what] += 1
                before = part

    def _find_waits(self) -> None:
        """Find which exchanges the computing lane stood still for, and since when."""
        shares: dict[Key, list[float]] = defaultdict(list)
        waits: list[tuple[Part, float, float]] = []
        for trace, steps in zip(self.traces, self.of_steps, strict=True):
            for part in chain.from_iterable(steps):
                if part.end_s is None:
                    continue
                since = max(idle_since(trace, part.end_s), part.posted_s)
                wait_s = part.end_s - since
                flight_s = part.end_s - part.posted_s
                if wait_s > 0:
                    part.idle_since_s = since
                    waits.append((part, wait_s, max(4 * SHORT_WAIT_S[trace.lanes], 0.2 * flight_s)))
                shares[part.key].append(max(0.0, wait_s) / flight_s if flight_s > 0 else 1.0)
        usually = {key: statistics.median(values) >= 0.5 for key, values in shares.items()}
        for part, wait_s, least_s in waits:
            if wait_s < least_s and not usually[part.key]:
                part.idle_since_s = None

    def _program(self, index: int) -> list[Item]:
        graph, busy = self.graph, Busy(self.traces[index].busy_start_s, self.traces[index].busy_end_s)
        batches = self.batches.get(index)
        program: list[Item] = []
        now_s = self.bounds[index][0][0]
        lane_ends: dict[int, float] = {}
        rows: int | None = None
        stretch = 0

        def run_until(moment_s: float, key: Key, ends_stretch: bool = True) -> None:
            """Add the work until then; a stretch without any is one of no time, to compare others with."""
            nonlocal now_s
            if moment_s > now_s or (ends_stretch and len(graph.runs) == stretch):
                moment_s = max(moment_s, now_s)
                busy_s = busy.between(now_s, moment_s)
                idle_s = max(0.0, moment_s - now_s - busy_s)
                for batch, own_s in [(-1, busy_s)] if batches is None else batches.parts(step, now_s, moment_s):
                    graph.runs.append(Run(index, step, key, own_s, idle_s, rows, batch, stretch))
                    program.append((Kind.RUN, len(graph.runs) - 1))
                    idle_s = 0.0
                now_s = moment_s

        for step, parts in enumerate(self.of_steps[index]):
            events = [(part.posted_s, 0, part) for part in parts]
            events += [(part.end_s or 0.0, 1, part) for part in parts if part.idle_since_s is not None]
            events.sort(key=_order)
            posts = iter(parts)
            key = _before(next(posts, None))
            stretch = len(graph.runs)
            pending: list[Part] = []
            for moment_s, is_wait, part in events:
                if is_wait:
                    run_until(max(now_s, part.idle_since_s or 0.0), key, ends_stretch=False)
                    program.append((Kind.WAIT, part.member))
                    now_s = max(now_s, moment_s)
                    pending = [other for other in pending if other is not part]
                    if part.rows is not None:
                        rows = part.rows
                else:
                    run_until(moment_s, key)
                    program.append((Kind.POST, part.member))
                    since = max(part.posted_s, lane_ends.get(part.lane, 0.0))
                    graph.members[part.member].delay_s = max(0.0, part.start_s - since)
                    lane_ends[part.lane] = max(lane_ends.get(part.lane, 0.0), part.end_s or part.start_s)
                    key = _before(next(posts, None))
                    stretch = len(graph.runs)
                    pending.append(part)
            end_s = self.bounds[index][step][1]
            run_until(end_s, key)
            program += [(Kind.WAIT, part.member) for part in pending if (part.end_s or 0.0) <= end_s]
            program.append((Kind.STEP, step))
        return program


def _order(event: tuple[float, int, Part]) -> tuple[float, int]:
    """Return the place of an event: who hands over an exchange just when another ends has waited for that one."""
    moment_s, is_wait, part = event
    return (moment_s - ROUNDED_S if is_wait and moment_s - part.posted_s > 2 * ROUNDED_S else moment_s, is_wait)


def _what(part: Part) -> str:
    return part.way or part.kind


def _before(part: Part | None) -> Key:
    """Return the key of the work before this exchange is handed over; None: of the rest of a step."""
    return ("end of the step",) if part is None else (part.key[0], "before", *part.key[1:])


def joined(traces: Sequence[RankTrace], ranks_per_node: int | None = None) -> tuple[Graph, list[str]]:
    """Join ranks' traces; give the graph of the steps that all have, and what the files together can't tell.

    ranks_per_node: so many neighbours share a host; None: as the files tell.
    Raises:
        ValueError: the traces have no step in common, or two are of one rank.
    """
    limits: list[str] = []
    traces = _in_order(traces, limits)
    numbers = set.intersection(*({step.number for step in trace.steps} for trace in traces))
    if not numbers:
        raise ValueError(
            f"{traces[0].source} has the steps {_span(traces[0])} and {traces[-1].source} {_span(traces[-1])}: none is "
            "common to all ranks. Record all ranks with the same schedule"
        )
    dropped = {step.number for trace in traces for step in trace.steps} - numbers
    if dropped:
        limits.append(f"{len(dropped)} steps are not in the files of all ranks, and are left out")
    places = {number: index for index, number in enumerate(sorted(numbers))}
    of_steps = [_by_step(trace, places) for trace in traces]
    together = matched(traces, of_steps, limits)
    hosts = _hosts_of(traces, ranks_per_node)
    align_clocks(traces, hosts, together, limits)
    bound_ends(traces, together)
    for parts in together.values():
        known = [part.end_s for _, part in parts if part.end_s is not None and part.kind in SYMMETRIC]
        latest = statistics.median(known) if known else max(part.start_s for _, part in parts)
        for _, part in parts:
            if part.end_s is None:  # no sooner than that, and that is all that is known
                part.end_s = latest
    graph = Graph([index if trace.rank is None else trace.rank for index, trace in enumerate(traces)], sorted(numbers))
    bounds = [[(step.start_s, step.end_s) for step in trace.steps if step.number in places] for trace in traces]
    first_s = min(of_rank[0][0] for of_rank in bounds)
    graph.begin_s = [of_rank[0][0] - first_s for of_rank in bounds]
    before_s = max(graph.begin_s)
    for index in range(len(places)):
        end_s = max(of_rank[index][1] for of_rank in bounds) - first_s
        graph.measured_s.append(max(0.0, end_s - before_s))
        before_s = max(before_s, end_s)
    graph.hosts = hosts
    routed = [trace.routed for trace in traces if trace.routed is not None]
    graph.routed = tuple(routed) if len(routed) == len(traces) else ()
    graph.fault = slow = slow_links(traces, graph.hosts)
    Programs(graph, traces, of_steps, together, bounds, slow).build()
    alone_s = sum(
        part.end_s - part.idle_since_s
        for parts in together.values()
        for _, part in parts
        if len(parts) == 1 and len(traces) > 1 and part.idle_since_s is not None and part.end_s is not None
    )
    graph.alone_s = alone_s / (len(traces) * len(places))
    exposed_s = sum(_exposed_s(trace, parts) for trace, parts in zip(traces, of_steps, strict=True))
    graph.exposed_s = exposed_s / (len(traces) * len(places))
    return graph, limits


def _exposed_s(trace: RankTrace, of_steps: OfSteps) -> float:
    """Return for how long an exchange was under way on a rank and nothing was computed."""
    busy, parts = Busy(trace.busy_start_s, trace.busy_end_s), list(chain.from_iterable(of_steps))
    starts, ends = union([part.start_s for part in parts], [part.end_s or part.start_s for part in parts])
    return sum(end - start - busy.between(start, end) for start, end in zip(starts, ends, strict=True))


def _hosts_of(traces: Sequence[RankTrace], ranks_per_node: int | None) -> tuple[str, ...]:
    """Return the host of every rank: of so many neighbours each, or as the files tell; none where they don't all.

    Raises:
        ValueError: a file doesn't say its rank, so that nobody knows its neighbours.
    """
    if ranks_per_node is None:
        return tuple(one_line(trace.host) for trace in traces) if all(trace.host for trace in traces) else ()
    found = []
    for trace in traces:
        if trace.rank is None:
            raise ValueError(f"{trace.source} doesn't say which rank wrote it: leave --ranks-per-node out")
        found.append(f"node {trace.rank // ranks_per_node}")
    return tuple(found)


def _span(trace: RankTrace) -> str:
    return f"{trace.steps[0].number} to {trace.steps[-1].number}"


def _in_order(traces: Sequence[RankTrace], limits: list[str]) -> list[RankTrace]:
    """Return traces by rank; say which ranks are missing."""
    known = [trace.rank for trace in traces if trace.rank is not None]
    for rank in set(known):
        if known.count(rank) > 1:
            both = [trace.source for trace in traces if trace.rank == rank]
            raise ValueError(
                f"{both[0]} and {both[1]} are both of rank {rank}: give the files of one run, and of one window of "
                "steps"
            )
    worlds = {trace.world_size for trace in traces if trace.world_size is not None}
    if len(worlds) > 1:
        both = [next(trace.source for trace in traces if trace.world_size == world) for world in sorted(worlds)[:2]]
        raise ValueError(
            f"{both[0]} and {both[1]} are of runs of {sorted(worlds)[0]} and {sorted(worlds)[1]} ranks: give the files "
            "of one run"
        )
    if len(traces) == 1:
        limits.append(
            "there is the file of one rank only: which rank is late, and whom this rank waits for, is not known"
        )
    elif worlds and max(worlds) > len(traces):
        limits.append(f"of {max(worlds)} ranks {len(traces)} have files here: what the other ranks do is not known")
    unnamed = sum(trace.rank is None for trace in traces)
    if unnamed and len(traces) > 1:
        limits.append(
            f"{unnamed} files don't say which rank wrote them: the doctor numbers the ranks by the order of the "
            "files' names"
        )
    for trace in traces:
        for words in trace.limits:
            if words not in limits and not (unnamed and words.startswith("the file doesn't say which rank")):
                limits.append(words)
    return sorted(traces, key=lambda trace: (trace.rank is None, trace.rank or 0, trace.source))


def _by_step(trace: RankTrace, places: dict[int, int]) -> OfSteps:
    found: OfSteps = [[] for _ in places]
    starts = [step.start_s for step in trace.steps]
    for part in sorted(trace.parts, key=lambda part: part.posted_s):
        at = bisect_right(starts, part.posted_s) - 1
        if at >= 0 and part.posted_s < trace.steps[at].end_s and trace.steps[at].number in places:
            found[places[trace.steps[at].number]].append(part)
    return found
