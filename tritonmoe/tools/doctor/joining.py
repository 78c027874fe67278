"""joined: the traces of ranks as one graph, their exchanges matched, on one clock."""

from bisect import bisect_right
from collections.abc import Sequence

from tritonmoe.tools.doctor.clocks import align_clocks
from tritonmoe.tools.doctor.graph import Graph
from tritonmoe.tools.doctor.hosts import hosts_of
from tritonmoe.tools.doctor.link_ends import slow_links
from tritonmoe.tools.doctor.matching import OfSteps, bound_ends, matched
from tritonmoe.tools.doctor.programs import Programs
from tritonmoe.tools.doctor.trace import RankTrace

__all__ = ["joined"]


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
    hosts = hosts_of(traces, ranks_per_node)
    align_clocks(traces, hosts, together, limits)
    bound_ends(traces, together)
    for parts in together.values():
        latest = max(part.start_s for _, part in parts)
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
    graph.slow_links = slow_links(traces, graph.hosts)
    Programs(graph, traces, of_steps, together, bounds).build()
    return graph, limits


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
