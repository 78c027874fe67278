"""Capacity: fixed room for rows, exact results whether they fit or not, no host read before the rows have left."""

import math
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from batches import KERNEL_DEVICE, NAMES, Batch, assert_equals_one_device, capped_traffic
from hypothesis import given, settings
from hypothesis import strategies as st
from placed_batches import REPLICATED, PlacedBatch, compare, run
from same_bits import assert_same_bits
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.dispatch.capacity import plan_capped_tokens, segment_room
from tritonmoe.dispatch.send_plan import plan_tokens
from tritonmoe.expert_parallel import check as check_module
from tritonmoe.expert_parallel import layer_pass as layer_pass_module
from tritonmoe.overlap import report as report_module
from tritonmoe.transports import LocalTransport, Transport, TwoLevelTransport

ROOMY, TIGHT = 1024.0, 0.2


def reports(batch: Batch, overlap: tm.OverlapConfig | tm.OverlapPlan) -> list[tm.overlap.report.LayerReport]:
    """Run the batch through a layer's forward and give every rank's report."""

    def on_rank(transport: Transport):
        config = tm.MoEConfig(6, 5, batch.num_experts, batch.top_k)
        layer = tm.GroupedExperts(config, transport, overlap, dtype=batch.dtype)
        mine = batch.of_rank(transport.rank)
        layer(mine["x"], batch.ids[transport.rank], mine["topk_weights"])
        return layer.last_report

    return tm.run_on_emulated_ranks(on_rank, batch.num_ranks, timeout_s=20)


def test_room() -> None:
    """The example in dispatch/capacity.py; local slices and chunks of every size have theirs."""
    plan = tm.OverlapPlan(capacity=1.1, local_first=False)
    assert segment_room(100, 4, 2, 0, 2, plan) == ([[92, 92]], [[110, 110]])
    two = replace(plan, chunk_sizes=(1, 1))
    assert segment_room(100, 4, 2, 0, 2, two) == ([[46, 46]] * 2, [[55, 55]] * 2)
    plan = tm.OverlapPlan((1, 3), capacity=1.0, local_start=4)
    rows, pairs = segment_room(64, 12, 1, 1, 3, plan)
    assert rows == [[0, 5, 0], [0, 17, 0], [5, 0, 5], [17, 0, 17]]  # a third of 64, rounded up, by quarters
    assert pairs == rows
    assert segment_room(0, 12, 1, 1, 3, plan)[0] == [[0, 0, 0]] * 4
    # A token that needs more experts than the other ranks have needs every rank.
    assert segment_room(10, 4, 3, 0, 2, tm.OverlapPlan(capacity=1.0, local_first=False))[0] == [[10, 10]]


@settings(max_examples=200, deadline=None)
@given(
    num_tokens=st.integers(0, 50),
    size=st.integers(1, 5),
    num_local=st.integers(1, 4),
    top_k=st.integers(1, 6),
    capacity=st.sampled_from([0.01, 0.5, 1.0, 1.3, 2.0, 1024.0]),
    chunk_sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8).map(tuple),
    local_first=st.booleans(),
    local_start=st.integers(0, 16),
)
def test_the_room_for_a_rank_does_not_depend_on_the_chunks(
    num_tokens, size, num_local, top_k, capacity, chunk_sizes, local_first, local_start
):
    """So saved tensors have one shape, whatever plan a recompute runs; every row of a segment has room for a pair."""
    plan = tm.OverlapPlan(chunk_sizes, local_first, local_start, capacity=capacity)
    rows, pairs = (torch.tensor(t) for t in segment_room(num_tokens, num_local * size, top_k, 0, size, plan))
    one = tm.OverlapPlan(local_first=False, capacity=capacity)
    for room, whole in zip((rows, pairs), segment_room(num_tokens, num_local * size, top_k, 0, size, one), strict=True):
        assert room.sum(0).tolist() == whole[0]
    assert ((rows <= pairs) & (pairs <= top_k * rows)).all()
    num_slices = plan.num_local_slices
    for room, (first, last) in zip(rows[num_slices:], pairwise(plan.bounds(num_tokens)), strict=True):
        assert (room <= last - first).all()
    if capacity == 1024:
        assert rows.sum() == num_tokens * size


