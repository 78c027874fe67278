"""Copies of hot experts for one call: outputs and every gradient are those of one device, whoever computes what."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from batches import CALLABLES, KERNEL_DEVICE, NAMES, OPTIONS, WEIGHTS, Batch, assert_equals_one_device
from compiled_threads import compiles_in_threads
from same_bits import assert_same_bits
from tolerance import error_floor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.expert_parallel.call import ProposedCall, listeners
from tritonmoe.expert_parallel.plans.copies import balance
from tritonmoe.overlap.report import LayerReport
from tritonmoe.transports import Delay, PendingExchange, Transport

ALWAYS = tm.OverlapConfig(2, balance="always")


@pytest.fixture
def reports() -> Iterator[dict[int, list[LayerReport]]]:
    """The reports of all calls, by rank."""
    found: dict[int, list[LayerReport]] = {rank: [] for rank in range(8)}

    class Collect:
        def before_forward(self, *_: object) -> None: ...
        def after_backward(self, *_: object) -> None: ...
        def after_forward(self, transport: Transport, header: object, report: LayerReport, grouping: object) -> None:
            found[transport.rank].append(report)

    collect = Collect()
    listeners.append(collect)
    yield found
    listeners.remove(collect)


def hot(batch: Batch, hot_experts: tuple[int, ...] = (0, 1), seed: int = 1) -> Batch:
    """Give every rank tokens of which most need one of these experts; the second rank has none."""
    generator = torch.Generator().manual_seed(seed)
    counts = [0 if rank == 1 else 20 + 3 * rank for rank in range(batch.num_ranks)]
    batch.ids = []
    for count in counts:
        ids = torch.randint(-1, batch.num_experts + 1, (count, batch.top_k), generator=generator)
        drawn = torch.tensor(hot_experts)[torch.randint(len(hot_experts), ids.shape, generator=generator)]
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.7, drawn, ids)
        batch.ids.append(ids.to(batch.device))
    for name, values in batch.tokens.items():
        shapes = [(count, values[0].shape[1]) for count in counts]
        batch.tokens[name] = [
            torch.rand(shape, generator=generator, dtype=torch.float64).to(values[0]) for shape in shapes
        ]
    return batch


def assert_copied(reports: dict[int, list[LayerReport]], num_ranks: int) -> None:
    for rank in range(num_ranks):
        for report in reports[rank]:
            assert report.copies.planned is not None
            assert report.imbalance < report.imbalance_without_copies
    last = [reports[rank][-1] for rank in range(num_ranks)]
    assert len({report.copies.planned for report in last}) == 1
    assert all(torch.equal(report.traffic_pairs, last[0].traffic_pairs) for report in last)


HOT = {"one": (1,), "a-rank": (0, 1, 2), "last": (11,), "two-ranks": (0, 6), "none": ()}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("max_copies", [1, 2, 3])
@pytest.mark.parametrize("hot_experts", HOT)
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("num_ranks", [2, 3, 4], ids="W{}".format)
def test_equals_one_device(num_ranks: int, top_k: int, hot_experts: str, max_copies: int) -> None:
    """fp64 makes the comparison tight; the overlapped schedule has the bits of the serial one."""
    experts = HOT[hot_experts] or tuple(range(12))
    batch = hot(Batch(num_ranks, 12, top_k), experts)
    expected = batch.on_one_device()
    for num_chunks, local_first in itertools.product((1, 3), (True, False)):
        where = f"C{num_chunks}-{'local_first' if local_first else 'all_travel'}"
        config = tm.OverlapConfig(num_chunks, local_first, balance="always", max_copies=max_copies)
        overlapped = batch.in_parallel(config)
        assert_equals_one_device(overlapped, expected, where)
        assert_same_bits(overlapped, batch.in_parallel(replace(config, serial=True)), where)


PLANS = {
    "ramp": tm.OverlapPlan((1, 2, 1), balance="always"),
    "all-local-first": tm.OverlapPlan((1, 2, 5), local_start=16, window=2, backward_window=1, balance="always"),
    "all-local-last": tm.OverlapPlan((1, 6), local_start=0, balance="always"),
    "window-of-one": tm.OverlapPlan((1, 1, 1, 1), local_start=3, window=1, backward_window=2, balance="always"),
    "all-travel-windowed": tm.OverlapPlan((3, 1, 2), local_first=False, window=1, backward_window=1, balance="always"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_unequal_chunks_local_slices_and_windows(plan: str, reports: dict[int, list[LayerReport]]) -> None:
    batch = hot(Batch(3, 12, 2))
    overlapped = batch.in_parallel(PLANS[plan])
    assert_copied(reports, 3)
    assert_equals_one_device(overlapped, batch.on_one_device())
    assert_same_bits(overlapped, batch.in_parallel(replace(PLANS[plan], serial=True)))


def test_eight_ranks(reports: dict[int, list[LayerReport]]) -> None:
    batch = hot(Batch(8, 16, 4), (4, 5))
    assert_equals_one_device(batch.in_parallel(ALWAYS), batch.on_one_device())
    assert_copied(reports, 8)
    assert max(len(reports[0][0].copies.planned.on(rank)) for rank in range(8)) <= 2


@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", ["hidden", "input", "adapters"])
@pytest.mark.parametrize("hot_experts", [(1,), (2, 3)])
def test_copies_pass_pieces_on(hot_experts: tuple[int, ...], case: str, reports: dict[int, list[LayerReport]]) -> None:
    """Where an owner would send many copies, of weights whose bytes are no multiple of that; some ranks hold two.

    With save="input" pieces travel in the backward again, and adapters' factors travel beside the weights.
    """
    save = "input" if case == "input" else "hidden"
    batch = hot(Batch(8, 16, 3, options={"save": save}, ranks=(2, 3) if case == "adapters" else (0, 0)), hot_experts)
    expected = batch.on_one_device()
    for config in (ALWAYS, replace(ALWAYS, num_chunks=3, local_first=False)):
        overlapped = batch.in_parallel(config)
        assert_equals_one_device(overlapped, expected)
        assert_same_bits(overlapped, batch.in_parallel(replace(config, serial=True)))
    assert_copied(reports, 8)
    report = reports[0][-1]
    assert report.copies.planned.are_relayed
    for timings, is_sent in ((report.forward, True), (report.backward, save == "input")):
        kinds = [timing.step.kind for timing in timings.steps]
        assert ("copies" in kinds) == ("spread_copies" in kinds) == is_sent


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_options(options: str, backend: str, reports: dict[int, list[LayerReport]]) -> None:
    batch = hot(Batch(3, 6, 3, options=OPTIONS[options]))
    for num_chunks, local_first in ((2, True), (3, False)):
        config = tm.OverlapConfig(num_chunks, local_first, balance="always")
        assert_equals_one_device(batch.in_parallel(config, backend=backend), batch.on_one_device())
    assert_copied(reports, 3)
    kinds = [step.step.kind for step in reports[0][-1].backward.steps]
    assert ("copies" in kinds) == (options == "save-input")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype, reports: dict[int, list[LayerReport]]) -> None:
    """At most twice one device's error against fp64."""
    batch, exact_batch = hot(Batch(3, 6, 2, dtype)), hot(Batch(3, 6, 2))
    for part in ("tokens", "weights"):
        for name, value in getattr(batch, part).items():
            wide = [t.double() for t in value] if isinstance(value, list) else value.double()
            getattr(exact_batch, part)[name] = wide
    exact, plain = exact_batch.on_one_device(), batch.on_one_device("torch")
    for num_chunks, local_first in ((1, True), (3, False)):
        actual = batch.in_parallel(tm.OverlapConfig(num_chunks, local_first, balance="always"))
        for name, value in actual.items():
            assert value.dtype == plain[name].dtype
            error, plain_error = ((v.double() - exact[name]).abs().max().item() for v in (value, plain[name]))
            assert error <= 2 * plain_error + error_floor(value.dtype, exact[name]), name
    assert_copied(reports, 3)


