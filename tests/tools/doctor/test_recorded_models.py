"""Attribution of what models do: stacks of layers, recomputation, batches that differ, a capacity."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.synthetic_runs import Run, healthy, write_run
from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.count_exchange import CallMarks
from tritonmoe.overlap.simulation.cost_model import LayerWork
from tritonmoe.overlap.simulation.simulator import simulate_two_batches
from tritonmoe.tools.doctor.recorded_run import RecordedRun, judge_recording
from tritonmoe.tools.recording.call_recording import RecordedPass, Recording
from tritonmoe.tools.recording.recording_reader import read_recording

CALLS = 4


def diagnose(folder: Path, run: Run) -> RecordedRun:
    return judge_recording(read_recording(write_run(folder, [run] * CALLS)))


WITH_CAPACITY = {
    "imbalance": (Run(hot_rank=(0, 2.0), capacity=2.0), (0,)),
    "slow rank": (Run(slow_rank=(2, 1.5), capacity=2.0), (2,)),
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", WITH_CAPACITY)
def test_with_a_capacity_ranks_compute_what_is_there_and_not_the_room(kind: str, tmp_path: Path) -> None:
    """The room is the same on all ranks: of a hot one all of it seems to take long."""
    run, culprits = WITH_CAPACITY[kind]
    found = diagnose(tmp_path, run)
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert [(one.kind, one.culprits.ranks) for one in found.found.findings] == [(kind, culprits)]
    assert found.found.findings[0].cost.seconds == pytest.approx(run.seconds() - healthy(run).seconds(), rel=0.05)


ONE, THREE = Run(is_chained=True, recomputes=True), Run(num_layers=3, is_chained=True)
IN_A_STACK = {
    "a slow rank, recomputed": (replace(ONE, slow_rank=(2, 1.5)), ("slow rank", (2,))),
    "a slow rank of three layers": (replace(THREE, slow_rank=(2, 1.5)), ("slow rank", (2,))),
    "a late rank of three, recomputed": (
        replace(THREE, late_rank=(1, 0.08), recomputes=True),
        ("late rank", (1,)),
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if "three" in name else ()) for name in IN_A_STACK]
)
def test_ranks_that_end_one_pass_late_are_not_late_in_the_next(name: str, tmp_path: Path) -> None:
    """Each rank goes on when it has ended a pass itself: a slow one, whose weight gradients nobody waits for, later."""
    run, fault = IN_A_STACK[name]
    found = diagnose(tmp_path / "ill", run)
    without = diagnose(tmp_path / "healthy", healthy(run))
    assert without.found.is_healthy
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert [(one.kind, one.culprits.ranks) for one in found.found.findings] == [fault]
    cost_s = found.found.measured_s - without.found.measured_s
    assert found.found.findings[0].cost.seconds == pytest.approx(cost_s, rel=0.05)


LENGTHS = (100.0, 130.0, 170.0, 210.0, 260.0, 300.0)


def of_lengths(seed: int) -> list[Run]:
    lengths = list(LENGTHS) * 2
    random.Random(seed).shuffle(lengths)
    return [Run(rows=rows) for rows in lengths]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_batches_of_different_lengths_are_healthy(seed: int, tmp_path: Path) -> None:
    """The calls that are walked are shorter, or longer, than most."""
    found = judge_recording(read_recording(write_run(tmp_path, of_lengths(seed))))
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert found.found.is_healthy, found.found.findings
    assert len(found.found.graph.steps) == len(of_lengths(seed))


@pytest.mark.thorough
def test_a_disturbed_call_is_no_healthy_one(tmp_path: Path) -> None:
    """It takes no longer than others do, which have more pairs; and it is one of so many that it may not come again."""
    runs = of_lengths(0)
    runs[7] = replace(runs[7], rows=100.0, pair_s=3 * runs[7].pair_s)
    found = judge_recording(read_recording(write_run(tmp_path, runs)))
    assert len(found.found.graph.steps) == len(runs)
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert not found.found.is_healthy
    cost_s = runs[7].seconds() - replace(runs[7], pair_s=runs[6].pair_s).seconds()
    assert found.found.together.seconds == pytest.approx(cost_s / len(runs), rel=0.1)


@pytest.mark.thorough
def test_prefill_and_decode(tmp_path: Path) -> None:
    """All calls count; most of the time goes in the few long ones, and so does most of what a slow rank costs."""
    long = Run(rows=200.0, slow_rank=(2, 1.5))
    short = replace(long, rows=8.0)
    found = judge_recording(read_recording(write_run(tmp_path, ([short] * 4 + [long]) * 4)))
    assert found.found.measured_s == pytest.approx((4 * short.seconds() + long.seconds()) / 5)
    assert [(one.kind, one.culprits.ranks) for one in found.found.findings] == [("slow rank", (2,))]
    cost_s = sum(times * (run.seconds() - healthy(run).seconds()) for times, run in ((4, short), (1, long))) / 5
    assert found.found.findings[0].cost.seconds == pytest.approx(cost_s, rel=0.05)


def of_layers(folder: Path, runs: list[Run]) -> Recording:
    """Return a recording in which each of these runs is a layer of its own, whose calls follow each other."""
    layers = [read_recording(write_run(folder / str(layer), [run] * CALLS)) for layer, run in enumerate(runs)]

    def later(one: RecordedPass, by_s: float) -> RecordedPass:
        marks = one.marks and CallMarks(*(moment + by_s for moment in one.marks))
        return replace(one, marks=marks, origin=one.origin + by_s)

    calls = []
    for sequence in range(CALLS * len(layers)):
        number, layer = divmod(sequence, len(layers))
        call = layers[layer].calls[number]
        by_s = 10.0 * sequence - min(of.forward.entered for of in call.ranks)
        ranks = [
            replace(of, forward=later(of.forward, by_s), backward=of.backward and later(of.backward, by_s))
            for of in call.ranks
        ]
        calls.append(replace(call, layer=layer, sequence=sequence, ranks=tuple(ranks)))
    return replace(layers[0], calls=tuple(calls))


@pytest.mark.thorough
def test_each_layer_has_a_hot_rank_of_its_own(tmp_path: Path) -> None:
    """All layers together, every rank computes as many pairs; the last layer's hot rank is the hottest."""
    runs = [Run(hot_rank=(rank, 2.0 + rank / 10)) for rank in range(4)]
    found = judge_recording(of_layers(tmp_path, runs))
    (imbalance,) = found.found.findings
    assert imbalance.kind == "imbalance"
    cost_s = sum(run.seconds() - healthy(run).seconds() for run in runs)
    assert imbalance.cost.seconds == pytest.approx(cost_s, rel=0.05)
    (replicas,) = (advice for advice in found.advice if advice.words.startswith("replicas"))
    assert "for each layer by its own load, in layer 3 the expert of slot 6 on 3 ranks" in replicas.words
    assert replicas.gain.seconds > 0.4 * imbalance.cost.seconds
    (copies,) = (advice for advice in found.advice if advice.words.startswith("copies of hot experts"))
    assert 'OverlapConfig(balance="auto")' in copies.words
    assert 0.4 * imbalance.cost.seconds < copies.gain.seconds < 1.05 * imbalance.cost.seconds


