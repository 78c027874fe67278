"""tmt.two_batches: tiny models of many families, Trainer, checkpointing, caches, on two gloo processes."""

from pathlib import Path

import pytest
import test_families
import torch
from test_transformers_expert_parallel import VERSION, run

from tritonmoe.integrations.transformers.model_halves import HalvedForward, HalvesTrial, split
from tritonmoe.transports import LocalTransport

WORKER = Path(__file__).parent / "two_batches_worker.py"
FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3")
MORE = tuple(family for family in test_families.QUICK if family not in FAMILIES)


@pytest.mark.thorough
def test_families_and_calls_in_halves(tmp_path):
    cases = (
        "calls:qwen3_moe",
        "positions:qwen3_vl_moe",
        "whole:mixtral",
        "checkpointed:mixtral",
        "copied:mixtral",
        "auto:mixtral",
        "replayed:mixtral",
    )
    run(2, tmp_path, *(f"family:{family}" for family in FAMILIES), *cases, worker=WORKER)


@pytest.mark.thorough
@pytest.mark.skipif(VERSION < (5, 17), reason="Trainer counted the first label as a target before")
def test_trainer_in_halves(tmp_path):
    run(2, tmp_path, "trainer:mixtral", worker=WORKER)


def steps(trial: HalvesTrial, halves_ns: int, whole_ns: int, num_steps: int) -> list[bool]:
    """Whether each of the steps ran in halves, where those and whole ones take so long."""
    ran, slowest_ns = [], 0
    for _ in range(num_steps):
        trial.end(slowest_ns)
        is_halved, _ = trial.begin()
        slowest_ns = halves_ns if is_halved else whole_ns
        ran.append(is_halved)
    return ran


@pytest.mark.parametrize(("halves_ns", "is_kept"), [(80, True), (97, True), (99, False), (130, False)])
def test_what_is_faster_is_kept(halves_ns, is_kept):
    trial = HalvesTrial(num_layers=4)
    first = trial.num_settling
    ran = steps(trial, halves_ns * 10**6, 100 * 10**6, first + 20)
    assert not any(ran[:first])
    assert sum(ran[first : first + 8]) == 4
    assert set(ran[first + 8 :]) == {is_kept}
    assert f"{halves_ns:.1f} ms, and of one batch 100.0 ms" in trial.reason


def test_steps_of_an_optimizer_decide_nothing():
    """With two or four micro-batches a step, those before an optimizer's step take longer."""
    for every in (2, 4):
        trial = HalvesTrial(num_layers=1)
        slowest_ns = 0
        for number in range(trial.num_settling + 9):
            trial.end(slowest_ns)
            is_halved, _ = trial.begin()
            slowest_ns = (90 if is_halved else 100) + (1000 if number % every == 0 else 0)
        assert trial.decision


def test_steps_that_are_not_tried_take_no_tried_ones_time():
    """One of a single sequence is whole whatever is tried, and what an evaluation follows is tried again."""
    trial = HalvesTrial(num_layers=1)
    slowest_ns, num_tried = 0, 0
    for number in range(60):
        trial.end(slowest_ns)
        if number % 3 == 0:  # a single sequence
            slowest_ns = 10
            continue
        is_halved, _ = trial.begin()
        slowest_ns = 60 if is_halved else 100
        num_tried += trial._tried is not None
        if number % 7 == 0:
            trial.interrupt()
            slowest_ns = 0
    assert trial.times_ns == {True: [60] * 4, False: [100] * 4}
    assert trial.decision
    assert num_tried > 8


class OtherRank(LocalTransport):
    """Another rank tells what it says of its batch: minus its sequences, a time, whether it can't split it."""

    def __init__(self, *told):
        super().__init__()
        self.told, self.num_calls = torch.tensor(told), 0

    def all_reduce(self, tensor, op="sum"):
        self.num_calls += 1
        return torch.maximum(tensor, self.told, out=tensor)


@pytest.mark.parametrize("is_refused_there", [False, True])
def test_a_batch_that_one_rank_cannot_split_is_refused_on_all(is_refused_there):
    """Nobody waits for that rank in the first layer."""
    other = OtherRank(-4, 0, int(is_refused_there))
    halved = HalvedForward(torch.nn.Linear(2, 2), [], [other], None)
    ids = torch.zeros(4, 3, dtype=torch.int64)
    pictures = {} if is_refused_there else {"pixel_values": torch.zeros(4, 3)}
    match = "another rank" if is_refused_there else "can't split pixel_values"
    with pytest.raises(ValueError, match=match):
        halved._agree({"input_ids": ids, **pictures})
    assert other.num_calls == 1
    halved.trial = trial = HalvesTrial(num_layers=1)
    trial.num_steps = first_tried = trial.num_settling
    with pytest.raises(ValueError, match=match):
        halved._agree({"input_ids": ids, **pictures})
    assert (trial.num_steps, trial._tried) == (first_tried, None), "it is tried again"
    alone = HalvedForward(halved.model, [], [OtherRank(-1, 0, 1)], None)
    assert alone._agree({"input_ids": ids})[0] is False, "whole batches need no splitting"


def test_the_batch_is_the_dimension_that_the_argument_has_it_in():
    """Whatever size the others have."""
    ids = torch.arange(12).view(3, 4)
    turned = torch.arange(3 * 3 * 4).view(3, 3, 4)
    mask = torch.ones(3, 1, 4, 4)
    arguments = {"input_ids": ids, "position_ids": turned, "attention_mask": mask, "labels": ids}
    first, second = split(arguments, 3, 2)
    assert torch.equal(first["position_ids"], turned[:, :2])
    assert torch.equal(second["position_ids"], turned[:, 2:])
    assert torch.equal(torch.cat([first["input_ids"], second["input_ids"]]), ids)
    assert (first["attention_mask"].shape[0], second["labels"].shape[0]) == (2, 1)
    shared = split({"position_ids": turned[:, :1], "attention_mask": mask[:1]}, 3, 2)
    assert shared == ({}, {}), "both halves get what is for every sequence as it is"
    for refused in (
        {"position_ids": torch.arange(3)},  # of three tokens
        {"attention_mask": torch.ones(3, 4, 4)},
        {"attention_mask": {"full_attention": mask}},
        {"cache_position": torch.arange(3)},
        {"cu_seq_lens_q": torch.arange(3)},
        {"pixel_values": torch.ones(3, 5)},
        {"image_grid_thw": torch.ones(3, 3)},
        {"encoder_outputs": (torch.ones(3, 4, 8),)},
    ):
        with pytest.raises(ValueError, match=f"can't split {next(iter(refused))}"):
            split({"input_ids": ids, **refused}, 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_more_families_in_halves(family, tmp_path):
    run(2, tmp_path, f"family:{family}", worker=WORKER)