def test_adapters_come_home_too(reports: dict[int, list[LayerReport]]) -> None:
    batch = hot(Batch(3, 6, 3, ranks=(2, 3)))
    assert_equals_one_device(batch.in_parallel(ALWAYS), batch.on_one_device())
    assert_copied(reports, 3)


@pytest.mark.thorough
def test_kernels_in_the_interpreter(reports: dict[int, list[LayerReport]]) -> None:
    batch = hot(Batch(2, 6, 2, torch.float32, device=KERNEL_DEVICE))
    actual, expected = batch.in_parallel(ALWAYS, backend="triton"), batch.on_one_device()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    assert_copied(reports, 2)


def test_late_ranks_change_no_bit() -> None:
    """Each rank is late at other exchanges; where a wait is missing, weights or gradients are read before they came."""
    batch = hot(Batch(3, 6, 2, torch.float32))
    faults = tuple(
        Delay(rank, exchange, 0.004 * (1 + (rank + exchange) % 3))
        for rank in range(3)
        for exchange in range(rank, 14, 3)
    )
    for config in (ALWAYS, replace(ALWAYS, local_first=False)):
        for save in ("hidden", "input"):
            expected = batch.in_parallel(config, save=save)
            link = tm.LinkModel(0.0001, latency_us=500)
            assert_same_bits(batch.in_parallel(config, faults=faults, link=link, save=save), expected)


