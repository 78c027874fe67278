"""Experts of torch.distributed's ranks move between steps: DTensors, their optimizers, checkpoints and adapters."""

from pathlib import Path

import pytest
from processes import run_torchrun

WORKER = Path(__file__).parent / "rebalance_worker.py"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "cases", [("steps", "one_step_has_the_same_bits"), ("accumulated", "sharded"), ("refused",)], ids=lambda of: of[0]
)
def test_steps_and_gradients(tmp_path, cases):
    run_torchrun(4, WORKER, str(tmp_path), cases=cases)


@pytest.mark.thorough
def test_saved_by_four_ranks_and_read_by_others(tmp_path):
    run_torchrun(4, WORKER, str(tmp_path), cases=("saved",))
    for size in (2, 1):
        run_torchrun(size, WORKER, str(tmp_path), cases=("read_again",))


@pytest.mark.thorough
def test_models_around_the_layers(tmp_path):
    run_torchrun(2, WORKER, str(tmp_path), cases=("compiled", "adapters", "adapters_added_later", "halves"))


@pytest.mark.thorough
def test_models_of_transformers(tmp_path):
    run_torchrun(2, WORKER, str(tmp_path), cases=("transformers", "trainer"))
