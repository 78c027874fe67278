"""Chunks of experts: rows travel once, with the first chunk that needs them, and results equal one device."""

import itertools
from dataclasses import replace

import pytest
import torch
from batches import CALLABLES, KERNEL_DEVICE, Batch, assert_equals_one_device
from hypothesis import given, settings
from same_bits import assert_same_bits
from test_dispatch import as_ids, header, routings, row_splits_sent, s_ik
from test_grouping import check_order
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.overlap import OverlapPlan, equal_sizes
from tritonmoe.dispatch.count_exchange import check_counts
from tritonmoe.dispatch.expert_chunks import RowPlaces, place_rows
from tritonmoe.dispatch.plan import DispatchPlan, exchange_plan
from tritonmoe.dispatch.send_plan import plan_tokens
from tritonmoe.expert_parallel.plans.plain import group_received
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import torch as torch_backend
from tritonmoe.ops.grouping import Grouping
from tritonmoe.overlap.schedule import build_backward, build_forward
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import simulate, simulate_layer
from tritonmoe.overlap.tuning.tuner import SETTLING_CALLS
from tritonmoe.transports import Delay, Transport, TwoLevelTransport

both_ways = pytest.mark.parametrize("local_first", [True, False], ids=["local_first", "all_travel"])


def by_experts(num_chunks: int, local_first: bool = True, **others) -> tm.OverlapConfig:
    return tm.OverlapConfig(num_chunks, local_first, chunk_by="experts", **others)