@pytest.mark.thorough
def test_copies_are_not_offered_where_their_weights_take_too_long(tmp_path: Path) -> None:
    """On a link of which a row takes a millisecond for each byte."""
    found = diagnose(tmp_path, Run(hot_rank=(1, 2.0), byte_s=1e-3))
    assert not any("copies of hot experts" in advice.words for advice in found.advice)


class LongerBatch(Run):
    """Rank 2 has twice the tokens; routing is uniform."""

    def work(self) -> LayerWork:
        work = super().work()
        times = torch.tensor([1.0, 1.0, 2.0, 1.0], dtype=torch.float64)[:, None]
        return replace(work, rows=work.rows * times, pairs=work.pairs * times)


def test_a_rank_with_more_tokens_is_no_hot_expert(tmp_path: Path) -> None:
    found = diagnose(tmp_path, LongerBatch(byte_s=1e-6))
    assert not any("placement" in advice.words.lower() for advice in found.advice)
    assert not any("copies" in advice.words for advice in found.advice)


def gain_of_two_batches(run: Run, beside_s: tuple[float, float]) -> float:
    """Return what three layers take less, in the simulator, beside so much else of the model with a whole batch."""
    work, plan = run.work(), OverlapPlan((1,), local_first=False)
    half = replace(work, rows=work.rows / 2, pairs=work.pairs / 2)
    of_half = tuple(seconds / 2 for seconds in beside_s)
    num_fillers = 2 if run.filler_s else 0
    halves = simulate_two_batches(plan, half, run.steps(), run.link(), of_half, 3, num_fillers=num_fillers)
    return 3 * (run.seconds() + sum(beside_s)) - sum(of.total_s for of in halves)


STACK = Run(size=2, num_chunks=2, byte_s=1e-6, num_layers=3, beside_s=(0.05, 0.1))
RECOMPUTED = replace(STACK, byte_s=3e-6, beside_s=(0.05, 0.01), recomputes=True)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("run", "beside_s"),
    [(replace(STACK, filler_s=0.01), (0.05, 0.1)), (RECOMPUTED, (0.05, 0.06))],
    ids=["fillers", "recompute"],
)
def test_two_batches_gain_nothing_of_a_layers_own(run: Run, beside_s: tuple[float, float], tmp_path: Path) -> None:
    """Fillers run in each half too, and a recompute is no other work under which an exchange hides."""
    (advice,) = (one for one in diagnose(tmp_path, run).advice if "two_batches" in one.words)
    assert advice.gain.seconds == pytest.approx(gain_of_two_batches(run, beside_s), rel=0.1)


@pytest.mark.thorough
def test_two_batches_gain_no_shared_expert(tmp_path: Path) -> None:
    """There is nothing to hide."""
    found = diagnose(tmp_path, replace(STACK, byte_s=1e-8, filler_s=0.05))
    assert not any("two_batches" in one.words for one in found.advice)
