"""The weight gradients of every backend: accumulation, hot experts, bits."""

from itertools import accumulate
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from backward_cases import Operands
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, LAYOUTS, given_grads, random_ids, row_sources
from tolerance import assert_close_to_exact
from torch import Tensor
from uninitialised import nan_filled_memory

from tritonmoe.config.layer import KernelOptions, PerWeight
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import torch as torch_backend
from tritonmoe.ops.backends import triton as triton_backend
from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels import bias_grad, launch, ragged_tiles, spans, weight_grad
from tritonmoe.ops.kernels.spans import span_of_slot
from tritonmoe.ops.kernels.tiles import measured_tiles, tma

BACKENDS = pytest.mark.parametrize(
    "backend", [reference, torch_backend, triton_backend], ids=["reference", "torch", "triton"]
)


@pytest.mark.sweep(2)
@BACKENDS
@pytest.mark.parametrize("into", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["concatenated", "transposed"])
def test_gradients_are_added_in_place(layout: str, dtype: torch.dtype, into: torch.dtype, backend: ModuleType) -> None:
    """Twice, as two micro-batches would, and rounded once: from bf16 rows into fp32 no bf16 sum is in between."""
    operands = Operands(random_ids(18, 2, 4), 5, LAYOUTS[layout], dtype)  # expert 4 is empty
    grouping = operands.group()
    exact = operands.double().weight_grad(reference, grouping)
    start = [torch.randn_like(exact.gate_up_proj).to(into), torch.randn_like(exact.down_proj).to(into)]
    sums = [value.clone() for value in start]
    for _ in range(2):
        with nan_filled_memory():
            grads = operands.weight_grad(backend, grouping, accumulate=PerWeight(sums[0], None, sums[1], None))
        assert grads.gate_up_proj is None
        assert grads.down_proj is None
        assert grads.gate_up_bias is not None
        assert grads.down_bias is not None
    # What plain PyTorch gives for fp32 products added to a gradient of this dtype.
    plain = operands.weight_grad(reference, grouping)
    if dtype != torch.float32:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("x", "dh", "dout", "scaled_a"):
                patch.setattr(operands, name, getattr(operands, name).float())
            plain = operands.weight_grad(reference, grouping)
    for name, actual, begin in zip(("gate_up_proj", "down_proj"), sums, start, strict=True):
        expected = begin.clone()
        for _ in range(2):
            expected += getattr(plain, name)
        assert_close_to_exact(name, actual, expected, begin.double() + 2 * getattr(exact, name))
        assert torch.equal(actual[4], begin[4])


@BACKENDS
def test_gradients_are_added_into_views(backend: ModuleType) -> None:
    """A main_grad is a piece of a larger buffer, and may have any strides."""
    operands = Operands(random_ids(9, 2, 3), 3, LAYOUTS["concatenated"])
    grouping = operands.group()
    expected = operands.weight_grad(backend, grouping)
    buffer = torch.zeros(7 + 3 * 24 * 20 + 5, device=DEVICE)
    gate_up, down = buffer[7:-5].view(3, 24, 20), torch.zeros(3, 12, 40, device=DEVICE)[:, :, ::2].mT
    operands.weight_grad(backend, grouping, accumulate=PerWeight(gate_up, None, down, None))
    torch.testing.assert_close(gate_up, expected.gate_up_proj)
    torch.testing.assert_close(down, expected.down_proj)
    assert not buffer[:7].any()
    assert not buffer[-5:].any()


@BACKENDS
def test_only_one_of_the_gradients_is_added(backend: ModuleType) -> None:
    operands = Operands(random_ids(9, 2, 3), 3, LAYOUTS["concatenated"])
    grouping = operands.group()
    expected = operands.weight_grad(backend, grouping)
    down = torch.ones_like(expected.down_proj)
    grads = operands.weight_grad(backend, grouping, accumulate=PerWeight(None, None, down, None))
    assert grads.down_proj is None
    assert torch.equal(grads.gate_up_proj, expected.gate_up_proj)
    torch.testing.assert_close(down, 1 + expected.down_proj)


def ways(operands: Operands, grouping: Grouping, **fields: bool) -> tuple[list[str], reference.WeightGrads]:
    """Return how pairs' values were read, for each of both weights, and the gradients; `fields` as if measured."""

    class Everything(dict):
        def get(self, key, default=None):
            return fields

    with measured_tiles.using(Everything()), measured_tiles.asked() as asked, nan_filled_memory():
        grads = operands.weight_grad(triton_backend, grouping)
    return [dict(config.reads)["pair_values"] for config in asked.values()], grads


