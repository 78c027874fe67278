"""num_chunks="auto": the closed form, and ranks that agree on it."""

import pytest
import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config import MAX_CHUNKS
from tritonmoe.overlap.tuner import (
    COMMUNICATION_BOUND_NUM_CHUNKS,
    DETERMINISTIC_NUM_CHUNKS,
    PLAN,
    ChunkChooser,
    closed_form_num_chunks,
)
from tritonmoe.transports import LocalTransport, Transport

AUTO = tm.OverlapConfig()


@pytest.mark.parametrize(
    ("experts_s", "communication_s", "eps_s", "expected"),
    [
        (0.010, 0.008, 0.000150, 7),  # sqrt(53.3)
        (0.010, 0.008, 0.000500, 4),
        (0.100, 0.100, 0.004, 5),
        (0.010, 0.020, 0.000150, COMMUNICATION_BOUND_NUM_CHUNKS),
        (0.010, 0.0002, 0.000150, 1),  # less to hide than a chunk costs
        (0.0002, 0.010, 0.000150, 1),  # nothing to hide it behind
        (0.010, 0.0, 0.000150, 1),
        (0.0, 0.0, 0.0, 1),
        (1.0, 0.9, -1.0, 13),  # a negative eps is noise: 0.5 % of the experts' time counts
        (1.0, 0.9, 0.000001, 13),
        (0.010, 0.010, 0.0, 14),  # and never less than 50 us
    ],
)
def test_closed_form(experts_s: float, communication_s: float, eps_s: float, expected: int) -> None:
    assert closed_form_num_chunks(experts_s, communication_s, eps_s) == expected


def test_closed_form_stays_within_the_limit() -> None:
    for experts_s in (1e-6, 1e-3, 1.0, 1e3):
        for ratio in (0.0, 1e-3, 0.5, 1.0, 2.0, 1e3):
            for eps_s in (-1.0, 0.0, 1e-9, 1e-3, 10.0):
                assert 1 <= closed_form_num_chunks(experts_s, experts_s * ratio, eps_s) <= MAX_CHUNKS


class Report:
    """A PassReport with chosen times."""

    def __init__(self, experts_s: float, communication_s: float) -> None:
        self.times = {"experts": experts_s, "dispatch": communication_s / 2, "combine": communication_s / 2}

    def lane_s(self, *kinds: str) -> float:
        return sum(self.times[kind] for kind in kinds)


def test_two_ranks_that_measured_differently_agree_on_the_larger_wish() -> None:
    choosers = [ChunkChooser(), ChunkChooser()]
    chosen = []
    for call in range(6):
        counts = [chooser.num_chunks(AUTO, 2) for chooser in choosers]
        assert len(set(counts)) == 1
        chosen.append(counts[0])
        votes = [chooser.vote() for chooser in choosers]
        for rank, chooser in enumerate(choosers):
            chooser.observe(votes, Report(0.010 + (call == 2) * 0.000150 * (4 - 3 * rank), 0.008))
    assert chosen == [*PLAN, PLAN[-1], 7, 7]
    assert [chooser.vote() for chooser in choosers] == [0, 0]


def test_a_given_number_is_used_as_it_is() -> None:
    assert ChunkChooser().num_chunks(tm.OverlapConfig(num_chunks=5), 4) == 5
    assert ChunkChooser().num_chunks(tm.OverlapConfig(num_chunks=5), 1) == 5


def test_one_rank_has_nothing_to_hide() -> None:
    assert ChunkChooser().num_chunks(AUTO, 1) == 1


def batch(rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * seed + rank)
    num_tokens = 20 + 3 * rank
    x = torch.randn(num_tokens, 8, generator=generator)
    return x, torch.randint(0, 4, (num_tokens, 2), generator=generator), torch.rand(num_tokens, 2, generator=generator)


def chunks_of_calls(num_calls: int, num_ranks: int = 2, link: tm.LinkModel | None = None) -> list[list[int]]:
    """Train a layer's experts and give the chunk numbers of every rank's calls."""
    config = tm.MoEConfig(8, 4, 4, 2)

    def on_rank(transport: Transport) -> list[int]:
        experts = tm.GroupedExperts(config, transport, generator=torch.Generator().manual_seed(0))
        counts = []
        for call in range(num_calls):
            experts(*batch(transport.rank, call)).sum().backward()
            counts.append(experts.last_report.num_chunks)
        return counts

    return tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=20, link=link)


@pytest.mark.parametrize(
    "link", [None, tm.LinkModel(0.001), tm.LinkModel(None, latency_us=3000)], ids=["memory", "slow", "late"]
)
@pytest.mark.parametrize("num_ranks", [2, 4], ids="W{}".format)
def test_ranks_agree_and_settle_within_six_calls(num_ranks: int, link: tm.LinkModel | None) -> None:
    chosen = chunks_of_calls(9, num_ranks, link)
    assert all(counts == chosen[0] for counts in chosen)
    assert chosen[0][: len(PLAN)] == list(PLAN)
    assert len(set(chosen[0][5:])) == 1
    assert 1 <= chosen[0][-1] <= MAX_CHUNKS


def test_deterministic_algorithms_fix_the_number() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert chunks_of_calls(4) == [[DETERMINISTIC_NUM_CHUNKS] * 4] * 2
    finally:
        torch.use_deterministic_algorithms(before)


def test_one_transport_settles_every_kind_of_call_by_itself() -> None:
    """Training and inference, and layers of other shapes, are measured apart; T does not matter."""

    def on_rank(transport: Transport) -> list[list[int]]:
        layers = [tm.GroupedExperts(tm.MoEConfig(8, inner, 4, 2), transport) for inner in (4, 6)]
        counts: list[list[int]] = [[], [], []]
        for call in range(7):
            for n, layer in enumerate(layers):
                layer(*batch(transport.rank, call)).sum().backward()
                counts[n].append(layer.last_report.num_chunks)
            with torch.no_grad():
                layers[0](*batch(transport.rank, call))
            counts[2].append(layers[0].last_report.num_chunks)
        return counts

    per_rank = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert per_rank[0] == per_rank[1]
    for counts in per_rank[0]:
        assert counts[: len(PLAN)] == list(PLAN)
        assert len(set(counts[5:])) == 1


def test_layers_of_one_shape_settle_together() -> None:
    """State belongs to the transport: the second layer of a stack measures nothing anew."""

    def on_rank(transport: Transport) -> list[int]:
        layers = [tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2), transport) for _ in range(4)]
        counts = []
        for layer in layers:
            layer(*batch(transport.rank))
            counts.append(layer.last_report.num_chunks)
        return counts

    first, second = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert first == second
    assert first[: len(PLAN)] == list(PLAN)


def test_auto_on_a_local_transport() -> None:
    transport = LocalTransport()
    experts = tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2), transport)
    for call in range(6):
        experts(*batch(0, call)).sum().backward()
        assert experts.last_report.num_chunks == 1


def test_ranks_that_need_gradients_at_different_times() -> None:
    """Whether a rank itself needs a gradient may change from call to call, rank by rank."""

    def on_rank(transport: Transport) -> list[int]:
        experts = tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2), transport).requires_grad_(False)
        counts = []
        for call in range(7):
            x, ids, weights = batch(transport.rank, call)
            x.requires_grad_(transport.rank == 0 or call % 2 == 0)
            experts(x, ids, weights).sum().backward()
            counts.append(experts.last_report.num_chunks)
        return counts

    first, second = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert first == second