def test_traffic_of_all_ranks() -> None:
    plan = tm.OverlapPlan((1, 2), capacity=1.1)
    rows, pairs = capped_traffic((100, 0), 4, 2, plan)
    assert rows.tolist() == [[92, 92], [0, 0]]
    assert pairs.tolist() == [[110, 110], [0, 0]]
    batch = Batch(2, 6, 2)
    for report in reports(batch, replace(plan, capacity=2.0)):
        expected = capped_traffic((7, 0), 6, 2, replace(plan, capacity=2.0))
        assert not report.overflowed
        assert torch.equal(report.traffic_rows, expected[0])
        assert torch.equal(report.traffic_pairs, expected[1])


def test_the_mean_of_uniform_routing_is_the_room_of_capacity_one() -> None:
    num_tokens, num_experts, top_k, size = 4000, 24, 4, 4
    ids = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(0)).topk(top_k)[1]
    plan = tm.OverlapPlan((1, 1), capacity=1.0, local_first=False)
    exact = plan_tokens(ids, num_experts, 0, size, plan)
    rows, pairs = segment_room(num_tokens, num_experts, top_k, 0, size, plan)
    for room, counts in ((rows, exact.rows), (pairs, exact.pairs)):
        for segment in range(2):
            assert math.isclose(sum(room[segment]), sum(counts[segment]), rel_tol=0.02)


def test_a_plan_with_room_has_the_same_rows_and_padding_between() -> None:
    ids = torch.tensor([[0, 3], [2, 3], [1, -1], [3, 2], [0, 1], [4, 0]])
    plan = tm.OverlapPlan((1, 2), capacity=1.5, local_start=8)
    exact = plan_tokens(ids, 4, 1, 2, plan)
    tokens, overflows = plan_capped_tokens(ids, 4, 1, 2, plan)
    assert not overflows
    there = ~tokens.padding()
    assert tokens.home_tokens[there].tolist() == exact.home_tokens.tolist()
    assert tokens.home_ranks[there].tolist() == exact.home_ranks.tolist()
    assert len(tokens.home_tokens) == sum(map(sum, tokens.rows)) > len(exact.home_tokens)
    for token, rank in torch.cartesian_prod(torch.arange(6), torch.arange(2)).tolist():
        place, expected = int(tokens.home_index[token, rank]), int(exact.home_index[token, rank])
        assert (place >= 0) == (expected >= 0)
        if place >= 0:
            assert (int(tokens.home_tokens[place]), int(tokens.home_ranks[place])) == (token, rank)
            assert there[place]


def test_a_segment_that_does_not_fit_is_all_padding() -> None:
    plan = tm.OverlapPlan((1, 1), capacity=0.5, local_first=False)
    ids = torch.tensor([[0], [0], [0], [2], [0], [1], [2], [3]])  # all tokens of chunk 0 but one need rank 0
    tokens, overflows = plan_capped_tokens(ids, 4, 0, 2, plan)
    assert overflows
    assert tokens.rows == [[1, 1], [1, 1]]
    assert tokens.return_rows == tokens.rows
    assert tokens.padding().tolist() == [True, False, True, True]
    assert tokens.home_index.tolist() == [[-1]] * 3 + [[1]] + [[-1]] * 4


