"""Two halves of a batch in the simulator: against times worked out by hand, bounds, and the search for their plans."""

from dataclasses import replace

import pytest
import torch

import tritonmoe as tm
from tritonmoe.overlap.schedule import build_forward
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import simulate, simulate_layer, simulate_two_batches
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.overlap.tuning.search import search

LINK = LinkCosts(latency_s=0.0, bytes_per_s=1.0)
COSTS = StepCosts({}, {"experts": 1.0, "experts_backward": 1.0, "weight_grad": 1.0})
ONE = tm.OverlapPlan((1,), local_first=False)


def half(rows: float, pairs_per_row: float = 1.0) -> LayerWork:
    """Two ranks that send each other `rows` rows of one byte, and keep none."""
    return LayerWork.of(torch.tensor([[0.0, rows], [rows, 0.0]]), pairs_per_row, row_bytes=1, top_k=0)


@pytest.mark.parametrize(
    ("rows", "pairs_per_row", "beside_s", "num_layers", "expected"),
    [
        # Dispatches until 1 and 2, experts until 2 and 3, combines until 3 and 4.
        (1, 1, 0, 1, 4),
        # Experts of 4 s: dispatches until 1 and 2, experts until 5 and 9, the last combine until 10.
        (1, 4, 0, 1, 10),
        # A's rest until 2, B's until 4 under A's dispatch; A's experts until 6, B's until 8, combines until 8 and 10.
        (2, 1, 2, 1, 10),
        # As above up to 8, when A's combine is there: A's rest until 10, when B's combine is through too, its dispatch
        # until 12; B's rest until 12, its dispatch until 14; experts until 14 and 16, combines until 16 and 18.
        (2, 1, 2, 2, 18),
        # Nothing to compute: the link is busy from the first to the last row.
        (1, 0, 0, 3, 12),
        # Nothing to send.
        (0, 1, 5, 3, 2 * 5 * 3),
    ],
)
def test_forward_by_hand(rows, pairs_per_row, beside_s, num_layers, expected) -> None:
    (forward,) = simulate_two_batches(ONE, half(rows, pairs_per_row), COSTS, LINK, [beside_s], num_layers)
    assert forward.total_s == pytest.approx(expected)


def test_backward_by_hand() -> None:
    """Its first rows go at once, and the rest of the model comes last, as in the forward turned around.

    Rows of the one half until 2, of the other until 4. Gradients of data until 4, whose rows are home at 6, of weights
    until 6; of the other half until 8, 10 and 10. Then the rest of the model until 12 and 14.
    """
    passes = simulate_two_batches(ONE, half(2), COSTS, LINK, (2, 2), 1)
    assert [simulation.total_s for simulation in passes] == [10, 14]


def test_one_rank_sends_nothing_and_two_halves_are_two_calls() -> None:
    alone = LayerWork.of(torch.tensor([[12.0]]), 2.0, row_bytes=1, top_k=0)
    plan = tm.OverlapPlan((1,), local_start=16)
    forward, backward = simulate_two_batches(plan, alone, COSTS, LINK, (1.0, 3.0), 3)
    one_forward, one_backward = simulate_layer(plan, alone, COSTS, LINK, backward=True)
    assert forward.total_s == 2 * 3 * (one_forward.total_s + 1)
    assert backward.total_s == 2 * 3 * (one_backward.total_s + 3)


@pytest.mark.parametrize("latency_s", [0.0, 0.5])
@pytest.mark.parametrize("rows", [0.5, 2.0, 8.0])
def test_between_the_longer_lane_and_one_half_after_the_other(rows: float, latency_s: float) -> None:
    link, layers, beside_s = replace(LINK, latency_s=latency_s), 5, 3.0
    layer = half(rows, 2.0)
    (forward,) = simulate_two_batches(ONE, layer, COSTS, link, [beside_s], layers)
    one = simulate(build_forward(ONE), ONE, layer, COSTS, link).total_s
    computing, sending = 2 * layers * (2 * rows + beside_s), 2 * layers * 2 * rows
    assert max(computing, sending) <= forward.total_s <= 2 * layers * (one + latency_s + beside_s)
    assert forward.total_s < 0.9 * 2 * layers * (one + latency_s + beside_s)


def test_two_levels() -> None:
    """Four ranks in two nodes: what is done inside a node is compute for the halves, and hides the rows between."""
    rows = torch.full((4, 4), 2.0)
    work = LayerWork.of(rows, 1.0, row_bytes=1, top_k=0)
    levels = TwoLevelWork.of(work, torch.full((4, 2), 3.0), LinkCosts(0.0, 10.0))
    (forward,) = simulate_two_batches(ONE, levels, COSTS, LINK, [4.0], 4)
    one = simulate(build_forward(ONE), ONE, levels, COSTS, LINK).total_s
    assert forward.total_s < 0.9 * 2 * 4 * (one + 4.0)


@pytest.mark.thorough
def test_search_of_halves() -> None:
    """Where the rest of the model covers all rows, halves win with one chunk; where nothing needs cover, whole ones."""
    costs = StepCosts({"experts": 1.0, "experts_backward": 1.0}, COSTS.unit_s)
    config, slow, fast = tm.OverlapConfig(local_first=False), LinkCosts(0.0, 0.5), LinkCosts(0.0, 1e6)
    whole = search(config, half(24), costs, slow, backward=True)[0][0]
    seconds, plan = search(config, half(12), costs, slow, backward=True, beside_s=(30.0, 60.0))[0]
    assert plan.num_chunks == 1
    assert 2 * (30 + 60 + 3 * 12 + 2) < seconds < 0.8 * (whole + 2 * (30 + 60))
    whole = search(config, half(24), costs, fast, backward=True)[0][0]
    assert search(config, half(12), costs, fast, backward=True, beside_s=(0.0, 0.0))[0][0] > whole