class Meaning:
    """What a plan of one rank's tokens should say, pair by pair."""

    def __init__(self, ids: list[list[int]], num_experts: int, rank: int, size: int, overlap: OverlapPlan) -> None:
        local = num_experts // size
        bounds = overlap.bounds(local)

        def segment(token: int, expert: int) -> int:
            if overlap.local_first and expert // local == rank:
                return int(token >= len(ids) * overlap.local_start // 16)
            chunk = next(c for c in range(overlap.num_chunks) if bounds[c] <= expert % local < bounds[c + 1])
            return chunk + overlap.num_local_slices

        self.pairs = [(segment(t, e), e // local) for t, row in enumerate(ids) for e in row if 0 <= e < num_experts]
        segments = {
            (k, t): [segment(t, e) for e in ids[t] if 0 <= e < num_experts and e // local == k]
            for k, tokens in enumerate(s_ik(ids, num_experts, size))
            for t in tokens
        }
        self.sent = sorted((min(of), k, t) for (k, t), of in segments.items())
        self.returned = sorted((max(of), k, t) for (k, t), of in segments.items())

    def counts(self, of: list[tuple], num_segments: int, size: int) -> list[list[int]]:
        return [[sum(entry[:2] == (s, k) for entry in of) for k in range(size)] for s in range(num_segments)]


@settings(max_examples=100, deadline=None)
@given(drawn=routings())
def test_tokens_of_any_routing(drawn) -> None:
    ids, num_experts, size, top_k, overlap = drawn
    overlap = replace(overlap, chunk_by="experts")
    for rank, rows in enumerate(ids):
        plan = plan_tokens(as_ids(rows, top_k), num_experts, rank, size, overlap)
        meaning = Meaning(rows, num_experts, rank, size, overlap)
        assert list(zip(plan.home_ranks.tolist(), plan.home_tokens.tolist(), strict=True)) == [
            (k, t) for _, k, t in meaning.sent
        ]
        places = {(k, t): n for n, (_, k, t) in enumerate(meaning.returned)}
        of_tokens = [[places[k, t] for k in range(size) if (k, t) in places] for t in range(len(rows))]
        assert plan.home_index.shape == (len(rows), min(size, top_k))
        assert [[place for place in row if place >= 0] for row in plan.home_index.tolist()] == of_tokens
        for counts, of in (
            (plan.rows, meaning.sent),
            (plan.return_rows, meaning.returned),
            (plan.pairs, meaning.pairs),
        ):
            assert counts == meaning.counts(of, overlap.num_segments, size)
        assert plan.token_bounds == (0,) * overlap.num_chunks + (len(rows),)


@settings(max_examples=25, deadline=None)
@given(drawn=routings())
def test_plans_of_any_routing(drawn) -> None:
    """Both ends of every exchange, there and back, expect the same rows; whole-layer exchanges find their places."""
    ids, num_experts, size, top_k, overlap = drawn
    overlap = replace(overlap, chunk_by="experts")
    local = num_experts // size

    def on_rank(transport: Transport) -> DispatchPlan:
        tokens = plan_tokens(as_ids(ids[transport.rank], top_k), num_experts, transport.rank, size, overlap)
        return exchange_plan(transport, header(overlap, num_experts, top_k), tokens, overlap)

    plans = tm.run_on_emulated_ranks(on_rank, size, timeout_s=10)
    meanings = [Meaning(rows, num_experts, rank, size, overlap) for rank, rows in enumerate(ids)]
    for k, plan in enumerate(plans):
        for c in range(overlap.num_chunks):
            segment = plan.segment(c)
            assert plan.receive_rows[segment] == [plans[i].tokens.rows[segment][k] for i in range(size)]
            assert plan.return_rows[segment] == [plans[i].tokens.return_rows[segment][k] for i in range(size)]
            for rows, splits in (
                (plan.send_slice(c), plan.tokens.rows),
                (plan.receive_slice(c), plan.receive_rows),
                (plan.return_slice(c), plan.return_rows),
                (plan.home_slice(c), plan.tokens.return_rows),
            ):
                assert rows.stop - rows.start == sum(splits[segment])
        assert sum(map(sum, plan.return_rows)) == plan.num_received
        sent = [entry[1:] for entry in meanings[k].sent]
        assert [sent[n] for n in plan.send_order().tolist()] == sorted(sent[plan.num_local :])
        # What comes, by (rank, token), then by segment.
        arrived = [(i, t) for i in range(size) for _, to, t in sorted(meanings[i].sent, key=lambda e: e[2]) if to == k]
        arrived = [(i, t) for i, t in arrived if not (overlap.local_first and i == k)]
        rows = [[e if e // local == k else -1 for e in ids[i][t]] for i, t in arrived]
        places = plan.place_received(as_ids(rows, top_k))
        for order, name in zip(places, ("sent", "returned"), strict=True):
            stored = [entry[1:] for entry in rows_of(name, meanings, k)]
            assert [stored[n] for n in order.tolist()] == arrived
        # Gradients of topk_weights leave by (rank, chunk of return, token), and every rank expects them so.
        returned = rows_of("returned", meanings, k)
        leave = [returned[n] for n in plan.return_order().tolist()]
        assert leave == sorted(returned[plan.num_local :], key=lambda entry: (entry[1], entry))
        come = [meanings[k].returned[n] for n in plan.home_order().tolist()]
        assert come == sorted(meanings[k].returned[plan.num_local :], key=lambda entry: (entry[1], entry))
        check_grouping(plan, places, ids, k, local, top_k, meanings)


def rows_of(name: str, meanings: list[Meaning], rank: int) -> list[tuple[int, int, int]]:
    """(segment, source, token) of the rows that are "sent" to `rank`, or "returned" by it, as they are stored there."""
    return sorted((s, i, t) for i, meaning in enumerate(meanings) for s, to, t in getattr(meaning, name) if to == rank)


def check_grouping(
    plan: DispatchPlan,
    places: RowPlaces,
    ids: list[list[list[int]]],
    rank: int,
    local: int,
    top_k: int,
    meanings: list[Meaning],
) -> None:
    """Check the grouping of a rank's received rows: chunks, source order, and the way to the rows that return."""
    overlap = plan.overlap
    received, returned = ([entry[1:] for entry in rows_of(name, meanings, rank)] for name in ("sent", "returned"))
    local_ids = [[e - rank * local for e in ids[i][t]] for i, t in received]
    grouping = group_of(torch_backend, plan, places, as_ids(local_ids, top_k), local)
    bounds = overlap.bounds(local)

    def key(pair: int) -> tuple:
        row, expert = pair // top_k, local_ids[pair // top_k][pair % top_k]
        if row < plan.num_local:
            chunk = int(row >= plan.receive_offsets[1])
        else:
            chunk = overlap.num_local_slices + next(c for c in range(overlap.num_chunks) if expert < bounds[c + 1])
        return chunk, expert, *received[row], pair % top_k

    pairs = [p for p in range(len(received) * top_k) if 0 <= local_ids[p // top_k][p % top_k] < local]
    stored = sorted(pairs, key=key)
    assert grouping.pair_index.tolist() == stored
    order = range(len(stored)) if grouping.source_order is None else grouping.source_order.tolist()
    assert [stored[n] for n in order] == sorted(pairs, key=lambda p: key(p)[1:])
    returned_rows = range(len(received)) if grouping.returned_rows is None else grouping.returned_rows.tolist()
    assert list(returned_rows) == [received.index(row) for row in returned]
    assert (grouping.returned_rows is None) == (top_k == 1)
    for c in range(overlap.num_segments):
        chunk, first = grouping.chunk(c), grouping.chunk_pair_offsets[c]
        assert chunk.pair_index.tolist() == [p for p in stored if key(p)[0] == c]
        experts = [key(p)[1] for p in chunk.pair_index.tolist()]
        assert chunk.expert_offsets.tolist() == [sum(e < limit for e in experts) for limit in range(local + 1)]
        start = first if c < overlap.num_local_slices else grouping.chunk_pair_offsets[overlap.num_local_slices]
        for row, positions in zip(
            returned[slice(*plan.return_offsets[c : c + 2])], chunk.inverse.tolist(), strict=True
        ):
            for slot, position in enumerate(positions):
                pair = received.index(row) * top_k + slot
                assert position == (stored.index(pair) - start if pair in pairs else -1)
                assert position < first + chunk.num_pairs - start  # of no later chunk


def group_of(backend, plan: DispatchPlan, places: RowPlaces, local_ids: Tensor, num_experts: int) -> Grouping:
    class Settings:
        ops = backend

    return group_received(Settings, plan, places, local_ids, num_experts)


def test_worked_example() -> None:
    """The one in the docstring of dispatch/expert_chunks.py."""
    ids = torch.tensor([[1, -1], [0, -1], [0, 1], [1, 7]])
    received, returned = place_rows(ids, 2, OverlapPlan((1, 1)))
    assert received.argsort().tolist() == [1, 2, 0, 3]
    assert returned.argsort().tolist() == [1, 0, 2, 3]


def test_the_example_of_a_grouping_in_chunks_of_experts() -> None:
    places = torch.tensor([1, 0])
    whole = reference.group(torch.tensor([[1], [0]]), 2)
    check_order(torch.tensor([[1], [0]]), 2, whole)
    grouping = whole.in_expert_chunks((0, 1, 2), (0, 1, 2), (0, 1, 2), places, places)
    assert whole.pair_index.tolist() == [1, 0]
    assert grouping.pair_index.tolist() == [0, 1]
    assert grouping.chunk_expert_offsets.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert grouping.inverse.tolist() == [[0], [1]]


def test_counts_that_contradict_each_other() -> None:
    """Two chunks, two rows of rank 0 that both return with the second; K = 2."""
    rows_in_all = torch.tensor([[2]])
    check_counts([[2], [0]], [[2], [2]], [[0], [2]], rows_in_all, torch.tensor([[4]]), 2, 0)
    for rows, pairs, back, pairs_in_all in (
        ([2, 0], [2, 2], [0, 1], 4),  # one never returns
        ([2, 0], [5, 2], [0, 2], 7),  # more pairs than rows have slots
        ([1, 1], [2, 2], [2, 0], 4),  # returned before it has come
        ([2, 0], [2, 1], [0, 2], 3),  # returns with a chunk that has nothing of it
        ([0, 2], [2, 2], [0, 2], 4),  # pairs without rows
        ([2, 0], [2, 2], [0, 2], 3),  # a pair more than in all
    ):
        totals = rows_in_all, torch.tensor([[pairs_in_all]])
        with pytest.raises(tm.CountMismatch, match="contradict each other"):
            check_counts(*([[n] for n in counts] for counts in (rows, pairs, back)), *totals, 2, 0)


CASES = [(1, 6, 2), (2, 6, 1), (2, 60, 8), (3, 6, 2), (3, 60, 1), (4, 8, 8)]


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("num_ranks", "num_experts", "top_k"), CASES, ids=lambda n: str(n))
def test_equals_one_device(num_ranks: int, num_experts: int, top_k: int) -> None:
    """Uneven T, an empty rank, a hot expert, skipped and repeated ids; the overlapped schedule has the serial bits."""
    batch = Batch(num_ranks, num_experts, top_k)
    expected = batch.on_one_device()
    for num_chunks, local_first in itertools.product((1, 2, 3, 5), (True, False)):
        overlapped = batch.in_parallel(by_experts(num_chunks, local_first))
        assert_equals_one_device(overlapped, expected, (num_chunks, local_first))
        serial = batch.in_parallel(by_experts(num_chunks, local_first, serial=True))
        assert_same_bits(overlapped, serial, (num_chunks, local_first))


PLANS = {
    "ramp": OverlapPlan((1, 2, 1), chunk_by="experts"),
    "windowed": OverlapPlan((1, 2, 5), local_start=16, window=2, backward_window=1, chunk_by="experts"),
    "all-travel-windowed": OverlapPlan((3, 1, 2), False, window=1, backward_window=1, chunk_by="experts"),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_unequal_chunks_local_slices_and_windows(backend: str, plan: str) -> None:
    batch = Batch(3, 12, 3)
    overlapped = batch.in_parallel(PLANS[plan], backend=backend)
    assert_equals_one_device(overlapped, batch.on_one_device())
    assert_same_bits(overlapped, batch.in_parallel(replace(PLANS[plan], serial=True), backend=backend))


@both_ways
def test_blocks_of_few_pairs(local_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend takes a chunk block by block."""
    monkeypatch.setattr(torch_backend, "MAX_BLOCK_PAIRS", 3)
    batch = Batch(2, 8, 4, options={"save": "input"})
    actual = batch.in_parallel(by_experts(2, local_first), backend="torch")
    assert_equals_one_device(actual, batch.on_one_device())


@pytest.mark.parametrize("activation", CALLABLES)
@both_ways
def test_callables(activation: str, local_first: bool) -> None:
    batch = Batch(2, 6, 3, options={"activation": CALLABLES[activation]})
    assert_equals_one_device(batch.in_parallel(by_experts(3, local_first)), batch.on_one_device())


def test_late_ranks_keep_the_bits() -> None:
    """Three steps with buffers used again, each rank late at other exchanges, on a link with latency."""
    batch = Batch(3, 6, 2, torch.float32)
    faults = [
        Delay(rank, exchange, 0.01 * (1 + (rank + exchange) % 3))
        for rank in range(3)
        for exchange in range(rank, 48, 5)
    ]
    link = tm.LinkModel(0.0001, latency_us=500)
    actual = batch.in_parallel(by_experts(3), faults=tuple(faults), link=link, num_calls=3)
    assert_same_bits(actual, batch.in_parallel(by_experts(3)))


@both_ways
@pytest.mark.usefixtures("nan_filled_memory")
def test_memory_is_never_read_before_it_is_written(local_first: bool) -> None:
    """torch.empty gives NaN; all pairs of some chunks are skipped."""
    batch = Batch(3, 6, 2)
    batch.ids[0][2:5] = -1
    expected = batch.on_one_device()
    for backend in ("torch", "reference"):
        assert_equals_one_device(batch.in_parallel(by_experts(5, local_first), backend=backend), expected)


def test_bits_of_the_kernels_do_not_depend_on_the_chunks() -> None:
    """Outputs and all gradients, weights' included, are those of one chunk of tokens."""
    batch = Batch(2, 6, 2, torch.float32, device=KERNEL_DEVICE)
    expected = batch.in_parallel(tm.OverlapConfig(1), backend="triton")
    for num_chunks, local_first in ((2, True), (3, False)):
        actual = batch.in_parallel(by_experts(num_chunks, local_first), backend="triton")
        assert_same_bits(actual, expected, (num_chunks, local_first))


@both_ways
def test_a_row_travels_once_there_and_once_back(local_first: bool) -> None:
    """Rows of D columns that leave each rank, exchange by exchange; chunks are {0, 2}, {1, 3}."""
    _, sent = row_splits_sent(by_experts(2, local_first))
    traffic = torch.tensor([[2, 2], [1, 0]])
    if local_first:
        traffic.fill_diagonal_(0)
    for rank in range(2):
        there, back, nothing = traffic[rank].tolist(), traffic[:, rank].tolist(), [0, 0]
        # Every row needs both chunks of a rank: it leaves with chunk 0 and returns with chunk 1, in both passes.
        assert sent[rank] == [there, nothing, nothing, back] * 2


def test_wires_and_placements() -> None:
    """What rows travel as, and where experts are, is not a matter of chunks."""
    batch = Batch(2, 6, 3, torch.float32)
    for wire_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        tokens = batch.in_parallel(tm.OverlapConfig(1, wire_dtype=wire_dtype), backend="reference")
        experts = batch.in_parallel(by_experts(3, wire_dtype=wire_dtype), backend="reference")
        assert_equals_one_device(experts, tokens, wire_dtype)
    placement = tm.ExpertPlacement(((0, 4, 1), (4, 5, 2), (3, 4, 0)))
    replicated = Batch(3, 6, 2)
    expected = replicated.on_one_device()

    def on_rank(transport: Transport) -> None:
        held = list(placement.experts_of_rank[transport.rank])
        leaves = {name: replicated.tokens[name][transport.rank].clone() for name in ("x", "topk_weights")}
        leaves |= {name: value[held].clone() for name, value in replicated.weights.items()}
        leaves = {name: value.requires_grad_() for name, value in leaves.items()}
        out = replicated.call(transport, leaves, by_experts(2), placement=placement)
        grads = torch.autograd.grad(out, list(leaves.values()), replicated.tokens["dout"][transport.rank])
        for name, grad in list(zip(leaves, grads, strict=True))[2:]:
            torch.testing.assert_close(grad, expected[name][held], rtol=1e-9, atol=1e-9, msg=name)

    tm.run_on_emulated_ranks(on_rank, 3, timeout_s=20)


def test_what_is_refused() -> None:
    for make in (tm.OverlapConfig, OverlapPlan):
        with pytest.raises(ValueError, match=r"chunk_by must be 'tokens'.*'experts'.*, got 'rows'"):
            make(chunk_by="rows")
    with pytest.raises(ValueError, match="memory_budget_bytes needs chunks of tokens"):
        tm.OverlapConfig(memory_budget_bytes=1000, chunk_by="experts")
    batch = Batch(4, 8, 2)

    def on_rank(world: Transport) -> None:
        for overlap in (by_experts(2), OverlapPlan((1, 1), chunk_by="experts")):
            with pytest.raises(ValueError, match="chunk_by='experts' needs a transport of one level"):
                batch.call(TwoLevelTransport(world, 2), batch.of_rank(world.rank), overlap)

    tm.run_on_emulated_ranks(on_rank, 4, timeout_s=10)


@pytest.mark.parametrize("plan", [OverlapPlan((1, 2, 1), window=2), OverlapPlan((1, 1), False, serial=True)], ids=str)
def test_the_schedule_is_that_of_chunks_of_tokens(plan: OverlapPlan) -> None:
    """What differs is how many rows an exchange has; with the last chunk, all sums at home are whole."""
    by_expert = replace(plan, chunk_by="experts")
    assert build_forward(by_expert) == build_forward(plan)
    backwards = [build_backward(p, needs_x=True, needs_topk_weights=True) for p in (plan, by_expert)]
    assert backwards[0] == backwards[1]


def test_the_simulator_by_hand() -> None:
    """12 rows of 2 pairs each: 9 leave with the first of two chunks, 9 return with the last."""
    traffic = torch.full((2, 2), 12.0).fill_diagonal_(0)
    layer, costs = LayerWork.of(traffic, 2.0, row_bytes=1, top_k=0), StepCosts({}, {"experts": 1.0})
    link = LinkCosts(0.0, 1.0)
    plan = OverlapPlan((1, 1), local_start=16, chunk_by="experts")
    assert layer.shares(plan) == ([0.75, 0.25], [0.25, 0.75])
    assert simulate(build_forward(plan), plan, layer, costs, link).total_s == 9 + 12 + 12 + 9
    tokens = replace(plan, chunk_by="tokens")
    assert simulate(build_forward(tokens), tokens, layer, costs, link).total_s == 6 + 12 + 12 + 6
    # One pair a row: every row has one chunk, as with tokens. A row of many: all in the first, all in the last.
    assert replace(layer, pairs=layer.rows).shares(plan) == ([0.5, 0.5], [0.5, 0.5])
    assert replace(layer, pairs=50 * layer.rows).shares(plan)[0] == pytest.approx([1, 0])
    assert LayerWork.of(0 * traffic, 2.0, 1, 0).shares(plan) == ([0.5, 0.5], [0.5, 0.5])
    forward, backward = simulate_layer(plan, layer, costs, link, backward=True)
    assert forward.total_s == 42
    assert backward.total_s > 0


@pytest.mark.thorough
@pytest.mark.parametrize("chunk_by", ["experts", "auto"])
def test_auto_chooses_the_number_of_chunks(chunk_by: str) -> None:
    config = tm.MoEConfig(8, 4, 8, 2)

    def on_rank(transport: Transport) -> list[OverlapPlan]:
        experts = tm.GroupedExperts(config, transport, tm.OverlapConfig(chunk_by=chunk_by))
        plans = []
        for call in range(SETTLING_CALLS + 2):
            generator = torch.Generator().manual_seed(2 * call + transport.rank)
            x = torch.randn(16, 8, generator=generator, requires_grad=True)
            weights, ids = torch.randn(16, 8, generator=generator).softmax(1).topk(2)
            experts(x, ids, weights).sum().backward()
            plans.append(experts.last_report.overlap)
        return plans

    first, second = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert first == second
    assert {plan.chunk_by for plan in first} == ({"experts"} if chunk_by == "experts" else {"tokens", "experts"})
    assert len(set(first[SETTLING_CALLS:])) == 1


def test_a_given_number_of_chunks_means_tokens() -> None:
    batch = Batch(2, 6, 2, torch.float32)
    actual = batch.in_parallel(tm.OverlapConfig(3), backend="torch")
    assert_same_bits(actual, batch.in_parallel(OverlapPlan(equal_sizes(3), chunk_by="tokens"), backend="torch"))