@pytest.mark.sweep(1)
@pytest.mark.parametrize("capacity", [ROOMY, TIGHT])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4], ids="W{}".format)
def test_equals_one_device(num_ranks: int, capacity: float) -> None:
    """Uneven tokens, a rank without any; overlapped and serial have the same bits, and those of no capacity."""
    for top_k, num_experts in ((2, 12), (8, 60)):
        batch = Batch(num_ranks, num_experts, top_k)
        expected = batch.on_one_device()
        for overlap in (
            tm.OverlapConfig(1, capacity=capacity),
            tm.OverlapConfig(3, capacity=capacity),
            tm.OverlapConfig(2, False, capacity=capacity),
            tm.OverlapPlan((1, 2, 1), local_start=3, window=1, backward_window=2, capacity=capacity),
        ):
            actual = batch.in_parallel(overlap)
            assert_equals_one_device(actual, expected, overlap)
            assert_same_bits(actual, batch.in_parallel(replace(overlap, serial=True)), overlap)
            assert_same_bits(actual, batch.in_parallel(replace(overlap, capacity=None)), overlap)
            for report in reports(batch, overlap):
                assert report.overflowed == (capacity == TIGHT)
                assert report.overlap.capacity == (None if report.overflowed else capacity)
                if report.overflowed:
                    assert report.first_run.overlap == replace(report.overlap, capacity=capacity)
                    assert not report.first_run.overflowed


@pytest.mark.parametrize(
    ("local_first", "capacity"), [(True, ROOMY), pytest.param(False, TIGHT, marks=pytest.mark.thorough)], ids=str
)
@pytest.mark.usefixtures("nan_filled_memory")
def test_kernels_skip_the_padding(local_first: bool, capacity: float) -> None:
    """Their groupings have gaps between chunks; with the little room, chunks of nothing else."""
    batch = Batch(2, 6, 2, torch.float32, device=KERNEL_DEVICE)
    overlap = tm.OverlapConfig(2, local_first, capacity=capacity)
    actual = batch.in_parallel(overlap, backend="triton")
    assert_same_bits(actual, batch.in_parallel(replace(overlap, capacity=None), backend="triton"))


