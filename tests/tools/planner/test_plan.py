"""Plans: the fastest that fits comes first, with how sure that is."""

import json
import math
import re
import statistics
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritonmoe.config.overlap import NUM_CHUNKS, OverlapPlan, equal_sizes, ramp_sizes
from tritonmoe.overlap.tuning.search import ALIKE
from tritonmoe.tools.planner import comparison as comparing
from tritonmoe.tools.planner import plan_search
from tritonmoe.tools.planner import training_plan as planning
from tritonmoe.tools.planner.cluster import NORMAL_90, Estimate
from tritonmoe.tools.planner.cluster_presets import CLUSTERS, network_in, with_network
from tritonmoe.tools.planner.comparison import compare, equalized
from tritonmoe.tools.planner.draws import MODEL_ERROR, model_error
from tritonmoe.tools.planner.job import Job, trained_by
from tritonmoe.tools.planner.model_config import MODELS
from tritonmoe.tools.planner.plan_page import comparison_page
from tritonmoe.tools.planner.plan_search import OVERLAPS, Free, search, ways
from tritonmoe.tools.planner.plan_text import comparison_as_json, comparison_table, plan_as_json, plan_table
from tritonmoe.tools.planner.step import step_time
from tritonmoe.tools.planner.training_plan import Measured, plan

JOB = Job(MODELS["Qwen3-30B-A3B"], micro_batches=8)
FULL = replace(JOB, recompute="full")
H100 = CLUSTERS["H100"].with_nodes(2)


def test_the_fastest_that_fits_comes_first():
    found = plan(JOB, H100, [4, 8, 16])
    fitting = [one.time.step_s for one in found.predictions if one.fits]
    assert fitting == sorted(fitting)
    assert [one.fits for one in found.predictions] == sorted((one.fits for one in found.predictions), reverse=True)
    assert {(one.choice.ep, one.choice.num_levels) for one in found.predictions} == {(4, 1), (8, 1), (16, 1), (16, 2)}
    for one in found.predictions:
        low, high = one.step_interval_s
        assert low < one.time.step_s < high
    assert 0 < found.stays_best <= 1
    assert json.loads(json.dumps(found.to_json()))["choices"][0]["ep"] == found.best.choice.ep
    assert len(plan_table(found).splitlines()) <= 24
    second = found.predictions[1]
    faster = 1 - found.best.time.step_s / second.time.step_s
    verdict = plan_table(found).splitlines()[-1]
    gains = f"it is {faster:.1%} faster than the next choice ({second.choice})"
    assert verdict.startswith(f"Take {found.best.choice}: {gains}")
    assert f"stays the best in {found.stays_best:.0%} of 200 draws" in verdict
    assert plan_as_json(found)["verdict"] == verdict


def test_the_same_arguments_give_the_same_plan():
    first, second = (plan(JOB, H100, [8]) for _ in range(2))
    assert first == second


def ratio(cluster, job=FULL) -> float:
    """Return the upper end of the best step's interval over the lower one."""
    low, high = plan(job, cluster, [8]).best.step_interval_s
    return high / low


def measured(cluster, *names: str):
    """Return the cluster with these tables' estimates measured."""
    return replace(
        cluster,
        **{
            name: replace(
                getattr(cluster, name),
                **{key: replace(one, source="measured") for key, one in vars(getattr(cluster, name)).items()
                   if isinstance(one, Estimate)},
            )
            for name in names
        },
    )  # fmt: skip


@pytest.mark.thorough
def test_what_is_measured_makes_the_interval_narrower_but_never_as_narrow_as_itself():
    nothing, host, everything = (
        ratio(measured(H100, *names)) for names in ((), ("host",), ("gpu", "inside", "between", "host"))
    )
    assert everything < host < nothing
    # What the model itself is off by, on published steps, no measurement of the machine takes away; least where the
    # network between nodes is known, as it is when it was measured.
    model = model_error(measured(H100, "between"))
    assert model.slower < MODEL_ERROR.slower
    of_model = sum(math.hypot(of, model.own) for of in (model.faster, model.slower))
    assert math.log(everything) == pytest.approx(NORMAL_90 * of_model, rel=0.25)


