"""tmt.two_batches: tiny models of many families, Trainer, checkpointing, caches, on two gloo processes."""

from pathlib import Path

import pytest
import test_families
from test_transformers_expert_parallel import run

WORKER = Path(__file__).parent / "two_batches_worker.py"
FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3")
MORE = tuple(family for family in test_families.QUICK if family not in FAMILIES)


def test_families_and_calls_in_halves(tmp_path):
    cases = ("calls:qwen3_moe", "whole:mixtral", "checkpointed:mixtral", "copied:mixtral")
    run(2, tmp_path, *(f"family:{family}" for family in FAMILIES), *cases, worker=WORKER)


def test_trainer_in_halves(tmp_path):
    run(2, tmp_path, "trainer:mixtral", worker=WORKER)


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_more_families_in_halves(family, tmp_path):
    run(2, tmp_path, f"family:{family}", worker=WORKER)