def test_late_pieces_change_no_bit(reports: dict[int, list[LayerReport]]) -> None:
    """As above, where pieces of weights are passed on: each must have come before it goes on."""
    batch = hot(Batch(8, 8, 2, torch.float32), (2,))
    expected = batch.in_parallel(ALWAYS)
    assert reports[0][0].copies.planned.are_relayed
    for exchange in range(1, 6):
        faults = tuple(Delay(rank, exchange, 0.004 * (1 + rank % 3)) for rank in range(exchange % 2, 8, 2))
        assert_same_bits(batch.in_parallel(ALWAYS, faults=faults), expected)


NEEDS = {
    "rank-1-nothing": lambda rank, name: rank == 0,
    "rank-0-nothing": lambda rank, name: rank == 1,
    "only-x": lambda rank, name: name == "x",
    "frozen-experts": lambda rank, name: name not in WEIGHTS,
    "only-experts": lambda rank, name: name in WEIGHTS,
    "only-down-bias-of-rank-0": lambda rank, name: (rank, name) == (0, "down_bias"),
    "only-gate-up-of-rank-0": lambda rank, name: (rank, name) == (0, "gate_up_proj"),
    "x-here-weights-there": lambda rank, name: (name == "x") == (rank == 0),
}


@pytest.mark.parametrize("needs", NEEDS)
def test_some_ranks_need_no_gradient(needs: str, reports: dict[int, list[LayerReport]]) -> None:
    """A copy gives the gradients that its owner wants, and nobody else gets any."""
    batch = hot(Batch(2, 6, 3))
    expected = batch.on_one_device()

    def on_rank(transport: Transport) -> dict[str, Tensor]:
        rank = transport.rank
        leaves = {n: value.requires_grad_(NEEDS[needs](rank, n)) for n, value in batch.of_rank(rank).items()}
        out = batch.call(transport, leaves, ALWAYS)
        out.backward(batch.tokens["dout"][rank])
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == leaf.requires_grad, name
        return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}}

    for rank, actual in enumerate(tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)):
        for name, value in actual.items():
            whole = expected[name]
            share = [len(of) for of in batch.ids] if name not in WEIGHTS else [3, 3]
            torch.testing.assert_close(value, whole.split(share)[rank])
    assert_copied(reports, 2)
    kinds = [timing.step.kind for timing in reports[0][0].backward.steps]
    assert ("copies_backward" in kinds) == (needs not in ("only-x", "frozen-experts"))


