"""Copies of one call: which pairs go there, and which copies the planner finds."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.copies import ExpertCopies, ExpertCopy
from tritonmoe.expert_parallel.plans.copies.copy_planner import CopyCosts, is_uneven, plan_copies

COPIES = ExpertCopies(2, 2, (ExpertCopy(0, 1, (0, 3)),))
FAST = CopyCosts(1000, 2000, 1, 0, 8, 8, 8, 100, 100)
"""Compute takes most: a pair 3000 fs, a row's byte 1."""


def test_the_example_of_the_docstring() -> None:
    assert (COPIES.num_copies, COPIES.num_slots) == (1, 6)
    ids = torch.tensor([[0, 1], [0, 0], [2, 0], [-1, 3], [0, 4]])
    here = COPIES.slots(ids, 1, OverlapPlan())
    assert here.tolist() == [[5, 1], [5, 5], [3, 0], [-1, 4], [0, -1]]
    there = COPIES.slots(ids, 0, OverlapPlan())
    assert there.tolist() == [[0, 1], [0, 0], [3, 0], [-1, 4], [0, -1]]
    assert COPIES.sent(0) == [[], [0]]
    assert COPIES.received(1) == [1, 0]
    assert COPIES.sent_copies == [[0, 1], [0, 0]]
    assert COPIES.copy_pairs == [0, 3]


def test_own_copies_come_first_then_others_by_rank() -> None:
    copies = ExpertCopies(3, 1, (ExpertCopy(0, 1, (1, 1, 1)), ExpertCopy(0, 2, (1, 1, 2))))
    ids = torch.zeros(5, 1, dtype=torch.int64)
    slots = {1: 3, 2: 5}
    for rank, order in ((0, [1, 2, 0, 0, 0]), (1, [1, 2, 0, 0, 0]), (2, [2, 2, 1, 0, 0])):
        assert copies.slots(ids, rank, OverlapPlan()).flatten().tolist() == [slots.get(of, 0) for of in order]


def test_every_chunk_gives_away_the_same_share() -> None:
    copies = ExpertCopies(2, 1, (ExpertCopy(0, 1, (6, 0)),))
    ids = torch.zeros(12, 1, dtype=torch.int64)
    for sizes, shares in (((1, 1), (3, 3)), ((1, 1, 1), (2, 2, 2)), ((1, 3), (2, 4))):
        plan = OverlapPlan(sizes)
        moved = (copies.slots(ids, 0, plan) == 3).flatten()
        bounds = plan.bounds(12)
        found = [int(moved[first:last].sum()) for first, last in pairwise(bounds)]
        assert sum(found) == 6
        assert all(abs(a - b) <= 1 for a, b in zip(found, shares, strict=True)), (sizes, found)


@st.composite
def loads(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts (W, slots), and the rows (W, W) of tokens that need two different experts each."""
    size, own = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    skew = torch.rand(size * own, generator=generator) ** draw(st.integers(1, 6))
    counts = (skew * torch.rand(size, size * own, generator=generator) * 200).long()
    return counts, (counts.view(size, size, own).sum(2) * 9) // 10


@settings(max_examples=60, deadline=None)
@given(load=loads(), max_copies=st.integers(1, 3), is_priced=st.booleans())
def test_plans_fit_the_counts(load: tuple, max_copies: int, is_priced: bool) -> None:
    counts, rows = load
    size, num_slots = counts.shape
    found = plan_copies(counts, rows, 2, max_copies, FAST if is_priced else None)
    again = plan_copies(counts.clone(), rows.clone(), 2, max_copies, FAST if is_priced else None)
    assert found == again
    before = counts.view(size, size, -1).sum((0, 2))
    if found.copies is None:
        return
    after, taken = before.clone(), torch.zeros_like(counts)
    for expert, rank, pairs in found.copies.copies:
        owner = expert // (num_slots // size)
        assert owner != rank
        taken[:, expert] += torch.tensor(pairs)
        after[owner] -= sum(pairs)
        after[rank] += sum(pairs)
    assert (taken <= counts).all()
    assert max(len(found.copies.on(rank)) for rank in range(size)) <= max_copies
    assert after.max() < before.max()
    if is_priced:
        assert found.with_fs <= 0.97 * found.without_fs


def test_copies_go_where_the_tokens_are_on_a_slow_link() -> None:
    """Rows of own tokens' pairs then don't travel at all."""
    counts = torch.tensor([[40, 40, 0, 0], [400, 400, 20, 20]])
    rows = torch.tensor([[40, 0], [500, 40]])
    costs = CopyCosts(1000, 2000, 3, 0, 1000, 1000, 1000, 1000, 1000)
    found = plan_copies(counts, rows, 2, 2, costs)
    assert found.copies is not None
    assert all(pairs[0] == 0 and pairs[1] > 0 for _, rank, pairs in found.copies.copies if rank == 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_bytes": 10**9},
        {"gradient_bytes": 10**9},
        {"call_fs": 10**9},
        {"forward_rank_fs": 10**8},
        {"with_permille": 3000},
    ],
    ids=str,
)
def test_copies_that_cost_too_much_are_declined(changes: dict[str, int]) -> None:
    counts = torch.tensor([[300, 300, 10, 10], [300, 300, 10, 10]])
    rows = torch.tensor([[300, 20], [300, 20]])
    assert plan_copies(counts, rows, 2, 2, FAST).copies is not None
    declined = plan_copies(counts, rows, 2, 2, FAST._replace(**changes))
    assert declined.copies is None
    assert declined.call_fs == declined.without_fs > 0


def test_even_ranks_are_left_alone() -> None:
    assert not is_uneven([100, 102, 98])
    assert not is_uneven([0, 0])
    assert is_uneven([100, 110, 90])
    counts = torch.full((2, 4), 100)
    assert plan_copies(counts, torch.full((2, 2), 150), 2, 2, None).copies is None
