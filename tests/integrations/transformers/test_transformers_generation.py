"""generate() of spread models whose ranks end at different lengths: texts, recordings, refusals."""

import importlib.metadata
from pathlib import Path

import pytest
from processes import run_torchrun

WORKER = Path(__file__).parent / "generation_worker.py"
VERSION = tuple(int(number) for number in importlib.metadata.version("transformers").split(".")[:2])


def run(num_processes: int, directory: Path, *cases: str) -> None:
    run_torchrun(num_processes, WORKER, str(directory), cases=cases)


@pytest.mark.thorough
def test_each_rank_ends_with_its_own_text(tmp_path):
    run(2, tmp_path, "lengths:mixtral", "refused:mixtral")


@pytest.mark.thorough
def test_rollouts_as_grpo_makes_them(tmp_path):
    run(2, tmp_path, "grpo:mixtral")


@pytest.mark.thorough
def test_every_way_to_generate(tmp_path):
    run(
        2,
        tmp_path,
        "ways:mixtral",
        "stopped:mixtral",
        "encoder_decoder:",
        "load:mixtral",
        "wrapped:mixtral",
    )
    run(2, tmp_path, "lengths:gpt_oss")


@pytest.mark.thorough
@pytest.mark.skipif(VERSION < (5, 17), reason="the models' forwards compile since then")
def test_compiled_steps(tmp_path):
    run(2, tmp_path, "compiled:mixtral")


@pytest.mark.thorough
def test_copies_and_shards_over_more_ranks(tmp_path):
    run(4, tmp_path, "meshes:mixtral")


@pytest.mark.thorough
@pytest.mark.skipif(VERSION < (5, 23), reason="EPImplementationInterface came in 5.23")
def test_models_that_were_spread_at_loading(tmp_path):
    run(2, tmp_path, "tp:mixtral", "fsdp:mixtral")
