"""Copies of experts in the simulator: what travels for them occupies ports, and their pairs are computed apart."""

import torch

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.simulation.cost_model import CopyWork, LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import simulate_layer

PLAN = OverlapPlan(local_first=False)
LINK = LinkCosts(0.0, 1.0)
ROWS = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
COPIES = CopyWork(
    torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64),
    torch.tensor([0.0, 1.0], dtype=torch.float64),
    expert_bytes=4,
    gradient_bytes=(4, 2),
)
COSTS = StepCosts({}, {"experts": 3.0, "weight_grad": 3.0}).with_copies()


def work(copies: CopyWork | None) -> LayerWork:
    return LayerWork(ROWS, ROWS, 1, 0, copies=copies)


def test_weights_travel_behind_the_first_rows_and_gradients_come_home() -> None:
    """Rows of 1 s, an expert of 4 s; forward: dispatch 1, copies 5, experts 8, combine 9.

    Backward: rows until 1; the copy's gradient in two parts, 4 s and 2 s on their way, computed in 2 s and 1 s: the
    first until 3, the second until 4, on their way home until 7 and 9.
    """
    forward, backward = simulate_layer(PLAN, work(COPIES), COSTS, LINK, backward=True)
    assert forward.total_s == 9
    assert backward.end_s.tolist() == [9, 9]
    without = simulate_layer(PLAN, work(None), COSTS, LINK, backward=True)
    assert [of.total_s for of in without] == [5, 4]


def test_weights_that_are_not_kept_travel_twice() -> None:
    again = CopyWork(COPIES.copied, COPIES.pairs, 4, (0, 0), are_sent_again=True)
    _, backward = simulate_layer(PLAN, work(again), COSTS, LINK, backward=True)
    kinds = [step.step.kind for step in backward.steps]
    assert "copies" in kinds
    assert "copies_backward" not in kinds
    assert backward.total_s == 6  # rows until 1, the expert until 5, rows home until 6


def test_a_rank_without_copies_waits_for_none() -> None:
    rows = torch.ones(3, 3, dtype=torch.float64).fill_diagonal_(0)
    copied = torch.zeros(3, 3, dtype=torch.float64)
    copied[0, 1] = 1
    pairs = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    copies = CopyWork(copied, pairs, expert_bytes=6, gradient_bytes=(0, 0))
    costs = StepCosts({}, {"copy_experts": 3.0})
    (forward,) = simulate_layer(PLAN, LayerWork(rows, rows, 1, 0, copies=copies), costs, LINK, backward=False)
    experts = next(step for step in forward.steps if step.step.kind == "copy_experts")
    assert experts.start_s.tolist() == [2, 8, 2]  # two rows each way, then the expert of 6 s, which rank 0 only sends