def test_inference(reports: dict[int, list[LayerReport]]) -> None:
    batch = hot(Batch(2, 6, 2))

    def on_rank(transport: Transport) -> Tensor:
        with torch.no_grad():
            return batch.call(transport, batch.of_rank(transport.rank), ALWAYS)

    out = torch.cat(tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20))
    torch.testing.assert_close(out, batch.on_one_device()["out"])
    assert_copied(reports, 2)


def test_backward_twice() -> None:
    batch = hot(Batch(2, 6, 2))

    def on_rank(transport: Transport) -> None:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        out = batch.call(transport, leaves, ALWAYS)
        dout = batch.tokens["dout"][transport.rank]
        first = torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=True)
        second = torch.autograd.grad(out, list(leaves.values()), dout)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_main_grads_get_what_comes_home(reports: dict[int, list[LayerReport]]) -> None:
    batch = hot(Batch(2, 6, 2, torch.float32))
    expected = batch.on_one_device()

    def on_rank(transport: Transport) -> dict[str, Tensor]:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        for name in WEIGHTS:
            leaves[name].main_grad = torch.ones_like(leaves[name])
        batch.call(transport, leaves, ALWAYS).backward(batch.tokens["dout"][transport.rank])
        assert all(leaves[name].grad is None for name in WEIGHTS)
        return {name: leaves[name].main_grad - 1 for name in WEIGHTS}

    results = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    for name in WEIGHTS:
        torch.testing.assert_close(torch.cat([of[name] for of in results]), expected[name], atol=1e-4, rtol=1e-4)
    assert_copied(reports, 2)


@pytest.mark.parametrize("rank_without", [None, 1])
def test_wide_main_grads_keep_what_bf16_would_round(
    rank_without: int | None, reports: dict[int, list[LayerReport]]
) -> None:
    """Gradients of copies travel in fp32 then, on all ranks, also where one has no main_grad."""
    batch = hot(Batch(2, 6, 2, torch.bfloat16))

    def on_rank(transport: Transport, overlap: tm.OverlapConfig) -> dict[str, Tensor]:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        for name in WEIGHTS if transport.rank != rank_without else ():
            leaves[name].main_grad = torch.zeros_like(leaves[name], dtype=torch.float32)
        batch.call(transport, leaves, overlap).backward(batch.tokens["dout"][transport.rank])
        return {name: leaves[name].main_grad for name in WEIGHTS if transport.rank != rank_without}

    results = [
        tm.run_on_emulated_ranks(partial(on_rank, overlap=overlap), 2, timeout_s=20)
        for overlap in (ALWAYS, tm.OverlapConfig(2))
    ]
    for with_copies, without in zip(*results, strict=True):
        for name in with_copies:
            if not name.endswith("bias"):  # whose gradients are rounded before they are added, copies or not
                torch.testing.assert_close(with_copies[name], without[name], atol=1e-5, rtol=1e-5)
    of_call = reports[0][0]
    assert of_call.copies is not None
    assert sum(of_call.copies.gradient_bytes) > 1.8 * of_call.copies.expert_bytes


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("overlap", [ALWAYS, PLANS["ramp"]], ids=["config", "plan"])
def test_a_recompute_repeats_the_copies(overlap, use_reentrant: bool, reports: dict[int, list[LayerReport]]) -> None:
    """Near-ties may send some tokens elsewhere by then: the copies are the forward's."""
    batch, flipped = hot(Batch(2, 6, 3)), hot(Batch(2, 6, 3))
    flipped.ids[0] = flipped.ids[0].clone()
    flipped.ids[0][:3] = torch.tensor([3, 4, 5])
    expected = flipped.on_one_device()

    def on_rank(transport: Transport) -> list[Tensor]:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        num_calls = 0

        def layer(*tensors: Tensor) -> Tensor:
            nonlocal num_calls
            num_calls += 1
            called = batch if num_calls == 1 else flipped
            return called.call(transport, dict(zip(leaves, tensors, strict=True)), overlap)

        checkpoint_options = {} if use_reentrant else {"determinism_check": "none"}
        out = checkpoint(layer, *leaves.values(), use_reentrant=use_reentrant, **checkpoint_options)
        out.backward(batch.tokens["dout"][transport.rank])
        assert num_calls == 2
        return [leaf.grad for leaf in leaves.values()]

    results = zip(*tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20), strict=True)
    assert_equals_one_device(dict(zip(NAMES, map(torch.cat, results), strict=True)), expected)
    first, second = reports[0]
    assert first.copies.planned is not None
    if use_reentrant:  # whose first forward keeps nothing to repeat
        assert second.copies.planned is not None
    else:
        assert second.copies.planned == first.copies.planned


