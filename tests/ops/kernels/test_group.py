"""Grouping by Triton kernels: the same integers as the reference, in few launches."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, assert_same_grouping, chunked_rows, random_ids
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from uninitialised import nan_filled_memory

from tritonmoe.config.layer import ExpertLayout, PerWeight
from tritonmoe.ops import aot
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.backends.ops import GradientOperands
from tritonmoe.ops.grouping import RowSources
from tritonmoe.ops.kernels import launch

FEW = 8
"""Examples in the first tier, each of which takes the interpreter half a second."""


def test_group_worked_example():
    ids = torch.tensor([[1, 0], [1, 2], [-1, 0], [1, 1]], device=DEVICE)
    grouping = kernels.group(ids, 3)
    assert grouping.pair_index.tolist() == [1, 5, 0, 2, 6, 7, 3, -1]
    assert grouping.expert_offsets.tolist() == [0, 2, 6, 7]
    assert grouping.inverse.tolist() == [[2, 0], [3, 6], [-1, 1], [4, 5]]
    assert grouping.chunk_pair_offsets == (0, 8)
    assert grouping.source_order is None


GROUPED = {
    "num_rows": st.integers(0, 150),
    "top_k": st.integers(1, 16),
    "num_experts": st.integers(1, 200),
    "skip": st.sampled_from([0.0, 0.3, 1.0]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=FEW, deadline=None)
@given(**GROUPED)
def test_group_matches_reference_in_some_cases(**case):
    check_group(**case)


@pytest.mark.thorough
@settings(max_examples=30, deadline=None)
@given(**GROUPED)
def test_group_matches_reference(**case):
    check_group(**case)


def check_group(num_rows, top_k, num_experts, skip, seed):
    ids = random_ids(num_rows, top_k, num_experts, skip=skip, seed=seed).to(DEVICE)
    with nan_filled_memory():
        actual = kernels.group(ids, num_experts)
    assert_same_grouping(actual, reference.group(ids, num_experts))


CHUNKED = {
    "num_rows": st.integers(0, 100),
    "top_k": st.integers(1, 5),
    "num_experts": st.integers(1, 60),
    "num_chunks": st.integers(2, 7),
    "num_sources": st.integers(1, 6),
    "seed": st.integers(0, 99),
}


@settings(max_examples=FEW, deadline=None)
@given(**CHUNKED)
def test_group_in_chunks_matches_reference_in_some_cases(**case):
    check_group_in_chunks(**case)


@pytest.mark.thorough
@settings(max_examples=20, deadline=None)
@given(**CHUNKED)
def test_group_in_chunks_matches_reference(**case):
    check_group_in_chunks(**case)


def check_group_in_chunks(num_rows, top_k, num_experts, num_chunks, num_sources, seed):
    ids = random_ids(num_rows, top_k, num_experts, seed=seed).to(DEVICE)
    row_offsets, sources = chunked_rows(num_rows, num_chunks, num_sources, seed)
    expected = reference.group(ids, num_experts, chunk_row_offsets=row_offsets, row_sources=sources)
    with nan_filled_memory():
        actual = kernels.group(
            ids,
            num_experts,
            chunk_row_offsets=row_offsets,
            chunk_pair_offsets=expected.chunk_pair_offsets,
            row_sources=sources,
        )
    assert_same_grouping(actual, expected)


ROOMY = {
    "num_rows": st.integers(0, 60),
    "top_k": st.integers(1, 5),
    "num_experts": st.integers(1, 9),
    "num_chunks": st.integers(2, 7),
    "room": st.integers(0, 4),
    "seed": st.integers(0, 99),
}


@settings(max_examples=3, deadline=None)
@given(**ROOMY)
def test_chunks_with_room_for_more_pairs_in_some_cases(**case):
    check_room_for_more_pairs(**case)


@pytest.mark.thorough
@settings(max_examples=8, deadline=None)
@given(**ROOMY)
def test_chunks_with_room_for_more_pairs(**case):
    check_room_for_more_pairs(**case)


def check_room_for_more_pairs(num_rows, top_k, num_experts, num_chunks, room, seed):
    """Gaps between chunks change no integer of the pairs that are there, and no bit of the weights' gradients."""
    ids = random_ids(num_rows, top_k, num_experts, seed=seed).to(DEVICE)
    row_offsets, sources = chunked_rows(num_rows, num_chunks, 3, seed)
    expected = reference.group(ids, num_experts, chunk_row_offsets=row_offsets, row_sources=sources)
    counts = [last - first for first, last in itertools.pairwise(expected.chunk_pair_offsets)]
    most = [top_k * (last - first) for first, last in itertools.pairwise(row_offsets)]
    roomy = (0, *itertools.accumulate(min(count + room, limit) for count, limit in zip(counts, most, strict=True)))
    with nan_filled_memory():
        actual = kernels.group(
            ids, num_experts, chunk_row_offsets=row_offsets, chunk_pair_offsets=roomy, row_sources=sources
        )
    for name in ("expert_offsets", "chunk_expert_offsets", "inverse"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    num_pairs = expected.num_pairs
    assert not actual.source_order[num_pairs:].any()
    places = torch.tensor(
        [start + n for start, count in zip(roomy[:-1], counts, strict=True) for n in range(count)],
        dtype=torch.int64,
        device=DEVICE,
    )
    assert torch.equal(actual.pair_index[places], expected.pair_index)
    assert torch.equal(actual.source_order[:num_pairs], places[expected.source_order.long()].int())

    x, dh = torch.randn(num_rows, 6, device=DEVICE), torch.randn(num_pairs, 8, device=DEVICE)
    roomy_dh = torch.full((actual.num_pairs, 8), torch.nan, device=DEVICE)
    roomy_dh[places] = dh
    topk_weights = torch.rand(num_rows, top_k, device=DEVICE)
    needs = PerWeight(True, True, False, True)
    grads, exact = (
        kernels.weight_grad(grouping, ExpertLayout(), GradientOperands(x, values, x, None, topk_weights), needs)
        for grouping, values in ((actual, roomy_dh), (expected, dh))
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, exact, strict=True) if a is not None)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1024, 16), (1, 1), (127, 10), (128, 2)])
def test_group_limits(num_experts, top_k):
    ids = random_ids(37, top_k, num_experts).to(DEVICE)
    expected = reference.group(ids, num_experts)
    assert_same_grouping(kernels.group(ids, num_experts), expected)
    assert_same_grouping(kernels.group(ids.to(torch.int32), num_experts), expected)
    assert_same_grouping(kernels.group(ids.T.contiguous().T, num_experts), expected)


