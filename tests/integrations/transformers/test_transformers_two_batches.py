"""tmt.two_batches: tiny models of many families, Trainer, checkpointing, caches, on two gloo processes."""

from pathlib import Path

import pytest
import test_families
from test_transformers_expert_parallel import VERSION, run

from tritonmoe.integrations.transformers.halves_trial import HalvesTrial

WORKER = Path(__file__).parent / "two_batches_worker.py"
FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3")
MORE = tuple(family for family in test_families.QUICK if family not in FAMILIES)


@pytest.mark.thorough
def test_families_and_calls_in_halves(tmp_path):
    cases = ("calls:qwen3_moe", "whole:mixtral", "checkpointed:mixtral", "copied:mixtral", "auto:mixtral")
    run(2, tmp_path, *(f"family:{family}" for family in FAMILIES), *cases, worker=WORKER)


@pytest.mark.thorough
@pytest.mark.skipif(VERSION < (5, 17), reason="Trainer counted the first label as a target before")
def test_trainer_in_halves(tmp_path):
    run(2, tmp_path, "trainer:mixtral", worker=WORKER)


def steps(trial: HalvesTrial, of_ways_ms: list[int], num_steps: int) -> list[int]:
    """In how many chunks a half of each of the steps was, where whole ones and those of 1 and 2 chunks take so long."""
    ran, slowest_ns = [], 0
    for _ in range(num_steps):
        num_chunks, _ = trial.begin(slowest_ns)
        slowest_ns = of_ways_ms[num_chunks] * 10**6
        ran.append(num_chunks)
    return ran


@pytest.mark.parametrize(
    ("one_ms", "two_ms", "kept"), [(80, 81, 1), (97, 105, 1), (80, 79, 2), (130, 97, 2), (99, 99, 0), (130, 120, 0)]
)
def test_what_is_faster_is_kept(one_ms, two_ms, kept):
    trial = HalvesTrial(num_layers=4)
    first = trial.num_settling
    ran = steps(trial, [100, one_ms, two_ms], first + 24)
    assert not any(ran[:first])
    assert [ran[first : first + 12].count(way) for way in range(3)] == [4, 4, 4]
    assert set(ran[first + 12 :]) == {kept}
    assert f"{one_ms:.1f} ms with 1 chunk and {two_ms:.1f} ms with 2 chunks, and of one batch 100.0 ms" in trial.reason


def test_steps_of_an_optimizer_decide_nothing():
    """With two or four micro-batches a step, those before an optimizer's step take longer."""
    for every in (2, 4):
        trial = HalvesTrial(num_layers=1)
        slowest_ns = 0
        for number in range(trial.num_settling + 13):
            num_chunks, _ = trial.begin(slowest_ns)
            slowest_ns = [100, 90, 95][num_chunks] + (1000 if number % every == 0 else 0)
        assert trial.decision == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_more_families_in_halves(family, tmp_path):
    run(2, tmp_path, f"family:{family}", worker=WORKER)