@pytest.mark.thorough
def test_a_trainers_passes_are_uncertain_too():
    cluster = measured(H100, "gpu", "inside", "between", "host")
    job = trained_by(FULL, "torchtitan", zero=1)
    assert ratio(cluster, job) > 1.02 * ratio(cluster)
    found = plan(job, cluster, [8])
    assert found.sensitivities[0].key == "job.pair_passes"


def test_what_moves_the_time_most_is_to_be_measured_next():
    host = replace(H100.host, us_per_layer=Estimate(1e6, "assumed"))
    found = plan(FULL, replace(H100, host=host), [8])
    assert found.sensitivities[0].key == "host.us_per_layer"
    assert found.sensitivities[0].swing == pytest.approx(2.5**2 - 1, rel=0.03)


@pytest.mark.thorough
def test_4096_ranks_take_seconds():
    started = time.process_time()
    job = Job(MODELS["DeepSeek-V3"], micro_batches=32, pp=8, recompute="full")
    found = plan(job, CLUSTERS["H100"].with_nodes(512))
    assert time.process_time() - started < 60
    assert {one.choice.ep for one in found.predictions} == {2**n for n in range(9)}
    assert found.best.fits
    assert found.best.time.tokens == 512 * 32 * 4096


def test_nothing_fits():
    found = plan(Job(MODELS["DeepSeek-V3"]), H100, [16])
    assert not found.best.fits
    assert found.sensitivities == []  # of choices none of which can be made
    text = plan_table(found)
    assert "Nothing fits. A job can fill 73.6 of a GPU's 80 GiB (92%: the allocator, " in text
    assert f"this job needs at least {found.best.memory_gib:.0f} GiB" in text
    assert "Try --recompute full, " in text
    assert "Measure next" not in text


@pytest.mark.slow
def test_what_was_given_is_not_advised():
    given = plan_table(plan(Job(MODELS["DeepSeek-V3"], recompute="full"), H100, [16]))
    assert "--recompute full" not in given
    assert "more pipeline stages than 1 (--pp" in given
    searched = plan_table(plan(Job(MODELS["DeepSeek-V3"]), H100, free=Free(True, True, True)))
    assert "(all values of tp, pp, recomputation were tried). Try " in searched
    nodes = int(re.search(r"Try (\d+) nodes instead of 2", searched)[1])
    free = Free(True, True, True)
    assert plan(Job(MODELS["DeepSeek-V3"]), H100.with_nodes(nodes), free=free, num_draws=2).best.fits
    assert not plan(Job(MODELS["DeepSeek-V3"]), H100.with_nodes(nodes // 2), free=free, num_draws=2).best.fits


TINY = replace(
    MODELS["OLMoE-1B-7B"], num_layers=4, num_experts=8, top_k=2, vocab_size=8192, hidden_size=512, expert_size=512
)
SMALL_NODES = [
    replace(CLUSTERS[name].with_nodes(2), gpus_per_node=gpus) for name in ("H100", "H100-100G") for gpus in (4, 6)
]
DEGREES = st.sets(st.sampled_from([1, 2, 4, 8]), max_size=3)


@pytest.mark.thorough
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SMALL_NODES),
    DEGREES,
    DEGREES,
    st.tuples(*[st.booleans()] * 3),
    st.tuples(*[st.booleans()] * 3),
    st.sampled_from([0.4, 1.0, 80.0]),
    st.sampled_from(["ours", "ours", "megatron"]),
)
def test_more_choices_never_give_a_worse_plan(cluster, degrees, more_degrees, free, more_free, memory_gib, trainer):
    cluster = replace(cluster, gpu=replace(cluster.gpu, memory_gib=memory_gib))
    job = trained_by(Job(TINY, micro_batches=4, sequence=1024), trainer)
    larger = set() if not degrees or not more_degrees else degrees | more_degrees
    try:
        (few, *_), _ = search(job, cluster, degrees, Free(*free))
        (many, *_), _ = search(job, cluster, larger, Free(*map(max, free, more_free)))
    except ValueError:  # a number of ranks that fits no choice is refused
        fitting = {way.job.ep for way in ways(job, cluster, (), Free(*map(max, free, more_free)))}
        assert not larger | degrees <= fitting
        return
    assert many.fits >= few.fits
    if few.fits:
        assert many.s_per_token <= few.s_per_token
    elif not many.fits:
        assert many.memory_gib <= few.memory_gib


