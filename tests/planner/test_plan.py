"""Plans: the fastest that fits comes first, with how sure that is."""

import json
import time
from dataclasses import replace

import pytest

from tritonmoe.planner import plan as planning
from tritonmoe.planner.cluster import Estimate
from tritonmoe.planner.cluster_presets import CLUSTERS
from tritonmoe.planner.job import Job
from tritonmoe.planner.model_presets import MODELS
from tritonmoe.planner.plan import compare, plan
from tritonmoe.planner.plan_table import comparison_table, plan_table

JOB = Job(MODELS["Qwen3-30B-A3B"], micro_batches=8)
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


def test_the_same_arguments_give_the_same_plan():
    first, second = (plan(JOB, H100, [8]) for _ in range(2))
    assert first == second


def test_what_is_measured_makes_the_interval_narrower():
    def width(cluster) -> float:
        low, high = plan(JOB, cluster, [8]).best.step_interval_s
        return high - low

    gpu = replace(
        H100.gpu,
        **{
            name: replace(getattr(H100.gpu, name), source="measured")
            for name in ("gemm_efficiency", "grouped_efficiency", "attention_efficiency", "memory_efficiency")
        },
    )
    assert width(replace(H100, gpu=gpu)) < 0.7 * width(H100)


def test_what_moves_the_time_most_is_to_be_measured_next():
    host = replace(H100.host, us_per_layer=Estimate(1e6, "assumed"))
    found = plan(JOB, replace(H100, host=host), [8])
    assert found.sensitivities[0].key == "host.us_per_layer"
    assert found.sensitivities[0].swing == pytest.approx(1.25**2 - 1, rel=0.02)


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
    assert "Nothing fits into 80 GB: at least " in plan_table(found)


@pytest.mark.thorough
def test_a_faster_interconnect_is_worth_its_price_or_not():
    fast, slow = CLUSTERS["H100"].with_nodes(4), CLUSTERS["H100-100G"].with_nodes(4)
    found = compare(JOB, [fast, replace(slow, usd_per_gpu_hour=2.4)], [32])
    assert found.is_cheaper > 0.9
    text = comparison_table(found)
    assert "H100 is cheaper than H100-100G in" in text
    assert "cheapest from x0.5 on: H100" in text
    assert found.break_even_usd(0) == pytest.approx(fast.usd_per_gpu_hour)
    assert found.break_even_usd(1) < 2.4
    given_away = compare(JOB, [fast, replace(slow, usd_per_gpu_hour=0.01)], [32])
    assert given_away.is_cheaper == 0


@pytest.fixture
def one_size(monkeypatch):
    monkeypatch.setattr(planning, "SCALES", (1.0,))
    monkeypatch.setattr(planning, "SIZES", (1.0,))


def test_clusters_on_which_nothing_fits_are_left_out(one_size):
    job, node = Job(MODELS["OLMoE-1B-7B"]), CLUSTERS["H100"].with_nodes(1)
    dear = replace(node, name="dear", usd_per_gpu_hour=2.6)
    small = replace(node, name="small", gpu=replace(node.gpu, memory_gb=1.0))
    found = compare(job, [node, dear, small], [8])
    text = comparison_table(found)
    assert "H100 is cheaper than dear in " in text
    assert "Nothing fits on small, at least " in text
    assert "small costs as much" not in text
    assert found.is_cheaper == compare(job, [node, dear], [8]).is_cheaper
    assert [found.break_even_usd(number) is None for number in range(3)] == [False, False, True]
    assert found.usd[0] == [found.plans[0].best.usd_per_million_tokens]
    nothing = compare(job, [small, node], [8])
    assert nothing.is_cheaper is None
    assert "is cheaper than" not in comparison_table(nothing)
    assert nothing.to_json()["break_even_usd_per_gpu_hour"] == [None, None]


def test_machines_of_ones_own_may_cost_nothing(one_size):
    own = replace(H100, name="own", usd_per_gpu_hour=0.0)
    found, reverse = (compare(Job(MODELS["OLMoE-1B-7B"]), both, [8]) for both in ([H100, own], [own, H100]))
    assert (found.is_cheaper, reverse.is_cheaper) == (0, 1)
    assert "own costs as much as H100 at 2.50 $ a GPU-hour" in comparison_table(found)
    assert reverse.break_even_usd(1) == 0


def test_degrees_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="can't be shared by ep=32"):
        plan(JOB, H100, [32])
