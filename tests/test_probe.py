"""What is probed: links, and the steps of a layer by their size; and that plans are found from it."""

import time

import pytest
import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.overlap.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.schedule import build_backward, build_forward
from tritonmoe.overlap.simulator import simulate_layer
from tritonmoe.overlap.tuner import search
from tritonmoe.probe import probe, probe_link, probe_steps
from tritonmoe.transports import LocalTransport, Transport

NUM_TOKENS = 256
CHUNK_S, PAIR_S = 0.003, 0.00002
"""What the slow activation sleeps: for a chunk, and for each of its pairs."""


def test_probe_of_an_emulated_link() -> None:
    """All ranks get the same numbers; no link is found to be much faster than it is."""
    found = tm.run_on_emulated_ranks(probe_link, 2, link=tm.LinkModel(0.1, latency_us=3000))
    assert found[0] == found[1]
    assert 0 < found[0].bytes_per_s < 2 * 0.1e9
    slower = tm.run_on_emulated_ranks(probe_link, 2, link=tm.LinkModel(0.04))
    assert 0 < slower[0].bytes_per_s < 2 * 0.04e9


def test_probe_of_one_rank() -> None:
    assert probe_link(LocalTransport()).bytes_per_s == float("inf")


def test_probe_on_ranks_of_a_group_of_three() -> None:
    def on_rank(transport: Transport) -> LinkCosts:
        return probe_link(transport)

    found = tm.run_on_emulated_ranks(on_rank, 3)
    assert all(costs == found[0] for costs in found)


def slow_silu(h: Tensor) -> Tensor:
    time.sleep(CHUNK_S + PAIR_S * h.shape[0])
    gate, up = h.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def batch(rank: int, num_tokens: int = NUM_TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    weights, ids = torch.rand(num_tokens, 4, generator=generator).topk(2)
    return torch.randn(num_tokens, 8, generator=generator), ids, weights


CONFIG = tm.MoEConfig(8, 4, 4, 2, activation=slow_silu)


def test_the_steps_of_a_layer_by_their_size() -> None:
    def on_rank(transport: Transport) -> tuple[LinkCosts, StepCosts]:
        experts = tm.GroupedExperts(CONFIG, transport, tm.OverlapConfig(3), backend="torch")
        found = probe(experts, *batch(transport.rank))
        assert experts.overlap == tm.OverlapConfig(3)
        assert experts.transport is transport
        assert all(weight.grad is None for weight in experts.parameters())
        return found

    (link, costs), (other_link, _) = tm.run_on_emulated_ranks(on_rank, 2)
    assert link == other_link
    for pairs in (NUM_TOKENS / 16, NUM_TOKENS / 4, float(NUM_TOKENS)):
        assert costs.seconds("experts", pairs) >= 0.99 * (CHUNK_S + PAIR_S * pairs)
    # One more chunk is one more sleep, beside what it really costs: far less than a second one.
    assert costs.of_one_more_chunk("experts", float(NUM_TOKENS)) == pytest.approx(CHUNK_S, rel=0.8)
    plan = tm.OverlapPlan((1,))
    steps = {
        step.kind
        for schedule in (build_forward(plan), build_backward(plan, needs_x=True, needs_topk_weights=True))
        for step in schedule
    }
    assert steps == set(costs.unit_s)


def test_plans_are_found_from_what_is_probed() -> None:
    """Where rows take 1 ms each way, experts of 3 ms more for every chunk are not worth cutting; others are."""
    experts = tm.GroupedExperts(CONFIG, backend="torch")
    with torch.no_grad():
        link, costs = probe(experts, *batch(0))
    assert link.bytes_per_s == float("inf")
    assert experts.transport is None
    work = LayerWork.of(torch.full((8, 8), NUM_TOKENS / 8), 1.0, row_bytes=1, top_k=0)
    link = LinkCosts(0.0, 7 / 8 * NUM_TOKENS / 0.001)  # 1 ms there, and 1 ms back
    whole_s = costs.seconds("experts", float(NUM_TOKENS))
    (one,) = simulate_layer(tm.OverlapPlan((1,), local_first=False), work, costs, link, backward=False)
    others_s = sum(float((s.end_s - s.start_s).max()) for s in one.steps if s.step.kind in ("group", "reduce"))
    assert one.total_s == pytest.approx(whole_s + 0.002 + others_s, rel=0.05)
    config = tm.OverlapConfig(local_first=False)
    assert search(config, work, costs, link, backward=False)[0][1].num_chunks == 1
    proportional = StepCosts({}, {"experts": whole_s / NUM_TOKENS})
    assert search(config, work, proportional, link, backward=False)[0][1].num_chunks > 1


def test_few_tokens_and_none() -> None:
    def on_rank(transport: Transport) -> StepCosts:
        experts = tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2), transport, backend="torch")
        return probe_steps(experts, *batch(transport.rank, 3 * transport.rank))

    for costs in tm.run_on_emulated_ranks(on_rank, 2):
        assert costs.seconds("experts", 2.0) >= 0


def test_a_forward_alone() -> None:
    with torch.no_grad():
        costs = probe_steps(tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2)), *batch(0, 8))
    assert "experts" in costs.unit_s
    assert "experts_backward" not in costs.unit_s