def test_a_degree_that_does_not_fit_everywhere_takes_no_choice_away():
    """With ep=32 four pipeline stages can't be: those with ep=8 are planned all the same, and are the fastest."""
    job, cluster = replace(JOB, imbalance=1.2, micro_batches=4), CLUSTERS["H100-100G"].with_nodes(8)
    (few, *_), _ = search(job, cluster, [8], Free(pp=True))
    (many, *_), _ = search(job, cluster, [8, 16, 32], Free(pp=True))
    assert (few.job.pp, few.job.ep) == (4, 8)
    assert (many.job, many.overlap, many.time) == (few.job, few.overlap, few.time)


@pytest.mark.thorough
@pytest.mark.parametrize("machine", ["H100", "H100-100G", "B200", "MI300X"])
@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "Mixtral-8x7B", "DeepSeek-V3"])
def test_more_chunks_gain_less_than_predictions_are_off(model, machine, monkeypatch):
    job, cluster = Job(MODELS[model], sequence=8192, micro_batch=4), CLUSTERS[machine]
    (few, *_), _ = search(job, cluster)
    more = [OverlapPlan(sizes(count)) for sizes in (equal_sizes, ramp_sizes) for count in NUM_CHUNKS]
    monkeypatch.setattr(plan_search, "OVERLAPS", (*OVERLAPS, *more))
    (many, *_), _ = search(job, cluster)
    assert many.s_per_token > (1 - ALIKE) * few.s_per_token


