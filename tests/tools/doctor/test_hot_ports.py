"""Exchanges in which one rank's port has most of the bytes, and those of two ranks, who share all links."""

import random

import pytest

from tritonmoe.tools.doctor.attribution import Verdict, attribute
from tritonmoe.tools.doctor.graph import Graph, Kind, Member, Run

STEPS, BYTE_S, LATENCY_S, WORK_S = 12, 15e-9, 2e-4, 0.005
ROW_BYTES = 1000


def verdict_on(transfers: list[list[list[float]]], sent: list[list[int]] | None) -> Verdict:
    """Return what is said of a run: seconds by step, exchange and rank; every second exchange is the way back."""
    size = len(transfers[0][0])
    graph = Graph(list(range(size)), list(range(STEPS)), begin_s=[0.0] * size)
    graph.programs = [[] for _ in range(size)]
    for step in range(STEPS):
        for count, seconds in enumerate(transfers[step]):
            members = []
            for rank in range(size):
                graph.runs.append(Run(rank, step, ("work", count), WORK_S))
                members.append(len(graph.members))
                graph.members.append(
                    Member(rank, step, len(graph.exchanges), ("forward", "all_to_all", count), 0, 0.0, seconds[rank])
                )
                if sent is not None:
                    out, into = sent[rank], [of[rank] for of in sent]
                    graph.members[-1].sent, graph.members[-1].received = (
                        tuple(way) for way in ((into, out) if count % 2 else (out, into))
                    )
                graph.programs[rank] += [
                    (Kind.RUN, len(graph.runs) - 1),
                    (Kind.POST, members[-1]),
                    (Kind.WAIT, members[-1]),
                ]
            graph.exchanges.append(members)
        for rank in range(size):
            graph.programs[rank].append((Kind.STEP, step))
        graph.measured_s.append(0.0)
    return attribute(graph)


@pytest.mark.parametrize("first", [0, 2, 3])
def test_what_waits_for_a_hot_port_is_due_to_that_rank(first: int) -> None:
    """Dispatches end late on the hot rank alone, its combines on all others; one of them has its rows sooner."""
    hot, size = 1, 4
    sent = [[0 if here == to else (1_200_000 if to == hot else 100_000) for to in range(size)] for here in range(size)]
    whole_s = LATENCY_S + 3 * 1_200_000 * BYTE_S
    draw = random.Random(first)
    transfers = []
    for _ in range(STEPS):
        dispatch = [whole_s if rank == hot else 0.001 + draw.uniform(0, 3e-4) for rank in range(size)]
        combine = [(0.7 if rank == first else 1.0) * whole_s * draw.uniform(0.99, 1.01) for rank in range(size)]
        transfers.append([dispatch, combine])
    found = verdict_on(transfers, sent)
    (finding,) = found.findings
    assert (finding.kind, finding.culprits.ranks) == ("imbalance", (hot,))
    fair_s = LATENCY_S + sum(map(sum, sent)) / size * BYTE_S
    assert finding.cost.seconds == pytest.approx(2 * (whole_s - fair_s), rel=0.05)


def by_turns(step: int, count: int, longest_s: float) -> list[float]:
    """Return the times of an exchange that takes twice as long on one of two ranks, in most steps on the same."""
    late = (count + (step % 3 == 0)) % 2
    return [longest_s if rank == late else longest_s / 2 for rank in range(2)]


def test_of_two_ranks_none_is_slow_for_getting_its_rows_second() -> None:
    found = verdict_on([[by_turns(step, count, 0.009) for count in range(6)] for step in range(STEPS)], None)
    assert found.is_healthy


def test_their_link_is_slow_at_times_where_the_second_is_late_too() -> None:
    found = verdict_on(
        [[by_turns(step, count, 0.009 * (4 if step % 4 == 3 else 1)) for count in range(6)] for step in range(STEPS)],
        None,
    )
    (finding,) = found.findings
    assert (finding.kind, finding.when.when, finding.when.period) == ("slow link", "periodic", 4)