def test_placements_without_replicas(reports: dict[int, list[LayerReport]]) -> None:
    batch = hot(Batch(2, 6, 2))
    held = ((0, 5, 2), (4, 1, 3))
    placement = tm.ExpertPlacement(held)
    expected = batch.on_one_device()

    def on_rank(transport: Transport) -> list[Tensor]:
        mine = batch.of_rank(transport.rank)
        mine |= {name: value[list(held[transport.rank])].clone() for name, value in batch.weights.items()}
        leaves = {name: value.requires_grad_() for name, value in mine.items()}
        out = batch.call(transport, leaves, ALWAYS, placement=placement)
        grads = torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][transport.rank])
        return [out.detach(), *grads]

    results = dict(
        zip(("out", *NAMES), zip(*tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20), strict=True), strict=True)
    )
    order = torch.tensor(sum(held, ())).argsort()
    for name, parts in results.items():
        whole = torch.cat(parts)
        assert_equals_one_device({name: whole[order] if name in WEIGHTS else whole}, expected)
    assert any(report.copies.planned is not None for report in reports[0])


def test_a_hot_set_that_moves(reports: dict[int, list[LayerReport]]) -> None:
    """Every call has copies of its own."""
    batches = [hot(Batch(3, 6, 2), (e, e + 1), seed=e) for e in (0, 2, 4)]

    def on_rank(transport: Transport) -> list[Tensor]:
        outs = []
        for batch in batches:
            outs.append(batch.call(transport, batch.of_rank(transport.rank), ALWAYS))
        return outs

    for outs, batch in zip(zip(*tm.run_on_emulated_ranks(on_rank, 3, timeout_s=20), strict=True), batches, strict=True):
        assert_equals_one_device({"out": torch.cat(outs)}, batch.on_one_device())
    assert len({report.copies.planned for report in reports[0]}) == 3


def test_even_ranks_exchange_nothing_more(reports: dict[int, list[LayerReport]]) -> None:
    """No count of an expert leaves its rank where ranks have as many pairs each."""
    batch = Batch(2, 6, 2)
    batch.ids = [torch.tensor([[0, 3], [1, 4], [2, 5]])] * 2
    for name, values in batch.tokens.items():
        batch.tokens[name] = [torch.rand(3, values[0].shape[1]).to(values[0]) for _ in range(2)]
    assert_equals_one_device(batch.in_parallel(ALWAYS), batch.on_one_device())
    assert reports[0][0].copies.planned is None
    assert reports[0][0].balance == "no copies: ranks have about as many pairs"


