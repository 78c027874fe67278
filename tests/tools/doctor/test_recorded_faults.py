"""Verdicts on recordings with faults that come and go, grow, move, have several culprits, or are in one layer alone."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from recorded_layers import of_layers

from tests.support.synthetic_runs import Run, healthy, write_run
from tritonmoe.overlap.simulation.cost_model import LinkCosts, StepCosts
from tritonmoe.tools.doctor.attribution import Verdict, attribute
from tritonmoe.tools.doctor.recorded_graph import graph_of
from tritonmoe.tools.doctor.recorded_run import judge_recording, known_of
from tritonmoe.tools.recording.recording_reader import read_recording


@dataclass(frozen=True)
class Faulty(Run):
    """A run with several culprits: (rank, times as long), (rank, seconds late), (sender, receiver, times as long)."""

    slow: tuple[tuple[int, float], ...] = ()
    slow_backward: tuple[tuple[int, float], ...] = ()
    late: tuple[tuple[int, float], ...] = ()
    slow_links: tuple[tuple[int, int, float], ...] = ()

    def link(self) -> LinkCosts:
        costs = super().link()
        link_s = costs.each.link_s.clone()
        for sender, receiver, times in self.slow_links:
            link_s[sender, receiver] = self.byte_s * times
        return replace(costs, each=replace(costs.each, link_s=link_s))

    def steps(self) -> StepCosts:
        costs = super().steps()
        slowness = dict(costs.slowness)
        for faults, kinds in ((self.slow, tuple(slowness)), (self.slow_backward, ("experts_backward", "weight_grad"))):
            for rank, times in faults:
                for kind in kinds:
                    slowness[kind] = slowness[kind].clone()
                    slowness[kind][rank] *= times
        return replace(costs, slowness=slowness)

    def late_s(self) -> torch.Tensor:
        late = super().late_s()
        for rank, seconds in self.late:
            late[rank] = seconds
        return late


def mended(run: Faulty) -> Faulty:
    return replace(healthy(run), slow=(), slow_backward=(), late=(), slow_links=())


def verdict_on(folder: Path, runs: list[Faulty]) -> tuple[Verdict, float]:
    """Return the verdict, and what the steps would take less without the faults."""
    recording = read_recording(write_run(folder, runs, seed=1))
    built = graph_of(recording)
    cost_s = sum(run.seconds() - mended(run).seconds() for run in runs) / len(runs)
    return attribute(built.graph, known_of(recording, built)), cost_s


WELL = Faulty(noise=0.03)
DRAW = random.Random(3)


def late_at_times(step: int, period: int, seconds: float) -> Faulty:
    return replace(WELL, late=((1, seconds),)) if step % period == period - 1 else WELL


FAULTS = {
    "two late of four": ([replace(WELL, late=((0, 0.08), (3, 0.08)))] * 9, "late rank", {0, 3}, "always"),
    "three slow of four": (
        [replace(WELL, slow=((0, 1.5), (1, 1.5), (3, 1.5)))] * 9, "slow rank", {0, 1, 3}, "always",
    ),
    "every third": ([late_at_times(n, 3, 0.4) for n in range(15)], "late rank", {1}, "periodic"),
    "every seventh": ([late_at_times(n, 7, 0.6) for n in range(21)], "late rank", {1}, "periodic"),
    "slow every fourth": (
        [replace(WELL, slow=((2, 2.5 if n % 4 == 1 else 1.0),)) for n in range(16)], "slow rank", {2}, "periodic",
    ),
    "growing": ([replace(WELL, slow=((1, 1 + 0.1 * n),)) for n in range(12)], "slow rank", {1}, "growing"),
    "moving": ([replace(WELL, late=((DRAW.randrange(4), 0.12),)) for _ in range(12)], "late rank", set(), "always"),
    "a link at times": (
        [replace(WELL, slow_link=(2, 1, 150.0) if n % 3 == 0 else None) for n in range(12)],
        "slow link", {2, 1}, "periodic",
    ),
    "two links of one rank": (
        [replace(WELL, slow_links=((1, 0, 60.0), (0, 3, 60.0)))] * 9, "slow link", {0, 1, 3}, "always",
    ),
    "a port that moves": ([replace(WELL, slow_port=(n % 4, 25.0)) for n in range(12)], "slow port", set(), "always"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if n % 4 else ()) for n, name in enumerate(FAULTS)]
)
def test_who_when_and_cost(name: str, tmp_path: Path) -> None:
    runs, kind, ranks, when = FAULTS[name]
    found, cost_s = verdict_on(tmp_path, runs)
    first = found.findings[0]
    assert (first.kind, set(first.culprits.ranks), first.when.when) == (kind, ranks, when)
    assert first.culprits.moves == (not ranks)
    assert first.cost.seconds == pytest.approx(cost_s, rel=0.1)
    assert not found.is_healthy


def test_in_backward_only(tmp_path: Path) -> None:
    found, cost_s = verdict_on(tmp_path, [replace(WELL, slow_backward=((2, 1.6),))] * 9)
    (first,) = found.findings
    assert (first.kind, first.culprits.ranks, first.culprits.phase) == ("slow rank", (2,), "backward")
    assert first.cost.seconds == pytest.approx(cost_s, rel=0.1)


def test_several_causes_at_once(tmp_path: Path) -> None:
    found, _ = verdict_on(tmp_path, [replace(WELL, slow=((3, 1.6),), slow_link=(0, 1, 60.0))] * 9)
    assert {(one.kind, one.culprits.ranks) for one in found.findings} == {("slow link", (0, 1)), ("slow rank", (3,))}


@pytest.mark.thorough
@pytest.mark.parametrize("num_layers", [2, pytest.param(8, marks=pytest.mark.thorough)])
def test_late_before_each_of_unlike_layers(num_layers: int, tmp_path: Path) -> None:
    runs = [replace(WELL, rows=100.0 + 40 * layer, late=((2, 0.06),)) for layer in range(num_layers)]
    recording = of_layers(tmp_path, [[run] * 6 for run in runs])
    built = graph_of(recording)
    (first,) = attribute(built.graph, known_of(recording, built)).findings
    assert (first.kind, first.culprits.ranks, first.culprits.layer) == ("late rank", (2,), None)
    assert first.cost.seconds == pytest.approx(0.06 * num_layers, rel=0.05)


@pytest.mark.thorough
def test_slow_in_one_layer_of_four(tmp_path: Path) -> None:
    runs = [replace(WELL, rows=100.0 + 40 * n, slow=((1, 2.5),) if n == 2 else ()) for n in range(4)]
    recording = of_layers(tmp_path, [[run] * 6 for run in runs])
    built = graph_of(recording)
    (first,) = attribute(built.graph, known_of(recording, built)).findings
    assert (first.kind, first.culprits.ranks, first.culprits.layer) == ("slow rank", (1,), 2)


@pytest.mark.parametrize("size", [3, 8])
def test_noise_is_no_finding(size: int, tmp_path: Path) -> None:
    found, _ = verdict_on(tmp_path, [replace(WELL, size=size, noise=0.05)] * 9)
    assert found.is_healthy
    assert found.findings == ()


@pytest.mark.thorough
@pytest.mark.parametrize(("num_slow", "aside"), [(0, 0), (1, 1), (2, 2), (3, 0)])
def test_first_steps_of_warming_up_are_left_aside(num_slow: int, aside: int, tmp_path: Path) -> None:
    """Of three that take long one may be an accident, but not two: they are evidence, as all later ones are."""
    slow = replace(WELL, pair_s=2 * WELL.pair_s)
    found = judge_recording(read_recording(write_run(tmp_path, [slow] * num_slow + [WELL] * (12 - num_slow), seed=1)))
    assert len(found.found.graph.steps) == 12 - aside
    assert any("are left out" in note or "is left out" in note for note in found.limits) == bool(aside)


@pytest.mark.thorough
def test_a_later_step_that_takes_long_is_not_left_aside(tmp_path: Path) -> None:
    slow = replace(WELL, pair_s=2 * WELL.pair_s)
    found = judge_recording(read_recording(write_run(tmp_path, [WELL] * 6 + [slow] + [WELL] * 5, seed=1)))
    assert len(found.found.graph.steps) == 12
