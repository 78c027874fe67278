"""Models spread over gloo processes against one process: logits, every gradient, greedy text, checkpoints.

TRL is no part of the extra `test`: `pip install trl`.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch
from processes import run_torchrun

from tritonmoe import OverlapConfig
from tritonmoe.integrations.transformers import register
from tritonmoe.placement.expert_shards import _ScaledGradient

WORKER = Path(__file__).parent / "expert_parallel_worker.py"
TRAINING_WORKER = Path(__file__).parent / "expert_parallel_training_worker.py"
CHECKPOINTS_WORKER = Path(__file__).parent / "trainer_checkpoints_worker.py"
FRAMEWORKS_WORKER = Path(__file__).parent / "frameworks_worker.py"
VERSION = tuple(int(number) for number in importlib.metadata.version("transformers").split(".")[:2])
HAS_EP_REGISTRY = VERSION >= (5, 23)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("expert_parallel")


def run(num_processes: int, directory: Path, *cases: str, worker: Path = WORKER, restarts: int = 0) -> None:
    """Run the cases, in this order, on so many processes; all must pass."""
    run_torchrun(num_processes, worker, str(directory), cases=cases, restarts=restarts)


def test_models_on_two_processes_equal_one(directory):
    run(2, directory, "parallelize:mixtral", "refused:")


@pytest.mark.thorough
def test_more_of_models_on_two_processes(directory):
    cases = ["parallelize:gpt_oss", "checkpointed:mixtral", "wrapped:mixtral", "replayed:mixtral"]
    if HAS_EP_REGISTRY:
        cases.append("tp:mixtral")
    if VERSION >= (5, 17):
        cases.append("compiled:mixtral")
    if VERSION >= (5, 20):
        cases.append("normed:")
    if HAS_EP_REGISTRY:
        cases += ["fsdp:mixtral", "refused_ep_implementation:"]
    run(2, directory, *cases, "save:", "load:")
    run(1, directory, "load:")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EP_REGISTRY, reason="EPImplementationInterface came in 5.23")
def test_ep_implementation_with_other_models(directory):
    run(2, directory, "tp:gpt_oss", "fsdp:gpt_oss", "tp:qwen3_moe", "fsdp:qwen3_moe")


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "readers"), [(2, (1, 4, 8)), (1, (8,)), (8, (1, 2))])
def test_checkpoints_go_over_any_number_of_ranks(directory, writers, readers):
    # model and optimizer, read back bit for bit
    run(writers, directory, "save:")
    for num_processes in readers:
        run(num_processes, directory, "load:")


@pytest.mark.thorough
def test_fsdp_over_another_axis(directory):
    # FSDP2's hooks gather dense weights of four ranks, and experts of the two that share them
    run(4, directory, "fully_sharded:mixtral", worker=TRAINING_WORKER)


@pytest.mark.thorough
@pytest.mark.skipif(VERSION < (5, 17), reason="Trainer mixes tensors and DTensors since then")
def test_trainer_and_fsdp_on_two_processes_equal_one(directory):
    run(2, directory, "trainer:mixtral", "sharded_beside_experts:mixtral", worker=TRAINING_WORKER)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EP_REGISTRY, reason="EPImplementationInterface came in 5.23")
def test_trainer_and_fsdp_with_the_ep_implementation(directory):
    run(4, directory, "ep_implementation:mixtral", "ep_implementation:gpt_oss", worker=TRAINING_WORKER)
    run(2, directory, "trainer_with_ep_implementation:mixtral", worker=TRAINING_WORKER)


@pytest.mark.thorough
def test_trainer_resumes_bit_for_bit_and_on_another_number_of_ranks(directory):
    run(2, directory, "resumed:mixtral", "write:mixtral", worker=CHECKPOINTS_WORKER)
    run(1, directory, "read:mixtral", worker=CHECKPOINTS_WORKER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        ("killed:mixtral", "best:mixtral"),
        ("resumed:gpt2", "best:gpt2", "saved_alone:gpt2"),
        ("adapted:mixtral",),
    ],
)
def test_more_of_trainer_checkpoints(tmp_path, cases):
    run(2, tmp_path, *cases, worker=CHECKPOINTS_WORKER)


@pytest.mark.slow
def test_trainer_goes_on_after_a_rank_was_killed_inside_a_checkpoint(tmp_path):
    run(2, tmp_path, "restarted:mixtral", worker=CHECKPOINTS_WORKER, restarts=1)


@pytest.mark.slow
def test_trainer_checkpoints_go_over_more_ranks(tmp_path):
    run(1, tmp_path, "write:qwen3_moe", worker=CHECKPOINTS_WORKER)
    run(4, tmp_path, "read:qwen3_moe", worker=CHECKPOINTS_WORKER)


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapted_experts_on_two_processes_equal_one(directory):
    cases = (f"adapted_experts:{name}" for name in ("layer", "gemma2", "mixtral"))
    run(2, directory, "adapted_merged:mixtral", *cases, worker=CHECKPOINTS_WORKER)


@pytest.mark.thorough
def test_what_rank_0_saves_alone_is_refused_or_whole(directory):
    run(2, directory, "pickled:", "accelerate:", worker=FRAMEWORKS_WORKER)
    run(1, directory, "accelerate_alone:", worker=FRAMEWORKS_WORKER)


@pytest.mark.thorough
def test_accelerates_fsdp_plug_in(directory):
    """Saved by two processes, loaded by two and by one."""
    cases = "accelerate_fsdp:SHARDED_STATE_DICT", "accelerate_fsdp:FULL_STATE_DICT", "accelerate_fsdp_model:mixtral"
    run(2, directory, *cases, "accelerate_fsdp_refused:", worker=FRAMEWORKS_WORKER)
    run(1, directory, *cases, worker=FRAMEWORKS_WORKER)


@pytest.mark.slow
def test_trl(tmp_path):
    pytest.importorskip("trl")
    run(2, tmp_path, "trl:mixtral", worker=CHECKPOINTS_WORKER)


def test_overlap_of_the_ep_implementation_needs_its_registry(monkeypatch):
    register()  # imports transformers, which asks for versions too
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "5.17.0")
    with pytest.raises(ImportError, match=r"transformers 5\.17 doesn't know .*use parallelize"):
        register(OverlapConfig(num_chunks=2))


def test_scaled_gradient():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = _ScaledGradient.apply(x, 0.25, None, 0)
    y.backward(torch.tensor([4.0, 8.0]))
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0]))
