"""Graphs in which every step is exchanges of all ranks, each behind a stretch of work."""

from collections.abc import Callable, Sequence

from tritonmoe.tools.doctor.graph import Graph, Key, Kind, Member, Run

Exchange = tuple[Key, Callable[[int], Run], Callable[[int], float]]
"""Its key; (rank) -> what the rank does before; (rank) -> the seconds in which its rows come."""


def graph_of(num_ranks: int, num_steps: int, exchanges_of: Callable[[int], Sequence[Exchange]]) -> Graph:
    """Return a graph; exchanges_of: (step) -> its exchanges, of which each rank makes its own in turn."""
    graph = Graph(list(range(num_ranks)), list(range(num_steps)), begin_s=[0.0] * num_ranks)
    graph.programs = [[] for _ in graph.ranks]
    for step in graph.steps:
        for key, work, transfer_s in exchanges_of(step):
            members = []
            for rank in graph.ranks:
                graph.runs.append(work(rank))
                members.append(len(graph.members))
                graph.members.append(Member(rank, step, len(graph.exchanges), key, 0, 0.0, transfer_s(rank)))
                run = len(graph.runs) - 1
                graph.programs[rank] += [(Kind.RUN, run), (Kind.POST, members[-1]), (Kind.WAIT, members[-1])]
            graph.exchanges.append(members)
        for program in graph.programs:
            program.append((Kind.STEP, step))
        graph.measured_s.append(0.0)
    return graph
