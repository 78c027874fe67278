"""Ids that are counted from 1 are pointed out once; pairs that are skipped on purpose never."""

import logging

import pytest
import torch

import tritonmoe as tm
from tritonmoe.experts import one_based_ids
from tritonmoe.transports import LocalTransport

E, D, FF, K = 4, 8, 6, 2


@pytest.fixture(autouse=True)
def _nothing_seen_before(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(one_based_ids, "_settled", set())
    monkeypatch.setattr(one_based_ids, "_watched", {})
    caplog.set_level(logging.WARNING)


def call(ids: torch.Tensor) -> torch.Tensor:
    num_tokens = len(ids)
    weights = torch.ones(E, 2 * FF, D), torch.ones(E, D, FF)
    return tm.moe_mlp(torch.ones(num_tokens, D), ids, torch.ones(ids.shape), *weights)


def drawn(low: int, high: int, num_tokens: int = 12) -> torch.Tensor:
    ids = torch.randint(low, high, (num_tokens, K), generator=torch.Generator().manual_seed(0))
    ids[0] = torch.tensor([low, high - 1])
    return ids


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "counted from 1" in record.message]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_it_is_said_once(dtype: torch.dtype, caplog) -> None:
    ids = drawn(1, E + 1).to(dtype)
    for _ in range(3):
        call(ids)
    (message,) = said(caplog)
    assert f"the {int((ids == E).sum())} pairs with id 4 were skipped" in message
    assert "E = 4 experts lie in [1, 4]" in message


def test_small_calls_are_counted_together(caplog) -> None:
    for _ in range(12):
        assert not said(caplog) or len(said(caplog)) == 1
        call(torch.tensor([[1, 4], [2, 3]]))
    assert len(said(caplog)) == 1


@pytest.mark.parametrize(
    "ids",
    [
        drawn(0, E),
        drawn(0, E + 1),  # E as a mark of skipped pairs
        drawn(-1, E),
        drawn(-1, E).masked_fill(drawn(-1, E) == 0, -1),  # of no token the first expert
        drawn(1, E),  # only that the first expert has no tokens
        drawn(E, 2 * E),  # all experts of other ranks
        drawn(-E, 2 * E),
        torch.full((12, K), E),
        torch.full((12, K), -1),
        drawn(1, E + 1)[:0],
    ],
)
def test_skipped_on_purpose(ids: torch.Tensor, caplog) -> None:
    for _ in range(one_based_ids.MAX_CALLS + 2):
        call(ids)
    assert not said(caplog)
    assert E in one_based_ids._settled  # from then on a call costs nothing


def test_layers_are_not_watched(caplog) -> None:
    """Their experts get marks of skipped pairs from routers and dispatch."""
    layer = tm.MoELayer(tm.MoEConfig(D, FF, E, K))
    layer(torch.randn(12, D))
    layer.experts(torch.randn(12, D), drawn(1, E + 1), torch.ones(12, K))
    assert not said(caplog)
    assert not one_based_ids._watched


def test_expert_parallel_calls_have_global_ids(caplog) -> None:
    weights = torch.ones(E, 2 * FF, D), torch.ones(E, D, FF)
    for ids in (drawn(1, E + 1), drawn(0, E)):
        rows = torch.ones(12, D), ids, torch.ones(12, K)
        tm.expert_parallel_mlp(*rows, *weights, num_experts=E, transport=LocalTransport())
    assert len(said(caplog)) == 1