OPTIONS = {
    "callable": {"activation": lambda h: torch.sin(h[:, :5]) + h[:, 5:].square()},
    "save-input": {"save": "input"},
    "reference": {"backend": "reference"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("capacity", [ROOMY, TIGHT])
def test_options(capacity: float, options: str) -> None:
    given = dict(OPTIONS[options])
    backend = {"backend": given.pop("backend")} if "backend" in given else {}
    batch = Batch(3, 6, 3, options=given)
    actual = batch.in_parallel(tm.OverlapConfig(2, capacity=capacity), **backend)
    assert_equals_one_device(actual, batch.on_one_device())


@pytest.mark.usefixtures("nan_filled_memory")
def test_memory_is_never_read_before_it_is_written() -> None:
    batch = Batch(3, 6, 2)
    for local_first in (True, False):
        actual = batch.in_parallel(tm.OverlapConfig(3, local_first, capacity=ROOMY))
        assert_equals_one_device(actual, batch.on_one_device())


def test_overflow_on_one_rank_only() -> None:
    """Rank 0 sends all its tokens to one rank; the others' fit. All run again, the next call fits again."""
    config = tm.MoEConfig(6, 5, 6, 1)
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(12, 6, generator=generator) for _ in range(3)]
    balanced = torch.arange(12)[:, None] % 6
    uneven = torch.full((12, 1), 3)

    def on_rank(transport: Transport) -> list[bool]:
        layers = [
            tm.GroupedExperts(config, transport, overlap, generator=torch.Generator().manual_seed(0))
            for overlap in (tm.OverlapConfig(2, capacity=1.5), tm.OverlapConfig(2))
        ]
        seen, calls = [], []
        filler = lambda: calls.append(None)  # noqa: E731
        for call in range(3):
            ids = uneven if (call, transport.rank) == (1, 0) else balanced
            arguments = xs[transport.rank], ids, torch.ones(12, 1)
            y = layers[0](*arguments, fillers=[filler])
            assert torch.equal(y, layers[1](*arguments))
            y.sum().backward()
            seen.append(layers[0].last_report.overflowed)
        assert len(calls) == 3  # not once more for the second run
        return seen

    assert tm.run_on_emulated_ranks(on_rank, 3, timeout_s=20) == [[False, True, False]] * 3


def test_a_pair_too_many_overflows_too() -> None:
    """Every token has both its experts on one rank: the rows fit, their pairs don't."""
    batch = Batch(2, 8, 2)
    batch.ids = [torch.tensor([[0, 1], [4, 5]] * 3 + [[2, 3]]), torch.zeros(0, 2, dtype=torch.int64)]
    overlap = tm.OverlapPlan(local_first=False, capacity=1.0)
    rows, pairs = segment_room(7, 8, 2, 0, 2, overlap)
    exact = plan_tokens(batch.ids[0], 8, 0, 2, overlap)
    assert exact.rows[0][0] <= rows[0][0]
    assert exact.pairs[0][0] > pairs[0][0]
    assert_equals_one_device(batch.in_parallel(overlap), batch.on_one_device())
    assert all(report.overflowed for report in reports(batch, overlap))


@pytest.mark.parametrize(
    "other", [tm.OverlapConfig(2), tm.OverlapConfig(3, capacity=2.0), tm.OverlapConfig(2, capacity=3)]
)
def test_ranks_that_disagree_hear_of_it_before_any_row(other: tm.OverlapConfig) -> None:
    heard: list[str] = []

    def on_rank(transport: Transport) -> None:
        transport.exchange = None  # type: ignore[assignment]
        batch = Batch(2, 6, 2)
        overlap = other if transport.rank else tm.OverlapConfig(2, capacity=2.0)
        try:
            batch.call(transport, batch.of_rank(transport.rank), overlap)
        except tm.CountMismatch as error:
            heard.append(str(error))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    name = "num_chunks" if other.num_chunks == 3 else "capacity"
    assert len(heard) == 2
    assert all(f"disagree on {name}" in words for words in heard)


def test_scores_that_are_not_finite_raise_on_every_rank_and_the_next_call_works() -> None:
    def on_rank(transport: Transport) -> None:
        batch = Batch(2, 6, 2)
        leaves = batch.of_rank(transport.rank)
        for overlap in (tm.OverlapConfig(2, capacity=ROOMY), tm.OverlapConfig(2, capacity=TIGHT)):
            bad = {**leaves, "topk_weights": leaves["topk_weights"].clone()}
            bad["topk_weights"][2:3] = torch.nan
            with pytest.raises(tm.NonFiniteScores, match="rank 0: 1"):
                batch.call(transport, bad, overlap)
            assert batch.call(transport, leaves, overlap).isfinite().all()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Calls of a thread that has set `captured.now` take themselves to be captured."""
    state = threading.local()
    for module in (layer_pass_module, check_module, report_module):
        monkeypatch.setattr(module, "is_captured", lambda device: getattr(state, "now", False))
    return state


def test_captured_calls_give_nan_and_the_next_one_raises(captured: threading.local) -> None:
    """What a captured graph would replay, here run as it is."""
    batch = Batch(2, 6, 2, torch.float32)
    expected = batch.in_parallel(tm.OverlapConfig(2))

    def on_rank(transport: Transport) -> list[tuple[Tensor, ...]]:
        results = []
        for capacity in (ROOMY, TIGHT):
            leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
            captured.now = True
            out = batch.call(transport, leaves, tm.OverlapConfig(2, capacity=capacity))
            grads = torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][transport.rank])
            captured.now = False
            results.append((out.detach(), *grads))
            with torch.no_grad():
                if capacity == TIGHT:
                    with pytest.raises(tm.CapacityOverflow, match="larger capacity"):
                        batch.call(transport, leaves, tm.OverlapConfig(2))
                assert batch.call(transport, leaves, tm.OverlapConfig(2)).isfinite().all()
        return results

    ranks = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    roomy, tight = (
        {name: torch.cat(v) for name, v in zip(("out", *NAMES), zip(*r, strict=True), strict=True)}
        for r in zip(*ranks, strict=True)
    )
    assert_same_bits(roomy, expected)
    assert all(value.isnan().all() for value in tight.values() if value.numel())


def test_a_graph_captures_no_backward_alone(captured: threading.local) -> None:
    """Its replay would use the splits of one forward, and memory that is given back since."""
    batch = Batch(2, 6, 2)

    def on_rank(transport: Transport) -> None:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        out = batch.call(transport, leaves, tm.OverlapConfig(2))
        captured.now = True
        with pytest.raises(ValueError, match="but not its forward"):
            out.sum().backward()
        captured.now = False
        assert batch.call(transport, leaves, tm.OverlapConfig(2)).isfinite().all()  # nothing was sent

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_captured_calls_are_not_tuned_on_and_have_no_times(captured: threading.local) -> None:
    batch = Batch(2, 6, 2)

    def on_rank(transport: Transport) -> None:
        layer = tm.GroupedExperts(
            tm.MoEConfig(6, 5, 6, 2), transport, tm.OverlapConfig(capacity=ROOMY), dtype=batch.dtype
        )
        mine = batch.of_rank(transport.rank)
        arguments = mine["x"], batch.ids[transport.rank], mine["topk_weights"]
        for _ in range(3):
            captured.now = True
            layer(*arguments)
            captured.now = False
            with pytest.raises(RuntimeError, match="not timed in a replay"):
                _ = layer.last_report.forward.total_s
            assert layer.last_report.forward.is_over
            assert layer.last_report.choice.startswith("measuring: call 1 ")
        layer(*arguments)
        assert layer.last_report.choice.startswith("measuring: call 1 ")
        assert layer.last_report.forward.total_s > 0

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_a_captured_call_needs_a_capacity(captured: threading.local) -> None:
    def on_rank(transport: Transport) -> None:
        batch = Batch(2, 6, 2)
        captured.now = transport.rank == 0
        error = (ValueError, "give OverlapConfig a capacity") if captured.now else (tm.TransportError, r"ranks \[0\]")
        with pytest.raises(error[0], match=error[1]):
            batch.call(transport, batch.of_rank(transport.rank), tm.OverlapConfig(2))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_a_cuda_graph_replays_a_call(num_chunks: int) -> None:
    """One rank, whose graph has every step that many ranks have: other routing, none that fits, and the next call."""
    batch = Batch(1, 6, 2, torch.float32, device="cuda")
    batch.ids[0] = batch.ids[0].clamp(0, 5)
    transport, overlap = LocalTransport(), tm.OverlapConfig(num_chunks, local_first=False, capacity=1.0)
    leaves = {name: value.requires_grad_() for name, value in batch.of_rank(0).items()}
    dout = batch.tokens["dout"][0]

    def run(overlap=overlap) -> list[Tensor]:
        out = batch.call(transport, leaves, overlap, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)]

    def warm_up(overlap: tm.OverlapConfig) -> None:
        """Let every kernel be compiled and loaded, which no capture may do."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(overlap)
        torch.cuda.current_stream().wait_stream(side)

    warm_up(overlap)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    run(tm.OverlapConfig(num_chunks))  # before the first replay there is nothing to raise
    for shift in (0, 1, 2):
        batch.ids[0].copy_((batch.ids[0] + shift) % 6)
        graph.replay()
        for actual, expected in zip(results, run(tm.OverlapConfig(num_chunks, local_first=False)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    small = tm.OverlapConfig(num_chunks, local_first=False, capacity=0.5)
    ids = batch.ids[0].clone()
    batch.ids[0].fill_(-1)  # no pair, which fits: the backward runs with the capacity too
    warm_up(small)
    batch.ids[0].copy_(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(small)
    graph.replay()
    assert all(value.isnan().all() for value in results)
    with pytest.raises(tm.CapacityOverflow, match="larger capacity"):
        run(tm.OverlapConfig(num_chunks))
    assert all(value.isfinite().all() for value in run(tm.OverlapConfig(num_chunks)))


@pytest.mark.parametrize("capacity", [ROOMY, TIGHT])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_replicas(num_ranks: int, capacity: float) -> None:
    batch = PlacedBatch(num_ranks, 6, 2, placement=tm.ExpertPlacement(REPLICATED[num_ranks]))
    compare(batch, run(batch, tm.OverlapConfig(2, capacity=capacity)))


@pytest.mark.parametrize("capacity", [ROOMY, TIGHT])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recompute_and_shared_expert(capacity: float, use_reentrant: bool) -> None:
    """Bit for bit what a layer without a capacity and without checkpointing gives."""
    config = tm.MoEConfig(6, 5, 6, 2, shared_intermediate_size=4)

    def on_rank(transport: Transport) -> None:
        results = []
        for overlap in (tm.OverlapConfig(2), tm.OverlapConfig(2, capacity=capacity)):
            layer = tm.MoELayer(config, transport, overlap, generator=torch.Generator().manual_seed(0))
            x = torch.randn(9, 6, generator=torch.Generator().manual_seed(transport.rank)).requires_grad_()
            if overlap.capacity is None:
                y = layer(x)
            else:
                y = checkpoint(layer, x, use_reentrant=use_reentrant)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        assert layer.last_report.overflowed == (capacity == TIGHT)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


@pytest.mark.parametrize("capacity", [ROOMY, TIGHT])
@pytest.mark.parametrize("ids", [torch.zeros(0, 2, dtype=torch.int64), torch.full((5, 2), -1)], ids=["none", "skipped"])
def test_no_rank_has_a_pair(ids: Tensor, capacity: float) -> None:
    def on_rank(transport: Transport) -> None:
        leaves = {name: value.requires_grad_() for name, value in Batch(2, 6, 2).of_rank(transport.rank).items()}
        leaves |= {"x": torch.ones(len(ids), 6, dtype=torch.float64), "topk_weights": torch.ones(len(ids), 2)}
        leaves["x"].requires_grad_()
        out = tm.expert_parallel_mlp(
            topk_ids=ids, num_experts=6, transport=transport, overlap=tm.OverlapConfig(2, capacity=capacity), **leaves
        )
        out.sum().backward()
        assert out.shape == (len(ids), 6)
        assert not out.any()
        assert not any(leaf.grad.any() for leaf in leaves.values() if leaf.requires_grad)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_narrow_wire() -> None:
    batch = Batch(3, 6, 2, torch.float32)
    overlap = tm.OverlapConfig(2, wire_dtype=torch.bfloat16)
    expected = batch.in_parallel(overlap)
    for capacity in (ROOMY, TIGHT):
        assert_same_bits(batch.in_parallel(replace(overlap, capacity=capacity)), expected)


def test_refused() -> None:
    for wrong in (0, -1.0, math.inf, math.nan, True, "2"):
        with pytest.raises(ValueError, match="capacity must be None or a number"):
            tm.OverlapConfig(2, capacity=wrong)
    for make in (tm.OverlapConfig, tm.OverlapPlan):
        with pytest.raises(ValueError, match="Use chunk_by='tokens', or leave capacity out"):
            make(chunk_by="experts", capacity=2.0)

    def on_rank(world: Transport) -> None:
        world.exchange = None  # type: ignore[assignment]
        batch = Batch(4, 12, 2)
        with pytest.raises(ValueError, match="capacity needs a transport of one level"):
            batch.call(TwoLevelTransport(world, 2), batch.of_rank(world.rank), tm.OverlapConfig(2, capacity=2.0))

    tm.run_on_emulated_ranks(on_rank, 4, timeout_s=20)


@pytest.mark.usefixtures("nan_filled_memory")
def test_a_callable_with_a_parameter_sees_no_padding() -> None:
    batch = Batch(2, 6, 2, torch.float32, device=KERNEL_DEVICE)

    def on_rank(transport: Transport) -> None:
        grads = []
        for capacity in (None, ROOMY):
            scale = torch.ones(5, requires_grad=True, device=KERNEL_DEVICE)
            leaves = batch.of_rank(transport.rank)
            out = batch.call(
                transport,
                leaves,
                tm.OverlapConfig(2, capacity=capacity),
                backend="triton",
                activation=lambda h, scale=scale: scale * (h[:, :5] + 1) * h[:, 5:],
            )
            grads += torch.autograd.grad(out, scale, batch.tokens["dout"][transport.rank])
        assert grads[0].any()
        torch.testing.assert_close(grads[1], grads[0])

    tm.run_on_emulated_ranks(on_rank, 2, device=KERNEL_DEVICE, timeout_s=120)
