"""Differences that all ranks have in nearly all steps are noise, however many; those of one rank are not."""

import math
import random

import pytest
from step_graphs import Exchange, graph_of

from tritonmoe.doctor.attribution import attribute
from tritonmoe.doctor.causes import Causes
from tritonmoe.doctor.graph import Graph, Kind, Member, Run
from tritonmoe.doctor.noise import gain_of_noise
from tritonmoe.doctor.usual import usual_of

RANKS, STEPS, EXCHANGES = 4, 12, 20


def run_of(faulty: tuple[int, ...], late_s: float, num_ranks: int = RANKS) -> Graph:
    """Return a run whose exchanges take 4.5 or 8.5 ms by chance, on each rank for itself, as gloo's do on one link."""
    draw = random.Random(3)

    def exchange(step: int, count: int) -> Exchange:
        def work(rank: int) -> Run:
            is_late = rank == 1 and step in faulty and count == 0
            return Run(rank, step, ("work", count), 0.010, late_s if is_late else 0.0)

        def transfer_s(rank: int) -> float:
            return 0.0045 + (0.004 if draw.random() < 0.35 else 0.0) + draw.uniform(0, 1e-4)

        return ("forward", "all_to_all", count), work, transfer_s

    return graph_of(num_ranks, STEPS, lambda step: [exchange(step, count) for count in range(EXCHANGES)])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_exchanges_that_take_long_by_chance_are_no_slow_link(num_ranks: int) -> None:
    assert attribute(run_of((), 0.0, num_ranks)).findings == ()


@pytest.mark.parametrize("faulty", [tuple(range(STEPS)), (2, 5, 8, 11)])
def test_a_fault_beside_them_is_found_alone(faulty: tuple[int, ...]) -> None:
    late_s = 0.3
    (finding,) = attribute(run_of(faulty, late_s)).findings
    assert (finding.kind, finding.culprits.ranks) == ("late rank", (1,))
    assert finding.cost.seconds == pytest.approx(late_s * len(faulty) / STEPS, rel=0.1)


CROWDED_S = (0.0, 0.0, 0.01, 0.0, 0.0, 0.01, 0.015, 0.03, 0.04, 0.15, 0.0, 0.0)


def crowded_run(late_s: float, num_late: int = 1) -> Graph:
    """Return a run on a machine with too few cores: in some steps all ranks come late, some always."""
    draw = random.Random(8)

    def exchange(step: int) -> Exchange:
        def work(rank: int) -> Run:
            idle_s = CROWDED_S[step] * draw.uniform(0.8, 1.2) + (late_s if rank < num_late else 0.0)
            return Run(rank, step, ("forward", "before", "all_to_all", 0), 0.100, 0.001 + idle_s)

        return ("forward", "all_to_all", 0), work, lambda _: 0.001

    return graph_of(RANKS, STEPS, lambda step: [exchange(step)])


@pytest.mark.parametrize("num_late", [1, 2, 3])
def test_who_is_late_where_all_are_late_at_times(num_late: int) -> None:
    """What all ranks have in the same step is nobody's; without that these ranks would be a part of all."""
    found = attribute(crowded_run(0.05, num_late)).findings[0]
    assert (found.kind, sorted(found.culprits.ranks)) == ("late rank", list(range(num_late)))
    assert found.when.when == "always"


def test_nobody_is_named_where_all_are_late_at_times() -> None:
    for found in attribute(crowded_run(0.0)).findings:
        assert (found.kind, found.culprits.ranks) == ("late rank", ())


def noisy_run(seed: int, slow: float = 1.0) -> Graph:
    """Return four steps of one exchange, before which every rank computes for a time that differs by 30 %."""
    draw = random.Random(seed)

    def exchange(step: int) -> Exchange:
        def work(rank: int) -> Run:
            return Run(rank, step, "work", 0.010 * math.exp(draw.gauss(0, 0.3)) * (slow if rank == 1 else 1.0), 0.0)

        return ("forward", "all_to_all", 0), work, lambda _: 0.0045

    return graph_of(RANKS, 4, lambda step: [exchange(step)])


@pytest.mark.parametrize("seed", [0, 3])
def test_a_gain_that_noise_alone_would_give_is_none(seed: int) -> None:
    """Steps are 9 to 12 % shorter without what is not usual in them."""
    found = attribute(noisy_run(seed))
    assert found.together.seconds > 0.05 * found.replayed_s
    assert found.is_healthy
    (slow,) = attribute(noisy_run(seed, slow=3.0)).findings
    assert (slow.kind, slow.culprits.ranks) == ("slow rank", (1,))


def test_work_of_one_rank_that_takes_longer_and_longer() -> None:
    """As in a pipeline: no other rank does the same, and none is slow where it always takes as long."""
    for growth_s, is_found in ((0.004, True), (0.0, False)):
        graph = Graph([0, 1], list(range(STEPS)), begin_s=[0.0, 0.0])
        graph.programs = [[], []]
        for step in graph.steps:
            for rank in graph.ranks:
                graph.runs.append(Run(rank, step, ("stage", rank), 0.030, 0.002 + rank * growth_s * step))
                graph.members.append(Member(rank, step, step, ("forward", "send"), 0, 0.0, 0.001))
                last = len(graph.members) - 1
                graph.programs[rank] += [(Kind.RUN, last), (Kind.POST, last), (Kind.WAIT, last), (Kind.STEP, step)]
            graph.exchanges.append([len(graph.members) - 2, len(graph.members) - 1])
            graph.measured_s.append(0.0)
        found = attribute(graph)
        assert bool(found.findings) == is_found
        for finding in found.findings:
            assert (finding.kind, finding.culprits.ranks, finding.when.when) == ("late rank", (1,), "growing")
            assert finding.cost.seconds == pytest.approx(growth_s * (STEPS - 1) / 2, rel=0.05)


def test_exchanges_of_two_kinds_by_chance_are_no_slow_link() -> None:
    """Two ranks of three get nearly half of their rows late by chance: their medians are the one kind or the other."""
    draw = random.Random(5)

    def exchange(step: int, count: int) -> Exchange:
        def transfer_s(rank: int) -> float:
            is_late = draw.random() < (0.15 if rank == 1 else 0.45)
            return (0.0092 if is_late else 0.0065) + draw.uniform(0, 1e-4)

        return ("forward", "all_to_all", count), lambda rank: Run(rank, step, ("work", count), 0.010), transfer_s

    graph = graph_of(3, STEPS, lambda step: [exchange(step, count) for count in range(EXCHANGES)])
    assert attribute(graph).findings == ()


def test_noise_of_exchanges_alone() -> None:
    """As a flight record has them, which says nothing of what is computed."""
    graph = run_of((), 0.0)
    graph.runs = []
    graph.programs = [[one for one in program if one[0] is not Kind.RUN] for program in graph.programs]
    usual = usual_of(graph)
    assert gain_of_noise(graph, usual, Causes(graph, usual).walker) >= 0