@pytest.mark.thorough
def test_group_of_many_tiles():
    ids = random_ids(400, 16, 40).to(DEVICE)
    assert_same_grouping(kernels.group(ids, 40), reference.group(ids, 40))
    row_offsets, sources = (0, 10, 390, 400), RowSources((1, 0), torch.tensor([[0, 10], [200, 180], [7, 3]]))
    expected = reference.group(ids, 40, chunk_row_offsets=row_offsets, row_sources=sources)
    actual = kernels.group(
        ids,
        40,
        chunk_row_offsets=row_offsets,
        chunk_pair_offsets=expected.chunk_pair_offsets,
        row_sources=sources,
    )
    assert_same_grouping(actual, expected)


def test_group_wants_pair_offsets_and_sources_for_chunks():
    ids = random_ids(6, 2, 3).to(DEVICE)
    with pytest.raises(ValueError, match="chunk_pair_offsets"):
        kernels.group(ids, 3, chunk_row_offsets=(0, 2, 6))
    with pytest.raises(ValueError, match="row_sources"):
        kernels.group(ids, 3, chunk_row_offsets=(0, 2, 6), chunk_pair_offsets=(0, 4, 12))


class OnlyAllocations(TorchDispatchMode):
    """Fail on any PyTorch operation that is more than memory, a view, or one copy to the device of what the host made.

    It would be a launch or a host read.
    """

    def __init__(self, num_copies=0):
        super().__init__()
        self.num_copies = num_copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        of_device = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor) and t.is_meta]
        if name == "_to_copy" and result.is_meta:
            self.num_copies -= 1
            assert self.num_copies >= 0
        elif of_device:
            names = ("empty", "empty_like", "new_empty", "empty_strided", "select", "slice")
            assert name in names, f"{name} while grouping"
        return result


@pytest.mark.parametrize(("num_rows", "num_launches"), [(0, 1), (1, 1), (64, 1), (65, 4), (100_000, 4)])
@pytest.mark.parametrize("num_experts", [1, 60, 1024])
def test_group_takes_at_most_four_launches(num_rows, num_launches, num_experts):
    """N = 1024 pairs of K = 16 still fit one program."""
    ids = torch.empty(num_rows, 16, dtype=torch.int64, device="meta")
    with launch.recording(aot.TARGETS["sm_90"]) as launches, OnlyAllocations():
        kernels.group(ids, num_experts)
    assert len(launches) == num_launches
    assert num_launches > 1 or launches[0].grid == (1,)


@pytest.mark.parametrize(("rows", "num_launches"), [([[0, 0], [0, 0]], 1), ([[3, 0], [1, 2]], 4), ([[999] * 9] * 5, 4)])
def test_group_in_chunks_takes_at_most_four_launches(rows, num_launches):
    sources = RowSources(tuple(range(len(rows[0]))), torch.tensor(rows))
    row_offsets = (0, *itertools.accumulate(map(sum, rows)))
    pair_offsets = tuple(16 * row for row in row_offsets)
    ids = torch.empty(row_offsets[-1], 16, dtype=torch.int64, device="meta")
    with launch.recording(aot.TARGETS["sm_90"]) as launches, OnlyAllocations(num_copies=1):
        grouping = kernels.group(
            ids, 60, chunk_row_offsets=row_offsets, chunk_pair_offsets=pair_offsets, row_sources=sources
        )
    assert len(launches) == num_launches
    assert grouping.source_order.shape == (pair_offsets[-1],)


@pytest.mark.parametrize("num_rows", [7, 8, 9, 63, 64, 65])
def test_group_around_one_program(num_rows):
    ids = random_ids(num_rows, 16, 300).to(DEVICE)
    with nan_filled_memory():
        assert_same_grouping(kernels.group(ids, 300), reference.group(ids, 300))