@pytest.mark.thorough
@pytest.mark.parametrize("two_batches", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_the_search_leaves_out_no_way_that_is_faster(two_batches):
    job = Job(TINY, micro_batch=2, micro_batches=4, two_batches=two_batches)
    cluster = SMALL_NODES[2]
    tried = ways(job, cluster, (), Free(pp=True))
    found, number = search(job, cluster, (), Free(pp=True), most=5)
    assert number == len(tried) > 5
    assert all(way.fits for way in tried)
    fastest = sorted(
        min(step_time(way.job, way.cluster, way.num_levels, one).step_s for one in OVERLAPS) for way in tried
    )
    # Of schedules that are about as fast, within 1 %, the one with the fewest chunks is taken.
    assert [one.time.step_s for one in found] == pytest.approx(fastest[:5], rel=0.01)
    assert [one.s_per_token for one in found] == sorted(one.s_per_token for one in found)


@pytest.mark.thorough
def test_all_that_is_free_is_searched():
    found = plan(Job(MODELS["Qwen3-30B-A3B"], micro_batches=8), H100, free=Free(True, True, True), num_draws=8)
    best = found.best
    assert best.fits
    assert {one.choice.tp for one in found.predictions} > {1}
    assert {one.choice.pp for one in found.predictions} > {1}
    # Nothing that was searched beats the best, all with as many tokens a step.
    assert {one.time.tokens for one in found.predictions} == {16 * 8 * 4096}
    assert best.time.step_s == min(one.time.step_s for one in found.predictions if one.fits)
    fixed = plan(
        Job(MODELS["Qwen3-30B-A3B"], micro_batches=best.choice.micro_batches, tp=best.choice.tp, pp=best.choice.pp,
            recompute=best.choice.recompute),
        H100, [best.choice.ep], num_draws=8,
    ).best  # fmt: skip
    assert fixed.time.step_s == pytest.approx(best.time.step_s)


@pytest.mark.thorough
def test_72_gpus_of_a_node():
    rack = CLUSTERS["GB200"]
    assert rack.gpus_per_node == 72
    found = plan(Job(MODELS["Qwen3-30B-A3B"]), rack, free=Free(False, True, True), num_draws=8)
    assert {one.gpus_used for one in found.predictions} == {64, 72}
    for one in found.predictions:
        assert one.gpus_used % one.choice.ep == 0
        # All 72 are paid for.
        usd = rack.usd_per_gpu_hour * 72 * one.time.step_s / 3600 / (one.time.tokens / 1e6)
        assert one.usd_per_million_tokens == pytest.approx(usd)


def test_model_flop_utilisation_counts_the_models_own_arithmetic():
    best = plan(FULL, H100, [8], num_draws=2).best
    model = FULL.model
    active = 48 * (model.attention_parameters + 2048 * 128 + 8 * 3 * 2048 * 768) + 2048 * 151936
    flops = 6 * active + 6 * 48 * (4096 / 2) * 32 * 256
    expected = flops * best.time.tokens / best.time.step_s / 16 / 989.4e12
    assert best.mfu == pytest.approx(expected, rel=1e-3)


def test_exchanges_are_hidden_or_exposed_and_serial_is_no_faster():
    best = plan(FULL, H100, [16], num_draws=40).best
    assert best.time.exposed_s < best.exchange_s
    assert best.serial_s >= best.time.step_s
    for value, (low, high) in (
        (best.exchange_s, best.exchange_interval_s),
        (best.time.exposed_s, best.exposed_interval_s),
        (best.serial_s, best.serial_interval_s),
    ):
        assert low < value < high
    megatron = plan(trained_by(FULL, "megatron"), H100, [16], num_draws=4).best
    assert megatron.serial_s == pytest.approx(megatron.time.step_s, rel=1e-12)  # Python 3.12 sums more exactly
    assert megatron.time.exposed_s == pytest.approx(megatron.exchange_s, rel=0.01)


def test_what_is_hidden_and_not_gained_is_explained():
    """8 ranks of a node hide most of their exchanges, and their experts then compute in parts, which takes longer."""
    found = plan(FULL, H100, [8], num_draws=4)
    best = found.best
    hidden_ms, gained_ms = (
        1e3 * of for of in (best.exchange_s - best.time.exposed_s, best.serial_s - best.time.step_s)
    )
    assert gained_ms < 0.7 * hidden_ms
    (note,) = (one for one in plan_as_json(found)["notes"] if one.startswith("Overlap hides "))
    assert note.startswith(
        f"Overlap hides {hidden_ms:.0f} ms of exchanges, but makes a step only {gained_ms:.0f} ms shorter: experts "
    )
    assert note in plan_table(found)
    assert "Overlap hides" not in plan_table(plan(trained_by(FULL, "megatron"), H100, [8], num_draws=4))


@pytest.fixture
def one_size(monkeypatch):
    monkeypatch.setattr(comparing, "SCALES", (1.0,))
    monkeypatch.setattr(comparing, "SIZES", (1.0,))


@pytest.mark.thorough
def test_a_faster_interconnect_is_worth_its_price_or_not():
    fast, slow = CLUSTERS["H100"].with_nodes(4), CLUSTERS["H100-100G"].with_nodes(4)
    found = compare(FULL, [fast, replace(slow, usd_per_gpu_hour=2.4)], [32])
    assert found.is_cheapest[0] > 0.6
    text = comparison_table(found)
    assert "H100 is the cheapest in " in text
    assert "cheapest from x0.5 on: H100" in text
    assert found.break_even_usd(0) == pytest.approx(fast.usd_per_gpu_hour)
    assert found.break_even_usd(1) < 2.4
    given_away = compare(FULL, [fast, replace(slow, usd_per_gpu_hour=0.01)], [32])
    assert given_away.is_cheapest == [0, 1]
    assert re.search(r"Buy H100-100G: .* 9\d% less than on H100, the next, which is more", comparison_table(given_away))


@pytest.mark.thorough
def test_one_configuration_has_one_price(monkeypatch):
    """The best choice's price is that of the tables by size and by GPUs, of what is free and of a plan by itself."""
    monkeypatch.setattr(comparing, "SCALES", (1.0,))
    monkeypatch.setattr(comparing, "SIZES", (0.5, 1.0))
    monkeypatch.setattr(planning, "NUM_DRAWS", 2)
    job = Job(replace(TINY, hidden_size=2048, expert_size=4096), micro_batches=4)
    free = Free(tp=True)
    clusters = [replace(one, gpu=replace(one.gpu, memory_gib=5.0)) for one in (SMALL_NODES[0], SMALL_NODES[2])]
    found = compare(job, clusters, free=free)
    of_half = compare(job, [one.with_nodes(1) for one in clusters], free=free)
    assert {plan.best.choice.tp for plan in of_half.plans} != {1}  # so that it matters what is free
    for number, (one, half) in enumerate(zip(found.plans, of_half.plans, strict=True)):
        usd = one.best.usd_per_million_tokens
        assert found.usd[number] == [usd]
        assert [of.usd_per_million_tokens for of in found.sized[number]] == [half.best.usd_per_million_tokens, usd]
        assert [of.step_s for of in found.sized[number]] == [half.best.time.step_s, one.best.time.step_s]
        alone = plan(job, clusters[number], free=free)
        assert alone.predictions == one.predictions  # draws and intervals too
        (walked, *_), _ = search(job, clusters[number], (), free)
        assert one.best.time.step_s == pytest.approx(walked.time.step_s * math.exp(MODEL_ERROR.bias))
    text, data = comparison_table(found), comparison_as_json(found)
    for row, one in zip(data["usd_per_million_tokens"], data["plans"], strict=True):
        assert row == [one["choices"][0]["usd_per_million_tokens"]]
        assert text.count(f"{row[0]:.4f}") >= 2
    assert json.dumps(comparison_page(found).data) == json.dumps(data)


@pytest.mark.thorough
def test_a_comparison_says_why_networks_differ_little_and_what_is_assumed(one_size):
    clusters = [CLUSTERS[name].with_nodes(2) for name in ("H100", "H100-100G", "H200")]
    found = compare(Job(MODELS["OLMoE-1B-7B"]), clusters, [8])
    text = comparison_table(found)
    assert "Exchanges of rows stay inside a node on H100, H100-100G and H200 (ep=8 with 8 GPUs a node)." in text
    assert "H100 and H100-100G cost the same, 2.5 $ a GPU-hour; H200 costs 3 $ a GPU-hour." in text
    for one in found.plans:
        best = one.best
        link = replace(
            one.cluster.between, gb_per_s=1e9, latency_us=Estimate(0, "assumed"), us_per_peer=Estimate(0, "assumed")
        )
        ideal = plan(found.plans[0].job, replace(one.cluster, between=link), [8], num_draws=2).best
        assert ideal.time.step_s == pytest.approx(best.time.step_s - best.between_nodes_s)
        assert f"{best.between_nodes_s / best.time.step_s:.0%} on {one.cluster.name}" in text
    crossing = comparison_table(compare(Job(MODELS["OLMoE-1B-7B"]), clusters[:2], [16]))
    assert "Exchanges of rows cross nodes on H100 and H100-100G (ep=16 with 8 GPUs a node)." in crossing
    assert "then carries only" not in crossing


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["H100", "H100-100G"])
def test_nothing_but_the_layout_is_kept_for_a_network_that_takes_no_time(one_size, name):
    """Where exchanges cross nodes, fewer chunks and one level are faster then."""
    cluster = CLUSTERS[name].with_nodes(2)
    best = plan(Job(MODELS["OLMoE-1B-7B"]), cluster, [16], num_draws=2).best
    nothing = Estimate(0, "assumed")
    link = replace(cluster.between, gb_per_s=1e9, latency_us=nothing, us_per_peer=nothing)
    ideal = plan(Job(MODELS["OLMoE-1B-7B"]), replace(cluster, between=link), [16], num_draws=2).best
    assert ideal.choice.gpus_per_node == best.choice.gpus_per_node
    assert ideal.time.step_s == pytest.approx(best.time.step_s - best.between_nodes_s)


