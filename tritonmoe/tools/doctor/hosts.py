"""Which ranks share a host: as files say it, or whoever asks."""

import re
from collections.abc import Collection, Iterator, Sequence

from tritonmoe.tools.doctor.graph import Graph
from tritonmoe.tools.doctor.trace import RankTrace
from tritonmoe.tools.report.terminal import one_line

__all__ = ["FEW_FOR_NODES", "host_in_name", "hosts_of", "unknown_of_nodes"]

FEW_FOR_NODES = 4
"""Fewer ranks are no two nodes of two."""
OF_TENSORBOARD = re.compile(r"(.+)_(\d+)\.\d+\.pt\.trace\.json(?:\.gz)?")
"""How torch.profiler.tensorboard_trace_handler calls a trace: after host and process."""


def host_in_name(name: str, processes: Collection[object]) -> str:
    """Return the host that the name of a trace has; "" where the process in it is none whose events these are.

    Then the name is one that somebody gave: "rank_3" is of no host.
    """
    found = OF_TENSORBOARD.fullmatch(name)
    return found[1] if found is not None and found[2] in processes else ""


def hosts_of(traces: Sequence[RankTrace], ranks_per_node: int | None) -> tuple[str, ...]:
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


def unknown_of_nodes(graph: Graph) -> Iterator[str]:
    """Yield what is not known of the nodes of a run whose ranks send each other rows."""
    if not graph.hosts:
        yield (
            "the files don't say which ranks share a host: what two levels would gain is not known "
            "(--ranks-per-node COUNT says it)"
        )
    elif len(set(graph.hosts)) > 1 and not graph.routed:
        yield (
            "the files don't say how many tokens a rank has: what two levels would gain is not known "
            "(a trace of the router's torch.topk with record_shapes=True says it)"
        )
    elif len(set(graph.hosts)) > 1 and not any(_is_inside(graph, members) for members in graph.exchanges):
        yield (
            "no exchange is of the ranks of one host alone: what rows take inside a host is not known, so two levels "
            "may gain more than is said"
        )


def _is_inside(graph: Graph, members: Sequence[int]) -> bool:
    return len(members) > 1 and len({graph.hosts[graph.members[one].rank] for one in members}) == 1