@compiles_in_threads
def test_compiled(reports: dict[int, list[LayerReport]]) -> None:
    batch = hot(Batch(2, 6, 2, torch.float32))
    expected = batch.on_one_device()

    def on_rank(transport: Transport) -> list[Tensor]:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        call = torch.compile(lambda: batch.call(transport, leaves, ALWAYS) * 1.0, backend="aot_eager", fullgraph=True)
        out = call()
        grads = torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][transport.rank])
        return [out.detach(), *grads]

    results = zip(*tm.run_on_emulated_ranks(on_rank, 2, timeout_s=120), strict=True)
    for name, value in zip(("out", *NAMES), map(torch.cat, results), strict=True):
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)
    assert_copied(reports, 2)


REFUSED = {
    "experts": (lambda: tm.OverlapConfig(2, chunk_by="experts", balance="auto"), "balance needs chunks of tokens"),
    "capacity": (lambda: tm.OverlapConfig(2, capacity=2.0, balance="auto"), "balance plans from counts"),
    "budget": (lambda: tm.OverlapConfig(memory_budget_bytes=1 << 20, balance="auto"), "memory_budget_bytes bounds"),
    "word": (lambda: tm.OverlapConfig(balance="yes"), "balance must be"),
    "number": (lambda: tm.OverlapConfig(balance="auto", max_copies=0), "max_copies must be 'auto' or 1..64"),
    "other word": (lambda: tm.OverlapConfig(balance="auto", max_copies="all"), "max_copies must be 'auto' or 1..64"),
    "plan's number": (lambda: tm.OverlapPlan(balance="always", max_copies="auto"), "max_copies must be 1..64"),
    "plan": (lambda: tm.OverlapPlan(chunk_by="experts", balance="always"), "balance needs chunks of tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        make()


def test_calls_that_are_refused_on_every_rank() -> None:
    """Nothing of them has travelled; calls go on afterwards."""
    batch = hot(Batch(2, 6, 2))
    replicas = tm.ExpertPlacement(((0, 1, 2, 3), (3, 4, 5, 0)))

    def on_rank(transport: Transport) -> Tensor:
        mine = batch.of_rank(transport.rank)
        more = {name: torch.cat([value, value[:1]]) for name, value in mine.items() if name in WEIGHTS}
        for given, options, words in (
            (mine, {"activation": CALLABLES["chunk"]}, "callable activation"),
            ({**mine, **more}, {"placement": replicas}, "replicas"),
        ):
            with pytest.raises(ValueError, match=words):
                batch.call(transport, given, ALWAYS, **options)
        return batch.call(transport, mine, ALWAYS)

    outs = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert_equals_one_device({"out": torch.cat(outs)}, batch.on_one_device())


@pytest.mark.parametrize(("num_experts", "most"), [(4, 2), (16, 2), (32, 4), (64, 8)])
def test_the_number_of_copies_follows_from_a_ranks_own_experts(num_experts: int, most: int) -> None:
    """Two ranks, and all pairs need experts of the first."""

    def on_rank(transport: Transport) -> LayerReport:
        config = tm.MoEConfig(hidden_size=8, intermediate_size=4, num_experts=num_experts, top_k=1)
        experts = tm.GroupedExperts(config, transport, ALWAYS)
        ids = torch.arange(num_experts * 8)[:, None] % (num_experts // 2)
        experts(torch.randn(len(ids), 8), ids, torch.ones(len(ids), 1))
        assert experts.last_report is not None
        return experts.last_report

    reports = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert len({report.copies.planned for report in reports}) == 1
    for report in reports:
        assert report.overlap.max_copies == most
        assert report.copies.planned is not None
        assert len(report.copies.planned.copies) == min(most, num_experts // 4)


def test_ranks_that_balance_otherwise_say_so() -> None:
    batch = hot(Batch(2, 6, 2))

    def on_rank(transport: Transport) -> None:
        mine = batch.of_rank(transport.rank)
        other = replace(ALWAYS, max_copies=3) if transport.rank else ALWAYS
        with pytest.raises(CountMismatch, match="max_copies of this layer call"):
            batch.call(transport, mine, other)
        with pytest.raises(CountMismatch, match="copies of this layer call"):
            batch.call(transport, mine, ALWAYS if transport.rank else tm.OverlapConfig(2))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_a_rank_that_fails_while_it_plans(monkeypatch) -> None:
    """The others hear of it, and wait for nothing."""
    batch = hot(Batch(2, 6, 2))
    plan_copies, counts = balance.plan_copies, balance._count_slots

    def failing(*arguments: object) -> None:
        raise ZeroDivisionError

    def on_rank(transport: Transport) -> None:
        with pytest.raises((TransportError, ZeroDivisionError)):
            batch.call(transport, batch.of_rank(transport.rank), ALWAYS)

    def count(call: ProposedCall) -> Tensor:
        if call.transport.rank == 0:
            raise ZeroDivisionError
        return counts(call)

    for name, function in (("plan_copies", failing), ("_count_slots", count)):
        with monkeypatch.context() as patch:
            patch.setattr(balance, name, function)
            tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert balance.plan_copies is plan_copies


def test_halves_of_a_batch_run_without(reports: dict[int, list[LayerReport]]) -> None:
    """The weights would travel for each half."""
    batch = hot(Batch(2, 6, 2))
    expected = batch.on_one_device()

    def on_rank(transport: Transport) -> Tensor:
        mine, rank = batch.of_rank(transport.rank), transport.rank

        def run_half(tokens: slice) -> Tensor:
            own = {name: mine[name][tokens] for name in ("x", "topk_weights")}
            settings = {"num_experts": 6, "transport": transport, "overlap": ALWAYS}
            return tm.expert_parallel_mlp(topk_ids=batch.ids[rank][tokens], **{**mine, **own}, **settings)

        count = len(batch.ids[rank])
        return torch.cat(tm.two_batches(run_half, slice(count // 2), slice(count // 2, None)))

    outs = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert_equals_one_device({"out": torch.cat(outs)}, expected)
    assert all(report.copies is None for report in reports[0])
    assert {report.half for report in reports[0]} == {1, 2}


class Waited(PendingExchange):
    """An exchange that says whether anybody has waited for it."""

    def __init__(self, pending: PendingExchange) -> None:
        self._pending, self.is_waited_for = pending, False

    def wait(self) -> Tensor:
        self.is_waited_for = True
        return self._pending.wait()

    def finished_at(self) -> float | None:
        return self._pending.finished_at()


@pytest.mark.parametrize("save", ["hidden", "input"])
def test_every_exchange_is_waited_for_before_a_pass_ends(save: str) -> None:
    """An owner waits for none of the copies that it only sends before its experts run, but before the pass ends."""
    config = tm.MoEConfig(hidden_size=8, intermediate_size=6, num_experts=8, top_k=2)

    def on_rank(transport: Transport) -> None:
        posted: list[Waited] = []
        exchange = transport.exchange

        def noted(*arguments, **settings) -> Waited:
            posted.append(Waited(exchange(*arguments, **settings)))
            return posted[-1]

        transport.exchange = noted
        generator = torch.Generator().manual_seed(transport.rank)
        weights = tm.GroupedExperts(config, transport, ALWAYS, generator=torch.Generator().manual_seed(0))
        x = torch.randn(40, 8, generator=generator, requires_grad=True)
        ids = torch.stack([torch.zeros(40, dtype=torch.int64), torch.randint(1, 8, (40,), generator=generator)], 1)
        settings = {"num_experts": 8, "transport": transport, "overlap": ALWAYS, "save": save}
        gates = torch.full((40, 2), 0.5)
        y = tm.expert_parallel_mlp(x, ids, gates, weights.gate_up_proj, weights.down_proj, **settings)
        assert len(posted) > 4
        assert all(one.is_waited_for for one in posted)
        y.sum().backward()
        assert all(one.is_waited_for for one in posted)

    tm.run_on_emulated_ranks(on_rank, 4, timeout_s=60)
