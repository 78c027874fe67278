"""What ranks exchange before a call with copies: counts of experts travel beside others, and rows are ordered once."""

import pytest
import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.dispatch import send_plan
from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.expert_parallel.plans.copies import balance
from tritonmoe.expert_parallel.state import state_of
from tritonmoe.transports import PendingExchange, Transport

ALWAYS = tm.OverlapConfig(2, balance="always")


def hot_call(transport: Transport, num_experts: int, is_uneven: bool = True) -> tuple[tm.GroupedExperts, dict]:
    """Return a layer and its arguments; half of all pairs need expert 0, or all experts have as many."""
    config = tm.MoEConfig(hidden_size=8, intermediate_size=6, num_experts=num_experts, top_k=2)
    weights = torch.Generator().manual_seed(0)
    layer = tm.GroupedExperts(config, transport, ALWAYS, generator=weights)
    generator = torch.Generator().manual_seed(transport.rank)
    others = torch.randint(1, num_experts, (48,), generator=generator)
    even = torch.arange(96).view(48, 2) % num_experts
    ids = torch.stack([torch.zeros_like(others), others], 1) if is_uneven else even
    x = torch.randn(48, 8, generator=generator, requires_grad=True)
    return layer, {"x": x, "topk_ids": ids, "topk_weights": torch.rand(48, 2, generator=generator)}


def count_posts(transport: Transport) -> list[int]:
    """Return a list of one number: how many counts this rank has posted since."""
    found, post = [0], transport.post_counts

    def counted(counts: Tensor) -> PendingExchange:
        found[0] += 1
        return post(counts)

    transport.post_counts = counted
    return found


def run(layer: tm.GroupedExperts, call: dict, posts: list[int]) -> tuple[int, Tensor, object]:
    """Return how many counts a forward has posted, its result with the gradient of x, and its copies."""
    posts[0], call["x"].grad = 0, None
    out = layer(**call)
    num_posts = posts[0]
    out.square().sum().backward()
    return num_posts, torch.cat([out.detach(), call["x"].grad]), layer.last_report.copies.planned


@pytest.mark.parametrize(("num_experts", "has_room"), [(8, True), (6, True), (512, False)])
def test_experts_are_counted_beside_rows_where_the_last_call_was_uneven(num_experts: int, has_room: bool) -> None:
    def on_rank(transport: Transport) -> list[tuple[int, Tensor, object]]:
        layer, call = hot_call(transport, num_experts)
        posts = count_posts(transport)
        return [run(layer, call, posts) for _ in range(3)]

    for calls in tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60):
        assert [posts for posts, *_ in calls] == ([3, 2, 2] if has_room else [3, 3, 3])
        for _, values, copies in calls[1:]:
            assert copies is not None
            assert copies == calls[0][2]
            assert torch.equal(values, calls[0][1])


def test_even_calls_tell_nothing_more() -> None:
    def on_rank(transport: Transport) -> list[int]:
        layer, hot = hot_call(transport, 8)
        _, even = hot_call(transport, 8, is_uneven=False)
        posts = count_posts(transport)
        return [run(layer, call, posts)[0] for call in (even, even, hot, even, even, hot, hot)]

    for posts in tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60):
        assert posts == [1, 1, 3, 1, 1, 3, 2]


def test_a_rank_that_tells_nothing_beside_its_counts() -> None:
    """All ranks then make the exchange of its own, and the same copies."""

    def on_rank(transport: Transport) -> list[tuple[int, Tensor, object]]:
        layer, call = hot_call(transport, 6)
        posts = count_posts(transport)
        first = run(layer, call, posts)
        if transport.rank == 1:
            for costs in state_of(transport).learnt.values():
                costs.were_uneven = False
        return [first, run(layer, call, posts)]

    for first, second in tm.run_on_emulated_ranks(on_rank, 3, timeout_s=60):
        assert (first[0], second[0]) == (3, 3)
        assert first[2] is not None
        assert first[2] == second[2]
        assert torch.equal(first[1], second[1])


def test_rows_are_ordered_once(monkeypatch) -> None:
    """The plan without copies, which a call with copies doesn't run, needs no order of rows."""
    order_rows, ordered = send_plan.order_rows, []

    def noted(*arguments):
        ordered.append(arguments)
        return order_rows(*arguments)

    monkeypatch.setattr(send_plan, "order_rows", noted)

    def on_rank(transport: Transport) -> None:
        layer, call = hot_call(transport, 8)
        run(layer, call, [0])

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)
    assert len(ordered) == 2


def said_where_rank_1_fails(transport: Transport, layer: tm.GroupedExperts, call: dict) -> str:
    with pytest.raises(MemoryError if transport.rank == 1 else TransportError) as raised:
        layer(**call)
    return str(raised.value)


@pytest.mark.parametrize("overlap", [tm.OverlapConfig(2), ALWAYS], ids=["counts travel", "ranks are even"])
def test_a_rank_that_fails_to_order_its_rows_leaves_nobody_waiting(overlap: tm.OverlapConfig, monkeypatch) -> None:
    """Its counts are on their way then, and the others would wait for its rows."""
    order_rows = send_plan.order_rows

    def fails(row_keys: Tensor, *arguments):
        if row_keys.shape[0] == 2 * 8:
            raise MemoryError("no room for the order")
        return order_rows(row_keys, *arguments)

    monkeypatch.setattr(send_plan, "order_rows", fails)

    def on_rank(transport: Transport) -> str:
        config = tm.MoEConfig(hidden_size=8, intermediate_size=6, num_experts=8, top_k=2)
        layer = tm.GroupedExperts(config, transport, overlap)
        count = 8 if transport.rank == 1 else 4
        ids = torch.arange(2 * count).view(-1, 2) % 8
        call = {"x": torch.zeros(count, 8), "topk_ids": ids, "topk_weights": torch.zeros(count, 2)}
        return said_where_rank_1_fails(transport, layer, call)

    said = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert "rank 1 failed with MemoryError: no room for the order" in said[0]


def test_a_rank_that_fails_to_count_its_experts_leaves_nobody_waiting(monkeypatch) -> None:
    """The last call was uneven: it counts before the exchange of rows, in which the others wait for it."""
    count_slots = balance._count_slots

    def fails(call):
        if call.transport.rank == 1:
            raise MemoryError("no room for the counts")
        return count_slots(call)

    def on_rank(transport: Transport) -> str:
        layer, call = hot_call(transport, 8)
        run(layer, call, [0])
        if transport.rank == 1:
            monkeypatch.setattr(balance, "_count_slots", fails)
        transport.barrier()
        return said_where_rank_1_fails(transport, layer, call)

    said = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert "rank 1 failed with MemoryError: no room for the counts" in said[0]


def test_damaged_counts_of_experts_are_an_error_of_all_ranks(monkeypatch) -> None:
    count_slots = balance._count_slots

    def damaged(call):
        counts = count_slots(call)
        counts[1] += call.transport.rank
        return counts

    monkeypatch.setattr(balance, "_count_slots", damaged)

    def on_rank(transport: Transport) -> None:
        layer, call = hot_call(transport, 8)
        with pytest.raises(CountMismatch, match=r"experts' counts of .* don't add up to the ranks' pairs"):
            layer(**call)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