@pytest.mark.thorough
def test_clusters_on_which_nothing_fits_are_left_out(one_size):
    job, node = Job(MODELS["OLMoE-1B-7B"]), CLUSTERS["H100"].with_nodes(1)
    dear = replace(node, name="dear", usd_per_gpu_hour=2.6)
    small = replace(node, name="small", gpu=replace(node.gpu, memory_gib=1.0))
    found = compare(job, [node, dear, small], [8])
    text = comparison_table(found)
    assert "H100 is the cheapest in " in text
    assert "The job doesn't fit on small: a GPU needs at least " in text
    assert "small costs as much" not in text
    assert found.is_cheapest == [*compare(job, [node, dear], [8]).is_cheapest, None]
    assert [found.break_even_usd(number) is None for number in range(3)] == [False, False, True]
    nothing = compare(job, [small, node], [8])
    assert nothing.is_cheapest == [None, None]
    assert "is the cheapest in" not in comparison_table(nothing)
    assert comparison_table(nothing).endswith("Buy H100, because the job fits on no other cluster.")
    assert nothing.to_json()["break_even_usd_per_gpu_hour"] == [None, None]


@pytest.mark.thorough
def test_what_decides_is_to_be_measured_before_anything_is_bought(one_size):
    node = CLUSTERS["H100"].with_nodes(1)
    slow_host = replace(node.host, us_per_layer=Estimate(4050.0, "assumed"))
    other = replace(node, name="other", usd_per_gpu_hour=2.55, host=slow_host)
    found = compare(Job(MODELS["OLMoE-1B-7B"]), [node, other], [8])
    text = comparison_table(found).splitlines()[-1]
    assert text.startswith("Buy H100: a million tokens cost ")
    assert " $, 2% less than on other, the next, which is within the uncertainty (H100 is the cheapest in " in text
    assert re.search(r"; measure host.us_per_layer of (H100|other) first, which explains \d+% of the diff", text)
    assert found.decides[0][2] > 0.2


