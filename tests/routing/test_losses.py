"""The auxiliary losses against hand-written numbers; test_router.py has their gradients and bad rows."""

import math

import pytest
import torch

from tritonmoe.routing import Routing, expert_load, load_balance_loss, z_loss


def make_routing(ids: list[list[int]], scores: torch.Tensor) -> Routing:
    topk_ids = torch.tensor(ids)
    return Routing(
        topk_ids=topk_ids,
        topk_weights=torch.ones(topk_ids.shape),
        logits=scores.log(),
        scores=scores,
        num_nonfinite_rows=torch.zeros((), dtype=torch.int64),
        load=expert_load(topk_ids, scores.shape[1]),
    )


def test_load_balance_loss_by_hand():
    uniform = torch.full((2, 4), 0.25)
    assert load_balance_loss(make_routing([[0, 1], [2, 3]], uniform), 4).item() == 1.0
    one_for_all = torch.tensor([[1.0, 0, 0, 0]] * 2)
    assert load_balance_loss(make_routing([[0], [0]], one_for_all), 4).item() == 4.0
    # f = [2/3, 1/3, 0]: one pair is skipped; P = mean of [.5, .5, 0] and [.25, .25, .5] (sigmoid-like, sums to 2)
    scores = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 1.0]])
    loss = load_balance_loss(make_routing([[0, 1], [0, -1]], scores), 3)
    assert loss.item() == pytest.approx(3 * (2 / 3 * 0.375 + 1 / 3 * 0.375))


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), math.log(5.0)], [math.nan, 0.0]])
    assert z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(8) ** 2) / 2)


def test_the_loss_is_of_the_routers_experts():
    routing = make_routing([[0, 1]], torch.full((1, 6), 1 / 6))
    with pytest.raises(ValueError, match="num_experts is 5, and the routing has scores of 6 experts"):
        load_balance_loss(routing, 5)


def sum_of(parts: list[torch.Tensor]):
    """Return a reduce_load for one of several ranks, whose counts are all in `parts`."""
    return lambda counts: torch.stack(parts).sum(0) if any(torch.equal(counts, p) for p in parts) else None


def test_load_balance_loss_over_two_ranks_by_hand():
    """Two tokens on rank 0, one on rank 1; a pair is skipped: L = (3, 1, 1), N = 3, W = 2."""
    first = make_routing([[0, 1], [0, -1]], torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2]]))
    second = make_routing([[0, 2]], torch.tensor([[0.1, 0.1, 0.8]]))
    counts = [torch.tensor([2, 1, 0, 2, 1]), torch.tensor([1, 0, 1, 1, 1])]
    losses = [load_balance_loss(routing, 3, reduce_load=sum_of(counts)).item() for routing in (first, second)]
    assert losses[0] == pytest.approx(3 * (3 / 5 * 1.1 + 1 / 5 * 0.5 + 1 / 5 * 0.4) * 2 / 3)
    assert losses[1] == pytest.approx(3 * (3 / 5 * 0.1 + 1 / 5 * 0.1 + 1 / 5 * 0.8) * 2 / 3)
    whole = make_routing([[0, 1], [0, -1], [0, 2]], torch.cat([first.scores, second.scores]))
    assert sum(losses) / 2 == pytest.approx(load_balance_loss(whole, 3).item())


def test_load_balance_loss_over_ranks_that_all_have_no_tokens():
    routing = make_routing([], torch.empty(0, 3))
    assert load_balance_loss(routing, 3, reduce_load=lambda counts: 2 * counts).item() == 0


def test_one_rank_over_all_ranks_is_itself():
    routing = make_routing([[0, 1], [0, -1]], torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2]]))
    assert torch.equal(load_balance_loss(routing, 3, reduce_load=lambda c: c), load_balance_loss(routing, 3))


def test_reduce_load_must_give_the_counts():
    with pytest.raises(TypeError, match=r"reduce_load must return the summed load \(5,\), got NoneType: all_reduce"):
        load_balance_loss(make_routing([[0]], torch.ones(1, 3)), 3, reduce_load=lambda counts: None)
