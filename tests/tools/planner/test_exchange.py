"""Two ranks, or two nodes of two, stand for any number of ranks that all do the same: the walks of both agree."""

from dataclasses import replace

import pytest
import torch

from tritonmoe.config.overlap import OverlapPlan, equal_sizes, ramp_sizes
from tritonmoe.overlap.simulation.cost_model import LayerWork
from tritonmoe.overlap.simulation.simulator import simulate_layer
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.layer_exchange import LayerExchange
from tritonmoe.tools.planner.model_config import MODELS
from tritonmoe.tools.planner.operation_costs import link_costs

PLANS = (
    OverlapPlan((1,), local_first=False, serial=True),
    OverlapPlan(equal_sizes(4)),
    OverlapPlan(ramp_sizes(6), local_start=4, window=2),
)
QWEN = MODELS["Qwen3-30B-A3B"]


def all_ranks(exchange: LayerExchange) -> LayerWork:
    """Return the work of all ranks, which under uniform routing need the same of each other."""
    job = exchange.job
    rows = torch.full((job.ep, job.ep), exchange.tokens * exchange.needs.of_rank, dtype=torch.float64)
    pairs = torch.full((job.ep, job.ep), exchange.num_pairs / job.ep, dtype=torch.float64)
    some = exchange.work.outer if isinstance(exchange.work, TwoLevelWork) else exchange.work
    return LayerWork(rows, pairs, some.row_bytes, job.model.top_k, some.other_row_bytes)


@pytest.mark.parametrize("ep", [2, 8, 32])
@pytest.mark.parametrize("overlap", PLANS, ids=str)
def test_two_ranks_stand_for_all_of_one_level(ep, overlap):
    exchange = LayerExchange(Job(QWEN, ep=ep), CLUSTERS["H100"], 1)
    passes = simulate_layer(overlap, all_ranks(exchange), exchange.costs, exchange.link, backward=True)
    time, agreeing = exchange.time(overlap), exchange.link.latency_s
    assert time.forward_s - agreeing == pytest.approx(passes[0].total_s, rel=1e-9)
    assert time.backward_s - agreeing == pytest.approx(passes[1].total_s, rel=1e-9)


@pytest.mark.parametrize(("nodes", "wire_dtype"), [(2, None), (4, None), (4, "fp8")])
@pytest.mark.parametrize("overlap", PLANS, ids=str)
def test_two_nodes_of_two_stand_for_all_of_two_levels(nodes, wire_dtype, overlap):
    cluster = replace(CLUSTERS["H100"], gpus_per_node=4)
    exchange = LayerExchange(Job(QWEN, ep=4 * nodes, wire_dtype=wire_dtype), cluster, 2)
    whole = all_ranks(exchange)
    to_nodes = torch.full((4 * nodes, nodes), exchange.tokens * exchange.needs.of_node)
    inside = link_costs(cluster, 4, 1e6, 0.0)
    work = TwoLevelWork.of(whole, to_nodes, inside, inside_row_bytes=2 * 2048)
    passes = simulate_layer(overlap, work, exchange.costs, exchange.link, backward=True)
    time, agreeing = exchange.time(overlap), exchange.link.latency_s
    assert time.forward_s - agreeing == pytest.approx(passes[0].total_s, rel=1e-6)
    assert time.backward_s - agreeing == pytest.approx(passes[1].total_s, rel=1e-6)


def test_narrow_rows_carry_their_scales():
    job = Job(MODELS["DeepSeek-V3"], ep=64, wire_dtype="fp8")
    cluster = replace(CLUSTERS["H100"], row_header_bytes=32)
    assert LayerExchange(job, cluster, 1).row_bytes == 7168 + 56 * 4 + 32
    wide = LayerExchange(replace(job, wire_dtype=None), cluster, 1)
    assert wide.row_bytes == 2 * 7168 + 32
    plan = PLANS[0]
    assert LayerExchange(job, cluster, 1).time(plan).forward_s < wide.time(plan).forward_s


def test_one_rank_sends_nothing():
    time = LayerExchange(Job(QWEN), CLUSTERS["H100"], 1).time(OverlapPlan((1,)))
    assert time.exposed_s == pytest.approx(0, abs=1e-9)


def test_pairs_that_travel_one_by_one_are_as_many_as_pairs():
    exchange = LayerExchange(Job(QWEN, ep=8, sends_pairs=True), CLUSTERS["H100"], 1)
    assert exchange.work.rows.sum(1).tolist() == [4096 * 8] * 2