@pytest.mark.thorough
def test_what_cannot_change_what_is_cheapest_is_not_to_be_measured(one_size):
    """The clusters differ in their network alone: nothing that is measured of either makes the slower one cheaper."""
    clusters = [CLUSTERS[name].with_nodes(2) for name in ("H100", "H100-TCP")]
    found = compare(Job(MODELS["OLMoE-1B-7B"]), clusters, [16])
    assert 0 < found.is_cheapest[1] < 0.5
    assert found.decides == []


@pytest.mark.thorough
def test_what_is_assumed_of_both_decides_nothing(one_size):
    """Machines of which the same is assumed differ by their prices, and by what runs differ by anyway."""
    node = CLUSTERS["H100"].with_nodes(1)
    found = compare(Job(MODELS["OLMoE-1B-7B"]), [node, replace(node, name="other", usd_per_gpu_hour=2.55)], [8])
    drawn = [one.draws[7].factors for one in found.plans]
    assert drawn[0] == drawn[1]
    text = comparison_table(found).splitlines()[-1]
    assert text.startswith("Buy H100: a million tokens cost ")
    assert text.endswith("; no single number decides, so run the job on both for some minutes first.")


@pytest.mark.thorough
def test_equal_gpus_and_equal_price(one_size):
    node, rack = CLUSTERS["H100"].with_nodes(9), CLUSTERS["GB200"]
    assert [one.num_gpus for one in equalized([node, rack], "gpus")] == [72, 72]
    assert [one.num_gpus for one in equalized([rack, node], "gpus")] == [72, 72]
    # 72 GPUs for 5 $ an hour are worth 144 for 2.50 $.
    assert [one.num_gpus for one in equalized([rack, node], "price")] == [72, 144]
    assert [one.num_gpus for one in equalized([node, rack], None)] == [72, 72]
    with pytest.raises(ValueError, match="less than half a node of 72 GPUs of GB200: take more nodes"):
        equalized([node.with_nodes(1), rack], "gpus")
    with pytest.raises(ValueError, match="one of them costs nothing"):
        equalized([node, replace(rack, usd_per_gpu_hour=0.0)], "price")
    found = compare(Job(MODELS["OLMoE-1B-7B"]), [rack, node.with_nodes(1)], [8], equal="price")
    assert [one.cluster.num_gpus for one in found.plans] == [72, 144]
    assert "OLMoE-1B-7B, trainer ours, at an equal price" in comparison_table(found)


