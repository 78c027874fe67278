"""A frozen model whose experts are packed: memory by hand, no gradient of what is frozen, and what is refused."""

from dataclasses import replace

import pytest

from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.comparison import compare
from tritonmoe.tools.planner.exchange_curve import SERIAL
from tritonmoe.tools.planner.job import FROZEN, Job, trained_by
from tritonmoe.tools.planner.job_memory import memory_gib
from tritonmoe.tools.planner.model_config import MODELS
from tritonmoe.tools.planner.operation_costs import layer_parts
from tritonmoe.tools.planner.plan_page import comparison_page, plan_page
from tritonmoe.tools.planner.plan_text import comparison_table, plan_table
from tritonmoe.tools.planner.step import step_time
from tritonmoe.tools.planner.training_plan import plan
from tritonmoe.tools.planner.transformer_model import flops_per_token

MODEL = MODELS["Qwen3-30B-A3B"]
TRAINED = Job(MODEL, micro_batches=4)
FROZEN_JOB = replace(TRAINED, frozen="mxfp4", adapter_rank=16)
NODE = CLUSTERS["H100"].with_nodes(1)
NUM_EXPERTS = MODEL.num_layers * MODEL.num_experts
ADAPTERS = NUM_EXPERTS * 16 * (2 * 2048 + 3 * 768)
"""A (R, D) and B (2F, R), A (R, F) and B (D, R), of every expert."""
EXPERTS = NUM_EXPERTS * MODEL.expert_parameters


@pytest.mark.parametrize(("frozen", "bits"), [("bf16", 16), ("mxfp4", 4.25), ("fp8", 8 + 32 / 128**2), ("nf4", 4.5)])
def test_memory_by_hand(frozen: str, bits: float) -> None:
    job, like = replace(FROZEN_JOB, frozen=frozen), replace(FROZEN_JOB, frozen="bf16")
    saved = memory_gib(like, NODE) - memory_gib(job, NODE)
    assert saved * 2**30 == pytest.approx(EXPERTS * (16 - bits) / 8)
    # What trains has an fp32 gradient on every rank, and 12 bytes of optimizer state on one of eight.
    trained, others = MODEL.num_parameters, MODEL.num_parameters - EXPERTS
    freed = memory_gib(TRAINED, NODE) - memory_gib(job, NODE)
    before = 2 * trained + 4 * trained + 12 * trained / 8
    after = 2 * others + bits / 8 * EXPERTS + 2 * ADAPTERS + 4 * ADAPTERS + 12 * ADAPTERS / 8
    assert freed * 2**30 == pytest.approx(before - after)


@pytest.mark.parametrize("frozen", FROZEN)
def test_spread_experts_are_shared_and_sharded_ones_too(frozen: str) -> None:
    job = replace(FROZEN_JOB, frozen=frozen, recompute="full")
    bits = {"bf16": 16, "mxfp4": 4.25, "fp8": 8 + 32 / 128**2, "nf4": 4.5}[frozen]
    weights = EXPERTS * bits / 8 + 2 * ADAPTERS
    by_ep = memory_gib(job, NODE) - memory_gib(replace(job, ep=8), NODE)
    assert by_ep * 2**30 == pytest.approx(7 / 8 * (weights + 4 * ADAPTERS))
    spread = replace(job, zero=3)
    held = 2 * (MODEL.num_parameters - EXPERTS) + weights
    by_zero = memory_gib(job, NODE) - memory_gib(spread, NODE)
    assert by_zero * 2**30 == pytest.approx(7 / 8 * (held + 4 * ADAPTERS) - 2 * held / MODEL.num_layers)


def test_what_is_frozen_has_no_gradients() -> None:
    trained, frozen = (layer_parts(job, NODE) for job in (TRAINED, FROZEN_JOB))
    for name in ("attention projections", "router"):
        assert frozen[name][0] == trained[name][0]
        assert frozen[name][1] < 0.7 * trained[name][1]
    full, own = (step_time(job, NODE, 1, SERIAL) for job in (TRAINED, FROZEN_JOB))
    assert own.parts["experts and exchanges"] < full.parts["experts and exchanges"]
    assert own.parts["optimizer"] < 0.1 * full.parts["optimizer"]
    assert own.parts["output layer and loss"] < full.parts["output layer and loss"]
    assert flops_per_token(MODEL, 4096, 16) < 0.8 * flops_per_token(MODEL, 4096)


def test_fewer_bytes_are_gathered() -> None:
    slow = replace(NODE, inside=replace(NODE.inside, gb_per_s=0.5))
    waits = [
        step_time(replace(FROZEN_JOB, frozen=frozen, zero=3), slow, 1, SERIAL).parts["waiting for weights"]
        for frozen in ("bf16", "fp8", "nf4", "mxfp4")
    ]
    assert waits == sorted(waits, reverse=True)
    passes = 2 * MODEL.num_experts * MODEL.expert_parameters * MODEL.num_layers * TRAINED.micro_batches
    rate = 0.5e9 * NODE.inside.efficiency.value
    assert waits[0] - waits[3] == pytest.approx(passes * (2 - 4.25 / 8) * 7 / 8 / rate, rel=0.02)


def test_a_larger_rank_takes_longer_and_needs_more() -> None:
    small, large = (replace(FROZEN_JOB, adapter_rank=rank) for rank in (8, 128))
    assert memory_gib(small, NODE) < memory_gib(large, NODE)
    assert step_time(small, NODE, 1, SERIAL).step_s < step_time(large, NODE, 1, SERIAL).step_s


@pytest.mark.thorough
def test_what_is_said() -> None:
    found = plan(FROZEN_JOB, NODE, [1, 8], num_draws=4)
    said = " ".join(plan_table(found).split())
    assert "frozen, experts in mxfp4 with adapters of rank 16" in said
    assert "Not measured on a GPU: how long experts in mxfp4 are decoded." in said
    assert found.to_json()["job"]["frozen"] == "mxfp4"
    assert any("Not measured on a GPU" in str(line) for line in plan_page(found).summary)
    plain = plan(replace(FROZEN_JOB, frozen="bf16"), NODE, [1, 8], num_draws=4)
    assert "Not measured" not in plan_table(plain)
    both = compare(FROZEN_JOB, [NODE, CLUSTERS["H200"].with_nodes(1)], [8])
    assert "Not measured on a GPU" in comparison_table(both)
    assert any("Not measured on a GPU" in str(line) for line in comparison_page(both).summary)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"adapter_rank": 4}, "say how its experts are stored"),
        ({"frozen": "int4", "adapter_rank": 4}, "frozen must be one of bf16, mxfp4, fp8, nf4"),
        ({"frozen": "nf4"}, "adapter_rank must be at least 1"),
        ({"frozen": "nf4", "adapter_rank": 4, "dtype": "fp8"}, "rows of bf16"),
        ({"frozen": "fp8", "adapter_rank": 4, "model": MODELS["gpt-oss-20b"]}, "F = 2880, which is not a multiple"),
        ({"frozen": "mxfp4", "adapter_rank": 4, "model": replace(MODEL, expert_size=100)}, "multiples of 32"),
    ],
)
def test_what_is_refused(wrong: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Job(**{"model": MODEL, **wrong})


def test_another_trainer_is_refused() -> None:
    with pytest.raises(ValueError, match="as this package trains its adapters"):
        trained_by(FROZEN_JOB, "megatron")
