"""The group operation of every backend: worked examples, and the order's definition on random ids."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import torch as torch_backend
from tritonmoe.ops.backends import triton as triton_backend
from tritonmoe.ops.grouping import Grouping, GroupingBlock, RowSources

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"reference": reference, "torch": torch_backend, "triton": triton_backend}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def working_pairs(grouping: Grouping) -> int:
    return int(grouping.expert_offsets[-1])


def assert_integers(grouping: Grouping, **expected: list) -> None:
    for name, values in expected.items():
        actual: Tensor = getattr(grouping, name)
        assert actual.dtype == torch.int32, name
        stored = name in ("pair_index", "source_order")
        assert (actual[: working_pairs(grouping)] if stored else actual).tolist() == values, name


@every_backend
def test_worked_example(backend: ModuleType) -> None:
    """The one in the docstring of grouping.py."""
    ids = torch.tensor([[1, 0], [1, 2], [-1, 0], [1, 1]], device=DEVICE)
    grouping = backend.group(ids, 3)
    assert_integers(
        grouping,
        pair_index=[1, 5, 0, 2, 6, 7, 3],
        expert_offsets=[0, 2, 6, 7],
        inverse=[[2, 0], [3, 6], [-1, 1], [4, 5]],
        chunk_expert_offsets=[[0, 2, 6, 7]],
    )
    assert grouping.row_index[:7].tolist() == [0, 2, 0, 1, 3, 3, 1]
    assert grouping.chunk_row_offsets == (0, 4)
    assert grouping.source_order is None
    assert grouping.chunk(0) is grouping
    assert (grouping.num_experts, grouping.top_k, grouping.num_chunks) == (3, 2, 1)


@every_backend
def test_two_chunks_from_two_ranks(backend: ModuleType) -> None:
    """Rows a..e; chunk 0 is a, b (rank 0), c (rank 1); chunk 1 is d (rank 0), e (rank 1); E = 2, K = 2.

    Pairs 0..9:       a: 1, 0   b: 0, skipped   c: 1, 1   d: 0, 1   e: skipped, 0
    Storage:          chunk 0: expert 0: pairs 1, 2; expert 1: 0, 4, 5.  chunk 1: expert 0: 6, 9; expert 1: 7.
    Source order:     expert 0: rank 0 has pairs 1, 2, 6, rank 1 has 9; expert 1: rank 0 has 0, 7, rank 1 has 4, 5.
    """
    ids = torch.tensor([[1, 0], [0, 7], [1, 1], [0, 1], [-1, 0]], device=DEVICE)
    grouping = backend.group(
        ids,
        2,
        chunk_row_offsets=(0, 3, 5),
        chunk_pair_offsets=(0, 5, 8),
        row_sources=RowSources((0, 1), torch.tensor([[2, 1], [1, 1]])),
    )
    assert_integers(
        grouping,
        pair_index=[1, 2, 0, 4, 5, 6, 9, 7],
        expert_offsets=[0, 4, 8],
        inverse=[[2, 0], [1, -1], [3, 4], [0, 2], [-1, 1]],
        source_order=[0, 1, 5, 6, 2, 7, 3, 4],
        chunk_expert_offsets=[[0, 2, 5], [0, 2, 3]],
    )
    assert grouping.chunk_row_offsets == (0, 3, 5)
    assert grouping.chunk_pair_offsets == (0, 5, 8)
    second = grouping.chunk(1)
    assert second.pair_index.tolist() == [6, 9, 7]
    assert second.row_index.tolist() == [3, 4, 3]
    assert second.host_expert_offsets == [0, 2, 3]
    assert second.inverse.tolist() == [[0, 2], [-1, 1]]
    assert second.chunk_row_offsets == (3, 5)
    assert second.num_chunks == 1
    values = torch.tensor([10.0, 20.0, 30.0], device=DEVICE)
    assert second.pairs_to_rows(values).tolist() == [[10.0, 30.0], [0.0, 20.0]]


@every_backend
def test_slots_of_experts(backend: ModuleType) -> None:
    grouping = backend.group(torch.tensor([[1], [3], [1]], device=DEVICE), 4)
    places = grouping.padded_pairs
    assert grouping.host_counts == ([1, 3], [2, 1])
    assert places.used.tolist() == [False, False, True, True, False, False, True, False]
    assert places.of_pairs.tolist() == [2, 3, 6]
    assert places.pairs[places.used].tolist() == [0, 1, 2]
    assert places.pairs[7] == 2, "an unused place has a pair of its own expert"
    assert all(0 <= pair < 3 for pair in places.pairs.tolist())


@every_backend
@pytest.mark.parametrize(
    ("ids", "num_experts"),
    [
        (torch.empty(0, 2, dtype=torch.int64), 3),
        (torch.full((3, 2), -1), 3),
        (torch.full((3, 2), 2**31 - 1), 3),
        (torch.tensor([[2**32, 2**32 + 1], [-(2**32), -(2**63)]]), 3),
        (torch.full((5, 1), 2), 3),
        (torch.full((5, 3), 0), 1),
    ],
    ids=["no-rows", "all-skipped", "all-too-large", "wrap-around-int32", "one-expert", "E1-repeated"],
)
def test_extremes(ids: Tensor, num_experts: int, backend: ModuleType) -> None:
    check_order(ids, num_experts, backend.group(ids.to(DEVICE), num_experts))


@pytest.mark.parametrize("backend", [reference, torch_backend], ids=["reference", "torch"])
def test_dtype_and_strides_of_ids_do_not_matter(backend: ModuleType) -> None:
    ids = torch.randint(-1, 6, (7, 3), generator=torch.Generator().manual_seed(0))
    expected = backend.group(ids, 5)
    for same in (ids.int(), ids.T.contiguous().T, torch.cat([ids, ids], 1)[:, :3]):
        actual = backend.group(same, 5)
        assert torch.equal(actual.pair_index, expected.pair_index)
        assert torch.equal(actual.inverse, expected.inverse)


def check_order(
    ids: Tensor,
    num_experts: int,
    grouping: Grouping,
    chunk_of_row: list[int] | None = None,
    source_of_row: list[int] | None = None,
) -> None:
    """Check every field against its definition."""
    num_rows, top_k = ids.shape
    chunks = chunk_of_row or [0] * num_rows
    sources = source_of_row or [0] * num_rows
    num_chunks = grouping.num_chunks
    pairs = [p for p in range(num_rows * top_k) if 0 <= int(ids[p // top_k, p % top_k]) < num_experts]

    def expert(pair: int) -> int:
        return int(ids[pair // top_k, pair % top_k])

    num_pairs = working_pairs(grouping)
    assert num_pairs == len(pairs)
    stored = grouping.pair_index.tolist()
    assert all(p == -1 for p in stored[num_pairs:])
    stored = stored[:num_pairs]
    assert stored == sorted(pairs, key=lambda p: (chunks[p // top_k], expert(p), sources[p // top_k], p))
    for e in range(num_experts):
        count = sum(expert(p) == e for p in pairs)
        assert int(grouping.expert_offsets[e + 1] - grouping.expert_offsets[e]) == count
    starts = grouping.chunk_pair_offsets
    for c in range(num_chunks):
        in_chunk = [p for p in pairs if chunks[p // top_k] == c]
        if num_chunks > 1:
            assert starts[c + 1] - starts[c] == len(in_chunk)
        expected = [sum(expert(p) < e for p in in_chunk) for e in range(num_experts + 1)]
        assert grouping.chunk_expert_offsets[c].tolist() == expected
    flat_inverse = grouping.inverse.flatten().tolist()
    for pair, position in enumerate(flat_inverse):
        assert (position >= 0) == (pair in pairs)
        if position >= 0:
            assert stored[starts[chunks[pair // top_k]] + position] == pair
    if num_chunks > 1:
        assert grouping.source_order is not None
        by_source = [stored[n] for n in grouping.source_order[:num_pairs].tolist()]
        assert by_source == sorted(pairs, key=lambda p: (expert(p), sources[p // top_k], p))


@st.composite
def chunked_ids(draw):
    """Ids of rows in chunks; within a chunk rows come by source rank."""
    num_experts, top_k = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    num_chunks, num_sources = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    counts = draw(
        st.lists(
            st.lists(st.integers(0, 3), min_size=num_sources, max_size=num_sources),
            min_size=num_chunks,
            max_size=num_chunks,
        )
    )
    chunks = [c for c in range(num_chunks) for s in range(num_sources) for _ in range(counts[c][s])]
    sources = [s for c in range(num_chunks) for s in range(num_sources) for _ in range(counts[c][s])]
    values = draw(
        st.lists(st.integers(-2, num_experts + 1), min_size=len(chunks) * top_k, max_size=len(chunks) * top_k)
    )
    ids = torch.tensor(values, dtype=torch.int64).view(len(chunks), top_k)
    return ids, num_experts, num_chunks, chunks, sources


def group_in_chunks(backend: ModuleType, ids: Tensor, num_experts: int, num_chunks: int, chunks, sources) -> Grouping:
    is_working = ((ids >= 0) & (ids < num_experts)).sum(1).tolist()
    row_offsets, pair_offsets = [0], [0]
    ranks = tuple(range(max(sources, default=0) + 1))
    of_rows = list(zip(chunks, sources, strict=True))
    rows = [[of_rows.count((c, rank)) for rank in ranks] for c in range(num_chunks)]
    for c in range(num_chunks):
        row_offsets.append(row_offsets[-1] + chunks.count(c))
        pair_offsets.append(sum(n for n, of in zip(is_working, chunks, strict=True) if of <= c))
    return backend.group(
        ids.to(DEVICE),
        num_experts,
        chunk_row_offsets=tuple(row_offsets),
        chunk_pair_offsets=tuple(pair_offsets),
        row_sources=RowSources(ranks, torch.tensor(rows)),
    )


@pytest.mark.parametrize("backend", [reference, torch_backend], ids=["reference", "torch"])
@settings(max_examples=80, deadline=None)
@given(drawn=chunked_ids())
def test_any_ids_and_chunks(backend: ModuleType, drawn) -> None:
    ids, num_experts, num_chunks, chunks, sources = drawn
    grouping = group_in_chunks(backend, ids, num_experts, num_chunks, chunks, sources)
    check_order(ids, num_experts, grouping, chunks, sources)


@settings(max_examples=5, deadline=None)
@given(drawn=chunked_ids())
def test_any_ids_and_chunks_triton(drawn) -> None:
    ids, num_experts, num_chunks, chunks, sources = drawn
    grouping = group_in_chunks(triton_backend, ids, num_experts, num_chunks, chunks, sources)
    check_order(ids, num_experts, grouping, chunks, sources)


@settings(max_examples=60, deadline=None)
@given(drawn=chunked_ids())
def test_torch_gives_the_integers_of_the_reference(drawn) -> None:
    mine, theirs = (group_in_chunks(backend, *drawn) for backend in (torch_backend, reference))
    for name in ("pair_index", "expert_offsets", "inverse", "chunk_expert_offsets", "source_order"):
        a, b = getattr(mine, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
    assert mine.chunk_row_offsets == theirs.chunk_row_offsets
    assert mine.chunk_pair_offsets == theirs.chunk_pair_offsets


@settings(max_examples=50, deadline=None)
@given(drawn=chunked_ids(), pieces=st.integers(1, 5))
def test_source_order_does_not_depend_on_the_chunks(drawn, pieces: int) -> None:
    """The same tokens of the same ranks in other chunks: the same pairs in source order."""
    ids, num_experts, _, _, sources = drawn
    orders = []
    for num_chunks in (1, pieces):
        # Each rank cuts its own tokens into equal chunks; tokens are named (rank, number).
        tokens = sorted((s, sources[:n].count(s)) for n, s in enumerate(sources))
        per_rank = {s: sources.count(s) for s in set(sources)}
        chunk_of = {(s, n): n * num_chunks // per_rank[s] for s, n in tokens}
        rows = sorted(tokens, key=lambda token: (chunk_of[token], token))
        row_ids = ids[[tokens.index(token) for token in rows]] if rows else ids
        grouping = group_in_chunks(
            torch_backend, row_ids, num_experts, num_chunks, [chunk_of[t] for t in rows], [s for s, _ in rows]
        )
        order = range(working_pairs(grouping)) if grouping.source_order is None else grouping.source_order.tolist()
        stored = grouping.pair_index.tolist()
        orders.append([(rows[stored[n] // ids.shape[1]], stored[n] % ids.shape[1]) for n in order])
    assert orders[0] == orders[1]


@pytest.mark.parametrize("max_pairs", [1, 2, 4, 7, 8, 100])
def test_blocks_cover_every_pair_once(max_pairs: int) -> None:
    topk_ids = torch.tensor([[2, 0], [2, 1], [-1, 2], [0, 2], [2, 4]])
    grouping = torch_backend.group(topk_ids, 5)
    blocks = grouping.blocks(max_pairs)
    covered = [(n, e) for block in blocks for n, e in pairs_of_block(block)]
    offsets = grouping.host_expert_offsets
    assert covered == [(n, e) for e in range(5) for n in range(offsets[e], offsets[e + 1])]
    for block in blocks:
        assert 0 < block.grouping.num_pairs <= max_pairs
        assert block.grouping.pair_index.tolist() == grouping.pair_index[block.positions].tolist()


def pairs_of_block(block: GroupingBlock) -> list[tuple[int, int]]:
    """(storage position, expert) of each pair of a block, as the block tells it."""
    offsets = block.grouping.host_expert_offsets
    experts = range(block.experts.start, block.experts.stop)
    assert len(experts) == block.grouping.num_experts
    return [
        (block.positions.start + n, e)
        for e, first, last in zip(experts, offsets[:-1], offsets[1:], strict=True)
        for n in range(first, last)
    ]


def test_blocks_of_hand_written_offsets() -> None:
    """The example of Grouping.blocks."""
    grouping = torch_backend.group(torch.tensor([[0], [0], [1], [2], [2], [2], [2], [2]]), 3)
    assert [(b.positions, b.experts) for b in grouping.blocks(4)] == [
        (slice(0, 3), slice(0, 2)),
        (slice(3, 5), slice(2, 3)),
        (slice(5, 8), slice(2, 3)),
    ]
    assert [b.grouping for b in grouping.blocks(None)] == [grouping]