@pytest.mark.thorough
def test_machines_of_ones_own_may_cost_nothing(one_size):
    own = replace(H100, name="own", usd_per_gpu_hour=0.0)
    found, reverse = (compare(Job(MODELS["OLMoE-1B-7B"]), both, [8]) for both in ([H100, own], [own, H100]))
    assert (found.is_cheapest, reverse.is_cheapest) == ([0, 1], [1, 0])
    assert "own costs as much as H100 at 2.50 $ a GPU-hour" in comparison_table(found)
    assert reverse.break_even_usd(1) == 0


def test_degrees_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="can't be shared by ep=32"):
        plan(JOB, H100, [8, 32], free=Free(pp=True))
    with pytest.raises(ValueError, match="can't be shared by ep=32"):
        plan(JOB, H100, [32])


def test_a_measured_step_narrows_other_sizes() -> None:
    """A run on two nodes takes three times as long as predicted: so does a step on eight, and the host is slow."""
    job = replace(JOB, micro_batches=4)
    cluster = CLUSTERS["H100"].with_nodes(8)
    before = plan(job, cluster, [8], num_draws=100)
    small = plan(job, cluster.with_nodes(2), [8], num_draws=100).best.time
    measured = Measured(replace(job, ep=8), cluster.with_nodes(2), small.tokens_per_s / 3)
    assert measured.step_s == pytest.approx(3 * small.step_s)
    told = plan(job, cluster, [8], num_draws=100, measured=measured)
    widths = [one.best.step_interval_s[1] / one.best.step_interval_s[0] for one in (before, told)]
    assert widths[1] < 0.7 * widths[0]
    assert told.best.time.step_s == pytest.approx(3 * before.best.time.step_s, rel=0.25)
    assert sum(told.best.time.parts.values()) == pytest.approx(told.best.time.step_s)
    assert statistics.median(one.factors["host.us_per_layer"] for one in told.draws) > 1.25
    assert "Narrowed by a run of 16 GPUs" in plan_table(told)
    with pytest.raises(ValueError, match="Is it the same job"):
        plan(job, cluster, [8], num_draws=10, measured=replace(measured, tokens_per_s=1e12))


def test_a_known_network_narrows_and_sockets_are_slower() -> None:
    job = replace(JOB, trainer="megatron", overlaps_exchange=False)
    cluster = CLUSTERS["H100"].with_nodes(4)
    unknown, rdma, sockets = (
        plan(job, of, [32], num_draws=100)
        for of in (cluster, with_network(cluster, "rdma"), with_network(cluster, "sockets"))
    )
    width, known = (one.best.step_interval_s[1] / one.best.step_interval_s[0] for one in (unknown, rdma))
    assert known < 0.9 * width
    assert sockets.best.time.step_s > 1.5 * rdma.best.time.step_s
    assert "--network says whether" in plan_table(unknown)
    assert "within 25%" in plan_table(rdma)
    with pytest.raises(ValueError, match="one of rdma, sockets"):
        with_network(cluster, "wifi")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("node1:7:7 [0] NCCL INFO Using network Socket\n", "sockets"),
        ("node1:7:7 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE\nnode1:7:7 [0] NCCL INFO Using network IB\n", "rdma"),
        ("NCCL INFO Using network AWS Libfabric", "rdma"),
        ("NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>", "sockets"),
        ("HOME=/root\nNCCL_IB_DISABLE=1\n", "sockets"), ("NCCL_NET=Socket", "sockets"), ("NCCL_DEBUG=INFO", None),
    ],
)  # fmt: skip
def test_the_network_is_known_by_a_log_or_variables(text: str, kind: str | None) -> None:
    assert network_in(text) == kind


def test_what_a_search_left_out_is_said() -> None:
    found = plan(JOB, CLUSTERS["H100"].with_nodes(2), free=Free(tp=True, pp=True, recompute=True), num_draws=5)
    said = "; ".join(found.left_out)
    assert "are slower than the best" in said
    assert "tp above 8 and pp above 32 are not tried" in said
    assert "ep of 32, 64, 128 can't share 16 GPUs" in said
    assert f"Left out: {said}."[:40] in plan_table(found)
