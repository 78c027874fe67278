"""What is probed: links, and the steps of a layer by their size; and that plans are found from it."""

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import tritonmoe as tm
import tritonmoe.tools.planner.probe_costs
from tritonmoe.overlap import report as layer_report
from tritonmoe.overlap.schedule import build_backward, build_forward
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import simulate_layer
from tritonmoe.overlap.tuning.search import search
from tritonmoe.tools.planner.probe_costs import probe, probe_link, probe_steps
from tritonmoe.transports import LocalTransport, PendingExchange, Transport

NUM_TOKENS = 256


def test_probe_of_an_emulated_link() -> None:
    """All ranks get the same numbers; no link is found to be much faster than it is."""
    found = tm.run_on_emulated_ranks(probe_link, 2, link=tm.LinkModel(0.1, latency_us=3000))
    assert found[0] == found[1]
    assert 0 < found[0].bytes_per_s < 2 * 0.1e9
    slower = tm.run_on_emulated_ranks(probe_link, 2, link=tm.LinkModel(0.04))
    assert 0 < slower[0].bytes_per_s < 2 * 0.04e9


def test_probe_of_one_rank() -> None:
    assert probe_link(LocalTransport()).bytes_per_s == float("inf")


@pytest.mark.thorough
def test_probe_on_ranks_of_a_group_of_three() -> None:
    def on_rank(transport: Transport) -> LinkCosts:
        return probe_link(transport)

    found = tm.run_on_emulated_ranks(on_rank, 3)
    assert all(costs == found[0] for costs in found)


def test_a_link_too_fast_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where noise is all that is measured, no line rises with the bytes."""
    monkeypatch.setattr(tritonmoe.tools.planner.probe_costs, "fit_line", lambda points: (0.0, 0.0))
    found = tm.run_on_emulated_ranks(probe_link, 2)
    assert found[0].bytes_per_s == float("inf")
    assert found[0].contention == 0.0


def test_jitter_beside_a_fast_link_is_no_contention(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 MiB take 0.17 ms at 200 GB/s: of products that ran 20 ms, one percent would be all of it."""
    products = [itertools.count() for _ in range(2)]

    def on_rank(transport: Transport) -> LinkCosts:
        of_thread.rank = transport.rank
        return probe_link(transport)

    def multiply(count: int, _: object) -> float:
        return 1e-5 * count * (1 + 0.01 * (next(products[of_thread.rank]) % 2))  # every second time takes longer

    of_thread = threading.local()
    monkeypatch.setattr(tritonmoe.tools.planner.probe_costs, "fit_line", lambda points: (0.0, 1 / 200e9))
    monkeypatch.setattr(tritonmoe.tools.planner.probe_costs, "_multiply", multiply)
    for link in tm.run_on_emulated_ranks(on_rank, 2):
        assert link.bytes_per_s == pytest.approx(200e9)
        assert link.contention < 0.02


@pytest.mark.parametrize("is_shared", [False, True])
def test_exchanges_on_a_device_are_waited_for_one_by_one(is_shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they take turns the first of two ends in the middle; waiting for the device would end both at once."""
    clock = [0.0]
    monkeypatch.setattr(tritonmoe.tools.planner.probe_costs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(tritonmoe.tools.planner.probe_costs, "_multiply", lambda count, _: 1e-5 * count)

    class Enqueued(PendingExchange):
        def __init__(self, transport: "Turns", end: float) -> None:
            self.transport, self.end = transport, end

        def wait(self) -> None:
            self.transport.current_stream = max(self.transport.current_stream, self.end)

    class Turns(LocalTransport):
        size = 2
        free_at = current_stream = 0.0

        def exchange(self, rows: Tensor, *_: object) -> PendingExchange:
            seconds = rows.numel() * 1e-9
            self.free_at = max(clock[0], self.free_at) + seconds
            return Enqueued(self, clock[0] + 2 * seconds if is_shared else self.free_at)

        def exchange_counts(self, counts: Tensor) -> Tensor:
            return counts

    transport = Turns()

    def wait_for_current_stream(_: object) -> None:
        clock[0] = max(clock[0], transport.current_stream)

    monkeypatch.setattr(tritonmoe.tools.planner.probe_costs, "wait_for_current_stream", wait_for_current_stream)
    assert probe_link(transport).is_shared == is_shared


def batch(rank: int, num_tokens: int = NUM_TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    weights, ids = torch.rand(num_tokens, 4, generator=generator).topk(2)
    return torch.randn(num_tokens, 8, generator=generator), ids, weights


def test_the_steps_of_a_layer() -> None:
    def on_rank(transport: Transport) -> tuple[LinkCosts, StepCosts]:
        experts = tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2), transport, tm.OverlapConfig(3), backend="torch")
        found = probe(experts, *batch(transport.rank))
        assert experts.overlap == tm.OverlapConfig(3)
        assert experts.transport is transport
        assert all(weight.grad is None for weight in experts.parameters())
        return found

    plan = tm.OverlapPlan((1,))
    schedules = build_forward(plan), build_backward(plan, needs_x=True, needs_topk_weights=True)
    kinds = {step.kind for schedule in schedules for step in schedule}
    (link, costs), (other_link, other_costs) = tm.run_on_emulated_ranks(on_rank, 2)
    assert link == other_link
    assert set(costs.unit_s) == set(other_costs.unit_s) == kinds
    assert all(costs.seconds(kind, float(NUM_TOKENS)) > 0 for kind in kinds)


def test_plans_are_found_from_the_curve_of_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of 3 ms for every chunk and 20 us for every pair: one more chunk must hide more than 3 ms."""
    clock = [0.0]  # stands still but for the activation
    monkeypatch.setattr(layer_report, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow_silu(h: Tensor) -> Tensor:
        clock[0] += 0.003 + 0.00002 * h.shape[0]
        gate, up = h.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    experts = tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2, activation=slow_silu), backend="torch")
    link, costs = probe(experts, *batch(0))
    assert link.bytes_per_s == float("inf")
    assert experts.transport is None
    for pairs in (3.0, 16.0, 100.0, 512.0, 2048.0):
        assert costs.seconds("experts", pairs) == pytest.approx(0.003 + 0.00002 * pairs)
    assert costs.of_one_more_chunk("experts", 512.0) == pytest.approx(0.003)
    work = LayerWork.of(torch.full((8, 8), 32.0), 2.0, row_bytes=1, top_k=0)  # 512 pairs on every rank
    config = tm.OverlapConfig(local_first=False)
    for exchange_s, one_chunk_pays in ((0.002, True), (0.02, False)):
        link = LinkCosts(0.0, 7 * 32 / exchange_s)
        (one,) = simulate_layer(tm.OverlapPlan(local_first=False), work, costs, link, backward=False)
        assert one.total_s == pytest.approx(0.003 + 512 * 0.00002 + 2 * exchange_s)
        best = search(config, work, costs, link, backward=False)[0][1]
        assert (best.num_chunks == 1) == one_chunk_pays


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
