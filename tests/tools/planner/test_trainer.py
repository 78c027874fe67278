"""What a trainer does shows in a step: what it sends, gathers and launches, and how its routing is spread."""

from dataclasses import replace

import pytest

from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.exchange_curve import SERIAL
from tritonmoe.tools.planner.job import TRAINERS, Job, trained_by
from tritonmoe.tools.planner.job_memory import memory_gib
from tritonmoe.tools.planner.layer_exchange import LayerExchange
from tritonmoe.tools.planner.model_config import MODELS
from tritonmoe.tools.planner.step import step_time

JOB = Job(MODELS["Qwen3-30B-A3B"], micro_batches=4, ep=8)
H100 = CLUSTERS["H100"].with_nodes(2)


def seconds(job: Job, part: str | None = None) -> float:
    time = step_time(job, H100, 1, SERIAL)
    return time.step_s if part is None else time.parts.get(part, 0.0)


def test_ours_is_the_job_as_it_is():
    assert trained_by(JOB, "ours") == JOB


def test_megatron_sends_pairs_and_hides_nothing():
    job = trained_by(JOB, "megatron")
    assert (job.sends_pairs, job.overlaps_exchange, job.zero, job.pair_passes) == (True, False, 1, 12)
    assert LayerExchange(job, H100, 1).work.rows.sum(1).tolist() == [4096 * 8] * 2
    rows = trained_by(JOB, "megatron", "rows")
    assert (rows.sends_pairs, rows.pair_passes) == (False, 6)
    assert seconds(JOB) < seconds(rows) < seconds(job)
    # 12 passes over the pairs' rows of 48 layers and 4 micro-batches, at 0.7 of 3.35 TB/s.
    passes = 12 * 4096 * 8 * 2048 * 2 * 48 * 4 / (0.7 * 3.35e12)
    assert seconds(job) - seconds(replace(job, pair_passes=0.0)) == pytest.approx(passes, rel=1e-3)


def test_zero_3_waits_for_weights_as_far_as_compute_is_shorter():
    job = trained_by(replace(JOB, ep=1), "torchtitan")
    fast = replace(H100, between=replace(H100.between, gb_per_s=5000.0), inside=replace(H100.inside, gb_per_s=9000.0))
    slow = replace(H100, between=replace(H100.between, gb_per_s=1.0))
    waiting = [step_time(job, one, 1, SERIAL).parts.get("waiting for weights", 0.0) for one in (fast, slow)]
    assert waiting[0] == 0
    # Twice 2 bytes and once 4 of a layer's parameters, 15/16 of which come from other ranks, 8 of which share a node's
    # ports; of that 0.9 of the layer's compute is hidden.
    layer = job.model.other_parameters + 128 * job.model.expert_parameters
    gathered = 8 * layer * 15 / 16 / (8 * 0.87 * 1e9) * 48 * 4
    assert gathered * 0.8 < waiting[1] < gathered
    assert memory_gib(job, H100) < memory_gib(replace(job, zero=1), H100) / 3


def test_a_stage_of_a_pipeline_gathers_its_weights_once_and_keeps_them():
    """As FSDP2 does under torch's pipelines: no micro-batch gathers them again, and gradients are summed once."""
    slow = replace(H100, inside=replace(H100.inside, gb_per_s=1.0))
    job = trained_by(replace(JOB, ep=1, pp=2), "torchtitan")
    parts = [step_time(replace(job, micro_batches=n), slow, 1, SERIAL).parts for n in (4, 8)]
    assert parts[0]["waiting for weights"] == pytest.approx(parts[1]["waiting for weights"])
    # Once 2 bytes and once 4 of a layer's parameters, 7/8 of which come from other ranks of the node.
    layer = job.model.other_parameters + 128 * job.model.expert_parameters
    gathered = 6 * layer * 7 / 8 / (slow.inside.efficiency.value * 1e9) * 24
    assert gathered * 0.8 < parts[0]["waiting for weights"] < gathered
    weights, gradients = 2 * 24 * layer, 4 * 24 * layer
    assert memory_gib(job, H100) > (weights + gradients) / 2**30
    assert memory_gib(job, H100) < memory_gib(replace(job, zero=1), H100) * 1.02


