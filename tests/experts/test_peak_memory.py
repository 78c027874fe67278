"""What peak_bytes says before a call, against the storages that the call really holds."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batches import capped_traffic
from held_storages import HeldStorages, keep_what_is_sent, recycle_nothing

import tritonmoe as tm
from tritonmoe.config.overlap import MAX_CHUNKS, equal_sizes, ramp_sizes
from tritonmoe.expert_parallel import run_call
from tritonmoe.expert_parallel.call import listeners
from tritonmoe.ops.backends import triton as triton_backend
from tritonmoe.ops.backends.torch import MAX_BLOCK_PAIRS
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.ops.kernels.tiles.config import GATHERS
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.simulation.cost_model import LayerWork
from tritonmoe.overlap.simulation.memory import BufferWidths, WorkingSet, peak_bytes
from tritonmoe.overlap.tuning.measured_calls import layer_work
from tritonmoe.transports import Transport
from tritonmoe.transports.wire import WireFormat

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, SIZE = 64, 48, 8, 3, 4
NUM_TOKENS = (640, 800, 0, 480)
BOUND = 0.10
"""Chunks have their share of the rows only in the mean, and of index arithmetic only the lasting part is counted."""


@pytest.fixture(autouse=True)
def no_memory_is_recycled(monkeypatch: pytest.MonkeyPatch) -> None:
    recycle_nothing(monkeypatch)


class Batch:
    """Every rank's tokens, uneven, one rank without; what they send and compute is known before any call."""

    def __init__(self, dtype: torch.dtype, hot: float = 0.0, num_tokens: Sequence[int] = NUM_TOKENS) -> None:
        """hot: how much higher the scores of expert 0 are."""
        generator = torch.Generator().manual_seed(0)
        self.x = [torch.randn(t, HIDDEN, generator=generator).to(dtype) for t in num_tokens]
        is_hot = torch.arange(NUM_EXPERTS) == 0
        top = [(torch.rand(t, NUM_EXPERTS, generator=generator) + hot * is_hot).topk(TOP_K) for t in num_tokens]
        self.topk_weights, self.topk_ids = ([part.contiguous() for part in parts] for parts in zip(*top, strict=True))
        local = NUM_EXPERTS // SIZE
        self.weights = [
            (torch.rand(local, 2 * INTERMEDIATE, HIDDEN).to(dtype), torch.rand(local, HIDDEN, INTERMEDIATE).to(dtype))
            for _ in range(SIZE)
        ]
        pairs = torch.stack([F.one_hot(ids // local, SIZE).sum((0, 1)) for ids in self.topk_ids])
        rows = torch.stack([F.one_hot(ids // local, SIZE).amax(1).sum(0) for ids in self.topk_ids])
        self.work = LayerWork(rows.double(), pairs.double(), HIDDEN * dtype.itemsize, TOP_K)

    def work_of(self, plan: tm.OverlapPlan, save: str) -> LayerWork:
        """Return what all ranks do in a call, copies included."""
        reports: list[LayerReport] = []

        class Collect:
            def before_forward(self, *_: object) -> None: ...
            def after_backward(self, *_: object) -> None: ...
            def after_forward(self, of: Transport, header: object, report: LayerReport, grouping: object) -> None:
                reports.append(report)

        listeners.append(Collect())
        try:
            self.measure(plan, save)
        finally:
            listeners.pop()
        return layer_work(reports[0])

    def measure(self, plan: tm.OverlapPlan, save: str) -> tuple[int, ...]:
        """Return the most bytes that a layer call holds on any rank in its forward and, with gradients, backward."""

        def on_rank(transport: Transport) -> tuple[int, ...]:
            rank = transport.rank
            keep_what_is_sent(transport)
            leaves = [t.clone().requires_grad_() for t in (self.x[rank], self.topk_weights[rank], *self.weights[rank])]
            x, topk_weights, *weights = leaves
            with HeldStorages() as forward:
                y = tm.expert_parallel_mlp(
                    x,
                    self.topk_ids[rank],
                    topk_weights,
                    *weights,
                    num_experts=NUM_EXPERTS,
                    transport=transport,
                    overlap=plan,
                    backend="torch",
                    save=save,
                )
            if not y.requires_grad:
                return (forward.peak([y]),)
            kept = forward.held_now([y])  # all through backward
            dout = torch.ones_like(y)
            with HeldStorages() as backward:
                grads = torch.autograd.grad(y, leaves, dout)
            return forward.peak([y]), kept + backward.peak(grads)

        return tuple(map(max, zip(*tm.run_on_emulated_ranks(on_rank, SIZE, timeout_s=30), strict=True)))


def widths(dtype: torch.dtype, **options: Any) -> BufferWidths:
    return BufferWidths(
        HIDDEN,
        INTERMEDIATE,
        NUM_EXPERTS // SIZE,
        dtype.itemsize,
        working_set=WorkingSet(max_block_pairs=MAX_BLOCK_PAIRS),
        **options,
    )


PLANS = {
    "equal": lambda c: tm.OverlapPlan(equal_sizes(c)),
    "window-of-one": lambda c: tm.OverlapPlan(equal_sizes(c), window=1, backward_window=1),
    "ramp-all-travel": lambda c: tm.OverlapPlan(ramp_sizes(c), local_first=False),
    "serial": lambda c: tm.OverlapPlan(equal_sizes(c), serial=True),
    "experts": lambda c: tm.OverlapPlan(equal_sizes(c), chunk_by="experts"),
    "experts-all-travel": lambda c: tm.OverlapPlan(equal_sizes(c), local_first=False, chunk_by="experts"),
    "bf16-wire": lambda c: tm.OverlapPlan(equal_sizes(c), wire_dtype=torch.bfloat16),
    "capacity": lambda c: tm.OverlapPlan(equal_sizes(c), capacity=1.3),
    "capacity-all-travel": lambda c: tm.OverlapPlan(equal_sizes(c), local_first=False, capacity=1.3),
}

HIDDEN_KEPT = tuple((num_chunks, "hidden") for num_chunks in (1, 2, 4, 8))
CASES = dict.fromkeys(PLANS, ((4, "hidden"), (2, "input"))) | {"equal": HIDDEN_KEPT, "ramp-all-travel": HIDDEN_KEPT}
CASES |= dict.fromkeys(("experts", "experts-all-travel"), ((1, "hidden"), (2, "hidden"), (2, "input")))
"""No more chunks of experts than a rank has experts."""


@pytest.mark.parametrize("plan", PLANS)
def test_said_before_is_what_is_held(plan: str) -> None:
    batch = Batch(torch.float32)
    for num_chunks, save in CASES[plan]:
        overlap = PLANS[plan](num_chunks)
        wire = WireFormat(torch.float32, overlap.wire_dtype).row_bytes(HIDDEN)
        work = replace(batch.work, row_bytes=wire)
        if overlap.capacity is not None:
            # This backend keeps the pairs that are there, in the room for all rows.
            room, _ = capped_traffic(NUM_TOKENS, NUM_EXPERTS, TOP_K, overlap)
            work = replace(work, rows=room.double())
            assert (room >= batch.work.rows).all()
        said = peak_bytes(overlap, work, widths(torch.float32, save=save))
        for name, measured, expected in zip(said._fields, batch.measure(overlap, save), said, strict=True):
            assert abs(expected / measured - 1) < BOUND, (num_chunks, save, name, measured, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("save", ["hidden", "input"])
def test_copies_of_hot_experts_are_counted(save: str) -> None:
    """Their weights, which with save="input" travel twice, and the gradients of these."""
    batch = Batch(torch.float32, hot=0.6, num_tokens=(48, 60, 0, 36))
    for num_chunks in (1, 4):
        overlap = tm.OverlapPlan(equal_sizes(num_chunks), balance="always")
        work = batch.work_of(overlap, save)
        assert work.copies is not None
        assert work.copies.copied.sum() >= 2
        said = peak_bytes(overlap, work, widths(torch.float32, save=save))
        without = peak_bytes(overlap, replace(work, copies=None), widths(torch.float32, save=save))
        measured = batch.measure(overlap, save)
        for name, held, expected, less in zip(said._fields, measured, said, without, strict=True):
            assert abs(expected / held - 1) < BOUND, (num_chunks, name, held, expected)
            assert expected > (1 + 2 * BOUND) * less, (num_chunks, name, held, expected, less)


def test_a_call_that_overflows_lets_its_first_run_go() -> None:
    """It holds what the second run does, though the first has kept as much for a backward by then."""
    batch, overlap = Batch(torch.float32), tm.OverlapPlan(equal_sizes(4), capacity=0.9)
    said = peak_bytes(replace(overlap, capacity=None), batch.work, widths(torch.float32))
    for name, measured, expected in zip(said._fields, batch.measure(overlap, "hidden"), said, strict=True):
        assert abs(expected / measured - 1) < BOUND, (name, measured, expected)


def test_worked_example() -> None:
    """W=2, K=1, 8 rows each way, none local, D=F=1 in two bytes, a chunk at a time: by hand, in bytes."""
    work = LayerWork.of(torch.tensor([[0, 8], [8, 0]]), 1.0, row_bytes=2, top_k=1)
    overlap = tm.OverlapPlan((1, 1), local_first=False, window=1, backward_window=1)
    said = peak_bytes(overlap, work, BufferWidths(1, 1, num_local_experts=1, dtype_bytes=2, gated=False))
    lasting = 8 * 2 + 8 * 2 + 8 * 8 + 8 * 16 + 8 * 4 + 8 * 2  # rows, home, ids and weights, grouping, weights, h
    last_experts = 4 * 2 + 4 * 2 + 4 * 2 + 4 * 2  # chunk 0's sums under way, chunk 1's; a and y of four pairs
    assert said.forward == lasting + last_experts
    kept = 8 * (2 + 4) + 8 * 16 + 8 * 2  # rows and weights, grouping, h
    gradients = 8 * (2 + 4) + 8 * 2 + 8 * (2 + 2)  # dout and dweights, home, dh and s*a
    assert said.backward == kept + gradients + 4 * 2 + 8 * 4 * 3  # one chunk of sums; dtopk_weights, sent and home


@pytest.mark.parametrize("chunk_by", ["tokens", "experts"])
@pytest.mark.parametrize("save", ["hidden", "input"])
def test_rows_that_up_copies_are_counted(save: str, chunk_by: str) -> None:
    """Where results have memory before their experts run: elsewhere it is taken once the copy is gone."""
    work = LayerWork.of(torch.tensor([[0, 8], [8, 0]]), 1.0, row_bytes=128, top_k=1)
    plan = tm.OverlapPlan((1, 1), local_first=False, window=1, backward_window=1, chunk_by=chunk_by)
    for way in GATHERS:
        with measured_tiles.using({"of some product": {"gather": way}}):
            assert triton_backend.copies_rows() == (way == "copy")
    plain = BufferWidths(64, 1, num_local_experts=2, dtype_bytes=2, gated=False, save=save)
    without, copying = (
        peak_bytes(plan, work, replace(plain, working_set=WorkingSet(copies_rows=copies))) for copies in (False, True)
    )
    copy = 4 * 128 if chunk_by == "experts" else 0  # of a chunk's four pairs
    assert copying.forward == without.forward + copy
    assert copying.backward == without.backward + (copy if save == "input" else 0)  # h once more


def test_inference_holds_less() -> None:
    batch, overlap = Batch(torch.float32), tm.OverlapPlan(equal_sizes(4))
    said = peak_bytes(overlap, batch.work, widths(torch.float32, has_backward=False))
    with torch.no_grad():
        (measured,) = batch.measure(overlap, "hidden")
    assert said.backward == 0
    assert abs(said.forward / measured - 1) < BOUND, (measured, said)


@pytest.mark.parametrize("capacity", [None, 1.3])
def test_a_layer_stays_within_its_budget(capacity: float | None) -> None:
    """The second call knows the rows of the first, and the result is that of no budget.

    With a capacity the first call, in small chunks, overflows.
    """
    batch = Batch(torch.float32)
    work = batch.work
    if capacity is not None:
        rows, pairs = capped_traffic(NUM_TOKENS, NUM_EXPERTS, TOP_K, tm.OverlapPlan(capacity=capacity))
        work = replace(work, rows=rows.double(), pairs=pairs.double())
    one, many = (
        peak_bytes(tm.OverlapPlan(equal_sizes(c), window=2, backward_window=2), work, widths(torch.float32)).most
        for c in (1, 8)
    )
    budget = (one + many) // 2

    def on_rank(transport: Transport) -> tuple[int, str]:
        layers = [
            tm.GroupedExperts(
                tm.MoEConfig(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K),
                transport,
                overlap,
                generator=torch.Generator().manual_seed(0),
            )
            for overlap in (tm.OverlapConfig(1), tm.OverlapConfig(memory_budget_bytes=budget, capacity=capacity))
        ]
        arguments = (part[transport.rank] for part in (batch.x, batch.topk_ids, batch.topk_weights))
        x, topk_ids, topk_weights = arguments
        expected, y = (layer(x, topk_ids, topk_weights) for layer in layers)
        torch.testing.assert_close(y, expected)
        assert layers[1].last_report.num_chunks == MAX_CHUNKS
        assert layers[1].last_report.overflowed == (capacity is not None)
        torch.testing.assert_close(layers[1](x, topk_ids, topk_weights), expected)
        assert not layers[1].last_report.overflowed
        return layers[1].last_report.overlap, layers[1].last_report.choice

    (plan, choice), *others = tm.run_on_emulated_ranks(on_rank, SIZE, timeout_s=20)
    assert all(other == (plan, choice) for other in others)
    assert 1 < plan.num_chunks < MAX_CHUNKS
    assert f"fewest chunks within memory_budget_bytes = {budget}" in choice
    assert max(batch.measure(plan, "hidden")) < (1 + BOUND) * budget


@pytest.mark.thorough
@pytest.mark.parametrize("differs", ["backend", "threads"])
def test_ranks_that_need_other_memory_choose_one_plan(differs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend goes block by block, as many at a time as there are threads; the reference doesn't."""
    batch, own = Batch(torch.float32), threading.local()
    monkeypatch.setattr(run_call, "num_workers", lambda device: own.num_workers)
    working_sets = [WorkingSet(MAX_BLOCK_PAIRS, 1), WorkingSet(MAX_BLOCK_PAIRS, 4)]
    if differs == "backend":
        working_sets[1] = WorkingSet(None, 1)
    peaks = sorted(
        peak_bytes(
            tm.OverlapPlan((1,), window=2, backward_window=2),
            batch.work,
            replace(widths(torch.float32), working_set=each),
        ).most
        for each in working_sets
    )
    assert peaks[0] < peaks[1]
    overlap = tm.OverlapConfig(memory_budget_bytes=sum(peaks) // 2)

    def on_rank(transport: Transport) -> list[tm.OverlapPlan]:
        is_other = transport.rank == 1
        own.num_workers = working_sets[is_other].num_workers
        layer = tm.GroupedExperts(
            tm.MoEConfig(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K),
            transport,
            overlap,
            backend="reference" if is_other and differs == "backend" else "torch",
            generator=torch.Generator().manual_seed(0),
        )
        plans = []
        for _ in range(3):
            layer(*(part[transport.rank] for part in (batch.x, batch.topk_ids, batch.topk_weights)))
            plans.append(layer.last_report.overlap)
        return plans

    first, *others = tm.run_on_emulated_ranks(on_rank, SIZE, timeout_s=20)
    assert all(other == first for other in others)
    assert first[1] == first[2] != tm.OverlapPlan((1,), window=2, backward_window=2)