@pytest.mark.usefixtures("reads_by_tma")
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_tiles_read_by_tma_end_where_an_expert_ends(value: float) -> None:
    """The bits of pointers, though the last box of experts of 1, 31, 32 and 34 pairs reaches into another's rows."""
    ids = torch.arange(6).repeat_interleave(torch.tensor([0, 1, 31, 32, 34, 64]))
    ids = ids[torch.randperm(162, generator=torch.Generator().manual_seed(0))].view(-1, 2)
    operands = Operands(ids, 6, LAYOUTS["concatenated"], torch.float16, hidden=40, intermediate=24)
    grouping = operands.group()
    by_tma, grads = ways(operands, grouping)
    by_pointers, expected = ways(operands, grouping, tma=False)
    assert by_tma == [tma.BY_TMA] * 2
    assert by_pointers == ["pointers: measured to be faster"] * 2
    plain, exact = operands.weight_grad(reference, grouping), operands.double().weight_grad(reference, grouping)
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(grads, name), getattr(expected, name)), name
        assert_close_to_exact(name, getattr(grads, name), getattr(plain, name), getattr(exact, name))
    offsets = grouping.expert_offsets.tolist()
    for expert in (2, 4):
        operands.dh[offsets[expert] : offsets[expert + 1]] = value
        operands.scaled_a[offsets[expert] : offsets[expert + 1]] = value
    _, poisoned = ways(operands, grouping)
    for name in ("gate_up_proj", "down_proj"):
        for expert in range(6):
            found = getattr(poisoned, name)[expert]
            if expert in (2, 4):
                assert not found.isfinite().any()
            else:
                assert torch.equal(found, getattr(expected, name)[expert]), (name, expert)


@pytest.mark.usefixtures("reads_by_tma")
def test_pairs_that_tma_cannot_read() -> None:
    ids = random_ids(9, 2, 3)
    odd = Operands(ids, 3, LAYOUTS["concatenated"], torch.float16)
    found, _ = ways(odd, odd.group())
    assert found == [tma.BY_TMA, "pointers: 24 bytes along axis 0 are no multiple of 16 below 2^40"]
    single = Operands(ids, 3, LAYOUTS["concatenated"], torch.float32)
    assert set(ways(single, single.group())[0]) == {"pointers: products in fp32 would spill registers with it"}
    offsets = (0, 4, 9)
    sources = row_sources(offsets, torch.zeros(9, dtype=torch.int64), 1)
    in_chunks = reference.group(odd.ids, 3, chunk_row_offsets=offsets, row_sources=sources)
    assert set(ways(odd, in_chunks)[0]) == {"pointers: the pairs of a tile lie in several chunks"}
    many = torch.empty(2**30 + 1, 8, dtype=torch.float16, device="meta")
    assert ragged_tiles.refusal(many) == "1073741825 rows are more than 2^30"
    assert not ragged_tiles.refusal(many[1:])


@triton.jit
def _spans_kernel(found, expert_offsets, E, span, BLOCK_E: tl.constexpr, SPLIT: tl.constexpr):
    slot = tl.program_id(0)
    expert, first, end, row = span_of_slot(slot, expert_offsets, E, span, BLOCK_E, SPLIT)
    tl.store(found + 4 * slot + 0, expert)
    tl.store(found + 4 * slot + 1, first)
    tl.store(found + 4 * slot + 2, end)
    tl.store(found + 4 * slot + 3, row)


def spans_of(counts: list[int], span: int, padding: int = 0) -> list[tuple[int, int, int, int]]:
    """Return (expert, first, end, workspace row) of every slot that has something to do."""
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=DEVICE)
    num_pairs, num_experts = sum(counts) + padding, len(counts)
    num_slots = spans.num_span_slots(num_pairs, num_experts, span)
    found = torch.empty(num_slots, 4, dtype=torch.int32, device=DEVICE)
    launch.launch(
        _spans_kernel,
        (num_slots,),
        found,
        offsets,
        num_experts,
        span,
        BLOCK_E=triton.next_power_of_2(num_experts),
        SPLIT=spans.num_workspace_rows(num_pairs, span) > 0,
    )
    return [tuple(row) for row in found.tolist() if row[0] >= 0]