def test_experts_one_by_one_keep_the_host_busy():
    job = trained_by(replace(JOB, ep=1), "deepspeed")
    assert seconds(job, "waiting for the host") > 0.5 * 48 * 4 * 128 * 2 * 2.5e-3
    assert seconds(replace(job, ep=8), "waiting for the host") < 0.01 * seconds(job, "waiting for the host") + 1e-9
    full = replace(job, recompute="full")
    longer = seconds(full) / seconds(job)
    assert longer == pytest.approx(1.5, abs=0.05)  # three passes instead of two


def test_the_busiest_rank_sets_the_pace_of_experts_and_exchanges():
    part = "experts and exchanges"
    assert seconds(replace(JOB, imbalance=1.5), part) == pytest.approx(1.5 * seconds(JOB, part))
    alone = replace(JOB, ep=1)
    assert seconds(replace(alone, imbalance=1.5)) == seconds(alone)


def test_interleaved_stages_shorten_the_bubble():
    job = replace(JOB, pp=4, ep=4, micro_batches=8)
    bubbles = [seconds(replace(job, stages_in_turn=count), "pipeline bubble") for count in (1, 4)]
    assert bubbles[0] == pytest.approx(4 * bubbles[1])


def test_selective_recomputation_is_between_none_and_full():
    none, selective, full = (replace(JOB, recompute=how) for how in ("none", "selective", "full"))
    assert seconds(none) < seconds(selective) < seconds(full)
    assert memory_gib(none, H100) > memory_gib(selective, H100) > memory_gib(full, H100)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("jax",), f"trainer must be one of {', '.join(TRAINERS)}, got 'jax'"),
        (("megatron", "tokens"), "sends must be one of rows, pairs, got 'tokens'"),
        (("ours", "pairs"), "leave sends='pairs' out"),
        (("megatron", None, 2), r"zero must be 1 .* or 3 .*, got 2"),
    ],
)
def test_what_no_trainer_does_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        trained_by(JOB, *arguments)


def test_an_imbalance_below_one_is_none():
    with pytest.raises(ValueError, match=r"imbalance is the busiest rank's load over the mean, at least 1, got 0\.5"):
        replace(JOB, imbalance=0.5)


def test_two_halves_in_turn_hide_exchanges_under_all_that_the_other_half_computes():
    one = trained_by(replace(JOB, micro_batch=2), "torchtitan")
    two = replace(one, two_batches=True)
    exposed = [step_time(job, H100, 1, SERIAL).exposed_s for job in (one, two)]
    assert exposed[1] == pytest.approx(exposed[0] / 8)
    assert seconds(one) - seconds(two) == pytest.approx(exposed[0] - exposed[1], rel=1e-6)
    slow = replace(H100, inside=replace(H100.inside, gb_per_s=1.0))
    assert step_time(two, slow, 1, SERIAL).exposed_s > 0.5 * step_time(one, slow, 1, SERIAL).exposed_s


def test_megatron_runs_two_micro_batches_in_turn():
    """The forward of one and the backward of another, of one sequence each too; one more is kept then."""
    one = trained_by(replace(JOB, micro_batch=1), "megatron")
    two = replace(one, two_batches=True)
    exposed = [step_time(job, H100, 1, SERIAL).exposed_s for job in (one, two)]
    assert exposed[1] == pytest.approx(exposed[0] / 8)
    assert memory_gib(two, H100) > memory_gib(one, H100)
    for wrong in (replace(one, micro_batches=1), trained_by(one, "torchtitan")):
        with pytest.raises(ValueError, match="Megatron takes two micro-batches"):
            replace(wrong, two_batches=True)
