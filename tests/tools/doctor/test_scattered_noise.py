"""Differences that all ranks have in nearly all steps are noise, however many; those of one rank are not."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from step_graphs import Exchange, graph_of

from tritonmoe.tools.doctor.attribution import Verdict, attribute, gain_of_noise
from tritonmoe.tools.doctor.culprits import Replays
from tritonmoe.tools.doctor.graph import Graph, Kind, Member, Run
from tritonmoe.tools.doctor.reading import ReadRun
from tritonmoe.tools.doctor.usual import usual_of
from tritonmoe.tools.doctor.verdict import as_text, describe_finding

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


def test_a_rank_that_is_late_in_every_step_is_no_noise() -> None:
    """Most of its 30 ms is hidden behind the work of others, and noise alone would seem to gain more than the rest."""

    def found(late_s: float) -> Verdict:
        draw = random.Random(2)

        def exchange(step: int) -> Exchange:
            def work(rank: int) -> Run:
                return Run(rank, step, ("work",), 0.1 * math.exp(draw.gauss(0, 0.3)), late_s if rank == 2 else 0.0)

            return ("forward", "all_to_all", 0), work, lambda _: 0.0045

        return attribute(graph_of(8, STEPS, lambda step: [exchange(step)]))

    assert found(0.0).is_healthy
    late = found(0.03)
    assert 0.05 < late.together.share(late.replayed_s) < 0.06
    assert not late.is_healthy
    (one,) = found(0.05).findings
    assert (one.kind, one.culprits.ranks) == ("late rank", (2,))


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
    assert gain_of_noise(graph, usual, Replays(graph, usual).walker) >= 0


def hiding_run(extra_s: float, late_s: float = 0.06) -> Graph:
    """Return a run in which rank 0 is slow by 60 ms in every step and rank 1 late, in step 5 by more than that."""

    def exchange(step: int) -> Exchange:
        def work(rank: int) -> Run:
            idle_s = late_s + (extra_s if step == 5 else 0.0) if rank == 1 else 0.0
            return Run(rank, step, ("forward", "before", "all_to_all", 0), 0.16 if rank == 0 else 0.1, 0.001 + idle_s)

        return ("forward", "all_to_all", 0), work, lambda _: 0.001

    return graph_of(RANKS, STEPS, lambda step: [exchange(step)])


def text_of(found: Verdict) -> str:
    run = ReadRun(Path("run"), found.graph, {"timeline": 1}, "host", [])
    return " ".join(as_text(run, found).split())


def test_a_cause_whose_cost_may_be_nothing_is_said_to_be_perhaps_noise() -> None:
    """Mending the late rank gains 100 ms a step in the mean, all of them in one step: perhaps nothing."""
    found = attribute(hiding_run(extra_s=1.2))
    assert [(one.kind, one.may_be_noise) for one in found.findings] == [("slow rank", False), ("late rank", True)]
    late = found.findings[-1].cost
    assert (late.low_s, late.seconds) == (0.0, pytest.approx(0.1))
    assert text_of(found).count("record again first, since 0 is in the interval and this may be noise; then") == 1


def test_what_mending_all_findings_gains_is_compared_with_their_costs() -> None:
    """Two causes hide each other, or hide each other in part, or don't: each of them is a rank's own exchange."""
    hide = attribute(hiding_run(extra_s=0.0, late_s=0.05))  # alone 10 ms of the 60, and nothing
    assert [one.kind for one in hide.findings] == ["slow rank", "late rank"]
    assert [one.is_hidden for one in hide.findings] == [True, True]
    assert hide.mended.seconds == pytest.approx(0.06)
    cases = {
        "causes overlap, so that this is less than their costs": hide,
        "their costs add up": replace(hide, mended=replace(hide.mended, seconds=0.11)),
        "waits hide behind each other, so that mending all gains more than mending each alone": replace(
            hide, mended=replace(hide.mended, seconds=0.2)
        ),
    }
    for words, found in cases.items():
        total_s = sum(one.cost.seconds for one in hide.findings)
        assert total_s == pytest.approx(0.11), total_s
        assert f": {words}" in text_of(found)


def test_all_ranks_are_not_left_out() -> None:
    """A finding of all ranks is no rank's, and no machine's; of two ranks either may be what makes a link slow."""
    found = attribute(hiding_run(extra_s=0.0))
    slow = replace(found.findings[0], kind="slow link")
    of_two = replace(found, graph=run_of((), 0.0, 2))
    assert describe_finding(slow, of_two).to_do.startswith(
        "two ranks can't tell whether sender, receiver or link is at fault"
    )
    assert describe_finding(slow, found).to_do.startswith("check cable")
    for one in found.findings:
        of_all = replace(one, culprits=replace(one.culprits, ranks=(), moves=False))
        words = describe_finding(of_all, found)
        assert words.title == f"{one.kind}s"
        assert words.sentence.startswith("all ranks ")
        assert "leave the machine out" not in words.to_do
        assert describe_finding(one, found).title == one.kind


@pytest.mark.parametrize("num_steps", [STEPS, STEPS - 1])
def test_few_steps_are_said(num_steps: int) -> None:
    def exchange(step: int) -> Exchange:
        return ("forward", "all_to_all", 0), lambda rank: Run(rank, step, ("work", 0), 0.1), lambda _: 0.001

    found = attribute(graph_of(RANKS, num_steps, lambda step: [exchange(step)]))
    assert ("11 steps may be too few: record 12 or more" in text_of(found)) == (num_steps < STEPS)