def test_spans_worked_example() -> None:
    assert spans_of([3, 11, 5], 4) == [(0, 0, 3, -1), (1, 3, 7, 0), (1, 7, 14, 1), (2, 14, 19, -1)]
    assert spans_of([3, 11, 5], 10) == [(0, 0, 3, -1), (1, 3, 14, -1), (2, 14, 19, -1)]
    assert spans_of([0, 0], 4) == [(0, 0, 0, -1), (1, 0, 0, -1)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=1, max_size=9),
    span=st.integers(1, 12),
    padding=st.integers(0, 30),
)
def test_spans_cover_every_pair_once(counts: list[int], span: int, padding: int) -> None:
    """Whatever the counts: no gap, no overlap, no expert without a span, no workspace row twice or out of bounds."""
    found = spans_of(counts, span, padding)
    assert [expert for expert, *_ in found] == sorted(expert for expert, *_ in found)
    assert {expert for expert, *_ in found} == set(range(len(counts)))
    position = 0
    for _, first, end, _ in found:
        assert first == position
        position = end
    assert position == sum(counts)
    rows = [row for *_, row in found if row >= 0]
    assert len(set(rows)) == len(rows)
    assert all(row < spans.num_workspace_rows(sum(counts) + padding, span) for row in rows)
    for expert, count in enumerate(counts):
        own = [(end - first, row) for e, first, end, row in found if e == expert]
        if count < 2 * span:
            assert own == [(count, -1)]
        else:
            assert [length for length, _ in own[:-1]] == [span] * (count // span - 1)
            assert [row for _, row in own] == list(range(own[0][1], own[0][1] + len(own)))


@pytest.mark.parametrize("tiles", [1, 6, 96, 511, 3584])
@pytest.mark.parametrize("num_pairs", [0, 8191, 8192, 2**18, 2**24])
def test_workspace_is_bounded(num_pairs: int, tiles: int) -> None:
    """No expert is cut for less than MIN_SPAN pairs a span, nor where its own tiles keep a GPU busy."""
    span = weight_grad.span_length(num_pairs, tiles)
    rows = spans.num_workspace_rows(num_pairs, span)
    assert rows * tiles < weight_grad.ENOUGH_TILES + tiles
    assert rows * weight_grad.MIN_SPAN <= num_pairs
    assert rows == 0 or tiles < weight_grad.ENOUGH_TILES
    assert rows > 0 or num_pairs < 2 * weight_grad.MIN_SPAN or tiles >= weight_grad.ENOUGH_TILES


@pytest.fixture
def tiny_spans(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Cut experts of 32 pairs and more; give, for each sum that was asked for, whether there was a workspace."""
    were_cut: list[bool] = []

    def spied(workspace, *args) -> None:
        were_cut.append(workspace is not None)
        spans.sum_spans(workspace, *args)

    monkeypatch.setattr(weight_grad, "span_length", lambda *_: 16)
    monkeypatch.setattr(bias_grad, "SPAN", 16)
    monkeypatch.setattr(weight_grad, "sum_spans", spied)
    monkeypatch.setattr(bias_grad, "sum_spans", spied)
    return were_cut


def hot_ids() -> Tensor:
    """Expert 1 has most of the pairs, 3 two spans, 2 and 4 have none."""
    ids = random_ids(90, 2, 6)
    ids[:60, 0] = 1
    ids[60:, 0] = 3
    ids[(ids == 2) | (ids == 4)] = 0
    return ids


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["concatenated", "transposed"])
def test_hot_experts_are_cut(tiny_spans: list[bool], layout: str, dtype: torch.dtype) -> None:
    operands = Operands(hot_ids(), 6, LAYOUTS[layout], dtype, hidden=40)
    grouping = operands.group()
    with nan_filled_memory():
        actual = operands.weight_grad(triton_backend, grouping)
        added = [torch.ones_like(actual.gate_up_proj), torch.ones_like(actual.down_proj, dtype=torch.float32)]
        operands.weight_grad(triton_backend, grouping, accumulate=PerWeight(added[0], None, added[1], None))
    assert tiny_spans == [True] * 8
    plain, exact = operands.weight_grad(reference, grouping), operands.double().weight_grad(reference, grouping)
    for name in given_grads(plain):
        assert_close_to_exact(name, getattr(actual, name), getattr(plain, name), getattr(exact, name))
        assert not getattr(actual, name)[[2, 4]].any()
    assert_close_to_exact("gate_up_proj", added[0], 1 + plain.gate_up_proj, 1 + exact.gate_up_proj)
    assert_close_to_exact("down_proj", added[1], 1 + plain.down_proj.float(), 1 + exact.down_proj)


def test_bits_do_not_depend_on_programs_or_chunks(tiny_spans: list[bool]) -> None:
    """Three ranks' rows in one buffer sorted by rank, or in three chunks of unequal size; any number of programs."""
    operands = Operands(hot_ids(), 6, LAYOUTS["concatenated"], torch.float16)
    whole = operands.group()
    expected = operands.weight_grad(triton_backend, whole)
    for num_sms in (1, 3, 1000):
        again = operands.weight_grad(triton_backend, whole, options=KernelOptions(num_sms=num_sms))
        for name in given_grads(expected):
            assert torch.equal(getattr(again, name), getattr(expected, name)), (name, num_sms)

    chunk_of_row = torch.tensor([0] * 3 + [1] * 20 + [2] * 7).repeat(3)
    to_chunks = torch.argsort(chunk_of_row, stable=True)
    chunked = object.__new__(Operands)
    vars(chunked).update(vars(operands))
    for name in ("ids", "x", "dout", "weights"):
        setattr(chunked, name, getattr(operands, name)[to_chunks.to(DEVICE)])
    row_offsets = (0, 9, 69, 90)
    sources = row_sources(row_offsets, torch.arange(90)[to_chunks] // 30, 3)
    grouping = reference.group(chunked.ids, 6, chunk_row_offsets=row_offsets, row_sources=sources)
    assert grouping.source_order is not None
    rows = to_chunks.to(DEVICE)[grouping.row_index.long()]
    stored_before = whole.inverse[rows, grouping.pair_index.long() % 2].long()
    chunked.dh, chunked.scaled_a = operands.dh[stored_before], operands.scaled_a[stored_before]
    reached = chunked.weight_grad(triton_backend, grouping)
    for name in given_grads(expected):
        assert torch.equal(getattr(reached, name), getattr(expected, name)), name
    assert all(tiny_spans)
