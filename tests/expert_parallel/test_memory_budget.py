"""Calls with a memory budget: in parts, whatever they keep, results and gradients are those of one device."""

import itertools
import math
import re
from unittest import mock

import limited_memory_worker
import pytest
import torch
from batches import KERNEL_DEVICE, OPTIONS, Batch, assert_equals_one_device
from held_storages import HeldStorages, recycle_nothing
from processes import run_forks
from same_bits import assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.expert_parallel.plans import bounded
from tritonmoe.expert_parallel.state import state_of
from tritonmoe.overlap.report import Keeps, LayerReport
from tritonmoe.overlap.simulation.cost_model import LayerWork
from tritonmoe.overlap.simulation.memory import BufferWidths, WorkingSet
from tritonmoe.overlap.tuning.memory_budget import Parts, choose_parts
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.transports import Transport

NO_BUDGET = tm.OverlapConfig(memory_budget_bytes=1)
ANY_BUDGET = tm.OverlapConfig(memory_budget_bytes=10**12)
KEEPS: tuple[Keeps, ...] = ("hidden", "rows", "nothing")
WAYS = [way for way in itertools.product((1, 2, 5), KEEPS) if way != (1, "hidden")]


def forced(number: int, keeps: Keeps, room: float = math.inf) -> mock._patch:
    """Make every call run so, whatever the budget."""

    def choose(budget: int, plan: tm.OverlapPlan, work: LayerWork, *_: object, **__: object) -> Parts:
        return Parts(number, keeps, (1000,) * work.size, (room,) * work.size, "as a test wants it")

    return mock.patch.object(bounded, "choose_parts", choose)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("number", "keeps"), WAYS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4], ids="W{}".format)
def test_parts_equal_one_device(num_ranks: int, number: int, keeps: Keeps) -> None:
    """Some ranks have no tokens, some parts too."""
    batch = Batch(num_ranks, 8, 3)
    with forced(number, keeps):
        assert_equals_one_device(batch.in_parallel(ANY_BUDGET), batch.on_one_device())


@pytest.mark.parametrize("keeps", [pytest.param("rows", marks=pytest.mark.thorough), "nothing"])
def test_bits_of_the_kernels_do_not_depend_on_parts(keeps: Keeps) -> None:
    """But those of the weights' gradients, which are added part by part."""
    batch = Batch(2, 4, 2, torch.float32, device=KERNEL_DEVICE)
    whole = batch.in_parallel(tm.OverlapConfig(2), backend="triton")
    with forced(2, keeps):
        parts = batch.in_parallel(ANY_BUDGET, backend="triton")
    assert_equals_one_device(parts, batch.on_one_device())
    names = ("out", "x", "topk_weights")
    assert_same_bits({name: parts[name] for name in names}, {name: whole[name] for name in names})


@pytest.mark.sweep(1)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("keeps", ["rows", "nothing"])
def test_parts_of_other_layers(options: str, keeps: Keeps) -> None:
    batch = Batch(3, 6, 3, options=OPTIONS[options])
    with forced(3, keeps):
        assert_equals_one_device(batch.in_parallel(ANY_BUDGET), batch.on_one_device())


@pytest.mark.parametrize("keeps", KEEPS)
def test_parts_with_adapters(keeps: Keeps) -> None:
    batch = Batch(2, 6, 2, ranks=(2, 3))
    with forced(2, keeps):
        assert_equals_one_device(batch.in_parallel(ANY_BUDGET), batch.on_one_device())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_weights_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """One rounding per gradient: as near to fp64 as a whole call's."""
    batch, exact = Batch(2, 6, 2, dtype), Batch(2, 6, 2)
    for part in ("tokens", "weights"):
        for name, value in getattr(batch, part).items():
            getattr(exact, part)[name] = [t.double() for t in value] if isinstance(value, list) else value.double()
    expected, whole = exact.on_one_device(), batch.in_parallel(tm.OverlapConfig(1))
    with forced(5, "nothing"):
        actual = batch.in_parallel(ANY_BUDGET)
    for name in batch.weights:
        assert actual[name].dtype == dtype
        error, of_whole = ((of[name].double() - expected[name]).abs().max() for of in (actual, whole))
        assert error <= 1.01 * of_whole + 4 * torch.finfo(dtype).eps


def test_a_part_that_has_too_many_rows_is_cut_again() -> None:
    """The first tokens all go to rank 0, so the first part has more rows than its share."""
    reports: list[LayerReport] = []

    def on_rank(transport: Transport) -> None:
        layer = tm.GroupedExperts(
            tm.MoEConfig(8, 8, 4, 1), transport, ANY_BUDGET, generator=torch.Generator().manual_seed(0)
        )
        ids = (torch.arange(64) // 32)[:, None] * (torch.arange(64) % 2)[:, None] * 2
        layer(torch.ones(64, 8), ids, torch.ones(64, 1))
        reports.append(layer.last_report)

    with forced(2, "hidden", room=8000):
        tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    for report in reports:
        sizes = [int(part.traffic_pairs.sum()) for part in report.parts]
        assert sum(sizes) == 128
        assert len(sizes) > 2
        assert sizes[0] < sizes[-1]
        assert torch.equal(report.traffic_pairs, sum(part.traffic_pairs for part in report.parts))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("keeps", ["hidden", "rows", "nothing"])
def test_activation_checkpointing(use_reentrant: bool, keeps: Keeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recompute runs in the parts of its forward, and its gradients are those of a whole call.

    A part that was cut in two is so in the recompute too, whatever room there is by then.
    """

    def have_room_for(_: Parts, plan: tm.OverlapPlan, work: LayerWork, widths: object) -> bool:
        return is_recomputing() or bool(work.pairs.sum() < 25)

    monkeypatch.setattr(Parts, "have_room_for", have_room_for)

    def on_rank(transport: Transport, overlap: tm.OverlapConfig) -> list[Tensor]:
        layer = tm.MoELayer(tm.MoEConfig(8, 8, 4, 2), transport, overlap, generator=torch.Generator().manual_seed(0))
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(transport.rank)).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        assert not state_of(transport).kept_bytes
        (y.square().sum() + checkpoint(layer, y, use_reentrant=use_reentrant).square().sum()).backward()
        assert not state_of(transport).under_way
        assert not state_of(transport).kept_bytes
        return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]

    expected = tm.run_on_emulated_ranks(lambda t: on_rank(t, tm.OverlapConfig(1)), 2, timeout_s=20)
    with forced(3, keeps):
        actual = tm.run_on_emulated_ranks(lambda t: on_rank(t, ANY_BUDGET), 2, timeout_s=20)
    for mine, other in zip(actual, expected, strict=True):
        for one, wanted in zip(mine, other, strict=True):
            torch.testing.assert_close(one, wanted)


def test_a_rank_that_needs_no_gradient_takes_part() -> None:
    def on_rank(transport: Transport) -> Tensor:
        batch_of_rank = {name: value.clone() for name, value in batch.of_rank(transport.rank).items()}
        leaves = {name: value.requires_grad_(transport.rank == 0) for name, value in batch_of_rank.items()}
        out = batch.call(transport, leaves, ANY_BUDGET)
        out.backward(batch.tokens["dout"][transport.rank])
        return leaves["x"].grad

    batch = Batch(2, 6, 2)
    with forced(2, "nothing"):
        grad, nothing = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    torch.testing.assert_close(grad, batch.on_one_device()["x"][: len(grad)])
    assert nothing is None


def test_gradients_are_added_to_main_grads() -> None:
    """Those of all parts, to what is there already; such a weight gets no gradient."""

    def on_rank(transport: Transport) -> list[Tensor | None]:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        leaves["gate_up_proj"].main_grad = torch.ones_like(leaves["gate_up_proj"], dtype=torch.float64)
        batch.call(transport, leaves, ANY_BUDGET).backward(batch.tokens["dout"][transport.rank])
        assert leaves["gate_up_proj"].grad is None
        return [leaves["gate_up_proj"].main_grad - 1, leaves["down_proj"].grad]

    batch = Batch(2, 6, 2)
    expected = batch.on_one_device()
    with forced(3, "rows"):
        results = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    for name, parts in zip(("gate_up_proj", "down_proj"), zip(*results, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), expected[name])


def test_ranks_that_run_another_backward_are_told() -> None:
    """Before rows travel again: the ranks of one call run the other call's backward."""

    def on_rank(transport: Transport) -> None:
        calls = []
        for _ in range(2):
            leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
            calls.append(batch.call(transport, leaves, ANY_BUDGET))
        with pytest.raises(tm.CountMismatch, match="backward"):
            calls[transport.rank].sum().backward()

    batch = Batch(2, 6, 2)
    with forced(2, "nothing"):
        tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_ranks_with_other_budgets_are_told() -> None:
    def on_rank(transport: Transport) -> None:
        budget = tm.OverlapConfig(memory_budget_bytes=10**9 + transport.rank)
        with pytest.raises(tm.CountMismatch, match=r"memory_budget_bytes.*1000000000.*1000000001"):
            batch.call(transport, batch.of_rank(transport.rank), budget)

    batch = Batch(2, 6, 2)
    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_fillers_and_reports_of_parts() -> None:
    """A shared expert runs once, and times of all parts are in the report of the call."""

    def on_rank(transport: Transport) -> LayerReport:
        config = tm.MoEConfig(8, 8, 4, 2, shared_intermediate_size=8)
        layers = [
            tm.MoELayer(config, transport, overlap, generator=torch.Generator().manual_seed(0))
            for overlap in (tm.OverlapConfig(1), ANY_BUDGET)
        ]
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(transport.rank))
        expected, y = (layer(x) for layer in layers)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        return layers[1].last_report

    with forced(3, "nothing"):
        for report in tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20):
            assert [str(part.overlap) for part in report.parts] == [str(report.parts[0].overlap)] * 3
            assert report.keeps == "nothing"
            assert report.memory == "as a test wants it"
            assert len(report.forward.steps) == sum(len(part.forward.steps) for part in report.parts)
            assert report.backward is not None
            assert len(report.backward.steps) == sum(len(part.backward.steps) for part in report.parts)


def test_what_is_kept_is_counted_until_a_backward_or_the_end_of_a_graph() -> None:
    def on_rank(transport: Transport) -> None:
        state = state_of(transport)

        def call() -> Tensor:
            leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
            return batch.call(transport, leaves, ANY_BUDGET)

        first = call()
        assert sum(state.kept_bytes.values()) == 1000
        second = call()
        assert sum(state.kept_bytes.values()) == 2000
        first.sum().backward()
        assert sum(state.kept_bytes.values()) == 1000
        del second
        assert not state.kept_bytes
        with torch.no_grad():
            call()
        assert not state.kept_bytes

    batch = Batch(2, 6, 2)
    for number, keeps in ((1, "hidden"), (1, "rows"), (3, "rows"), (3, "nothing")):
        with forced(number, keeps):
            tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_inference_in_parts() -> None:
    batch = Batch(2, 6, 2)

    def on_rank(transport: Transport) -> Tensor:
        with torch.no_grad():
            return batch.call(transport, batch.of_rank(transport.rank), ANY_BUDGET)

    with forced(4, "hidden"):
        out = torch.cat(tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20))
    torch.testing.assert_close(out, batch.on_one_device()["out"])


def test_halves_are_not_cut() -> None:
    """They keep less where they can, and run as a whole."""

    def on_rank(transport: Transport, overlap: tm.OverlapConfig) -> tuple[list[Tensor], LayerReport]:
        layer = tm.MoELayer(tm.MoEConfig(8, 8, 4, 2), transport, overlap, generator=torch.Generator().manual_seed(0))
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(transport.rank)).requires_grad_()
        torch.cat(tm.two_batches(layer, x[:10], x[10:])).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in layer.parameters())], layer.last_report

    expected = tm.run_on_emulated_ranks(lambda t: on_rank(t, tm.OverlapConfig(1)), 2, timeout_s=20)
    results = tm.run_on_emulated_ranks(lambda t: on_rank(t, NO_BUDGET), 2, timeout_s=20)
    for (mine, report), (other, _) in zip(results, expected, strict=True):
        assert report.parts == ()
        assert report.keeps == "rows"
        assert "takes least" in report.memory
        for one, wanted in zip(mine, other, strict=True):
            torch.testing.assert_close(one, wanted)


def test_callable_activations_are_not_cut() -> None:
    batch = Batch(2, 6, 2, options={"activation": nn.Identity(), "gated": False})
    assert_equals_one_device(batch.in_parallel(NO_BUDGET), batch.on_one_device())


HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, NUM_TOKENS = 64, 96, 8, 2, 2048
HOT = {"uniform": NUM_EXPERTS, "rank 0": NUM_EXPERTS // 2, "one expert": 1}
"""Of so many experts are the tokens, from the first on."""


def measure(overlap: tm.OverlapConfig, num_hot: int, num_layers: int = 2) -> tuple[float, int]:
    """Return the most bytes that rank 0 holds in a step of some layers, and in how many parts the last of them ran.

    Counted are those that a layer holds, not its results, nor the caller's tensors.
    """

    def on_rank(transport: Transport) -> tuple[float, int]:
        generator = torch.Generator().manual_seed(transport.rank)
        config = tm.MoEConfig(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K)
        layers = [tm.GroupedExperts(config, transport, overlap, generator=generator) for _ in range(num_layers)]
        x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator).requires_grad_()
        topk_ids = torch.randint(num_hot, (NUM_TOKENS, TOP_K), generator=generator)
        topk_weights = torch.rand(NUM_TOKENS, TOP_K, generator=generator)
        results = []
        with HeldStorages() as held:
            for layer in layers:
                results.append(layer(x if not results else results[-1], topk_ids, topk_weights))
            results[-1].backward(torch.ones_like(x))
        grads = [x.grad, *(parameter.grad for layer in layers for parameter in layer.parameters())]
        peak = held.peak([*results, *grads])
        return peak, len(layers[-1].last_report.parts)

    return max(tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60))


@pytest.mark.parametrize(
    "routing", ["rank 0", *(pytest.param(of, marks=pytest.mark.thorough) for of in HOT if of != "rank 0")]
)
def test_layers_stay_within_one_budget(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What uniform routing needs is enough for every other one, in the first step too."""
    recycle_nothing(monkeypatch)
    without = {name: measure(tm.OverlapConfig(4), HOT[name])[0] for name in {"uniform", routing}}
    bound, num_parts = measure(tm.OverlapConfig(memory_budget_bytes=int(without["uniform"])), HOT[routing])
    assert bound <= 1.1 * without["uniform"]
    assert num_parts > 1
    if routing != "uniform":
        assert without[routing] > 1.5 * without["uniform"]


@pytest.mark.thorough
@pytest.mark.parametrize("budget", [0, 100_000_000], ids=["without", "with"])
def test_in_processes_of_limited_memory(budget: int) -> None:
    """A job that runs out of memory (RLIMIT_DATA) at its first uneven step trains on with a budget."""
    outputs, ended = run_forks([[limited_memory_worker.__file__, str(budget)]] * 2, 300, is_group=True)
    assert all("an even step" in output for output in outputs)
    if budget:
        assert ended.statuses == [0, 0], ended.output
        assert all(re.search(r"uneven steps, in \d+ parts", output) for output in outputs)
    else:
        assert any(ended.statuses)
        assert "DefaultCPUAllocator: can't allocate memory" in ended.output
        assert "uneven steps" not in ended.output


def work(pairs_of_rank_0: float, size: int = 4) -> LayerWork:
    pairs = torch.ones(size, size, dtype=torch.float64) * 1000
    pairs[:, 0] *= pairs_of_rank_0
    return LayerWork(pairs.clamp(max=2000), pairs, 4 * HIDDEN, TOP_K)


def chosen(budget: int, of: LayerWork, held: float = 0.0, **options: bool) -> Parts:
    widths = BufferWidths(HIDDEN, INTERMEDIATE, 2, 4, working_set=WorkingSet(256))
    return choose_parts(
        budget,
        tm.OverlapPlan((1, 1)),
        of,
        [widths] * of.size,
        torch.full((of.size,), held, dtype=torch.float64),
        **{"can_be_cut": True, "can_drop_hidden": True} | options,
    )


def test_less_is_kept_the_smaller_the_budget() -> None:
    ways = [(of.keeps, of.number) for of in (chosen(int(60e6 * 0.9**n), work(4.0)) for n in range(60))]
    assert ways[0] == ("hidden", 1)
    assert ways[-1][0] == "nothing"
    order = [(KEEPS.index(keeps), number) for keeps, number in ways]
    assert order == sorted(order)
    assert len({keeps for keeps, _ in ways}) == 3


def test_what_earlier_calls_hold_counts() -> None:
    fits = chosen(40_000_000, work(4.0))
    assert fits.keeps == "hidden"
    assert chosen(40_000_000, work(4.0), held=38_000_000.0).keeps == "nothing"
    assert "still more than memory_budget_bytes = 40000000" in chosen(40_000_000, work(4.0), held=4e7).reason


def test_calls_that_cannot_be_cut_keep_less() -> None:
    assert chosen(1, work(4.0), can_be_cut=False)[:2] == (1, "rows")
    assert chosen(1, work(4.0), can_be_cut=False, can_drop_hidden=False)[:2] == (1, "hidden")
    assert chosen(1, work(4.0), can_drop_hidden=False)[:2] == (64, "hidden")


def test_packed_experts_in_parts() -> None:
    """They have the bits of the same experts decoded, of which adapters train."""

    def on_rank(transport: Transport, decoded: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = (4, 64, 32), (4, 32, 32)
        own = slice(2 * transport.rank, 2 * transport.rank + 2)
        packed = [tm.QuantizedWeight.pack(torch.randn(s, generator=generator)[own], "nf4") for s in shapes]
        factors = [torch.randn(2, *s, generator=generator).requires_grad_() for s in ((3, 32), (64, 3))]
        x = torch.randn(20, 32, generator=generator).bfloat16().requires_grad_()
        ids = torch.randint(4, (20, 2), generator=generator)
        y = tm.expert_parallel_mlp(
            x,
            ids,
            torch.ones(20, 2),
            *(weight.decode() if decoded else weight for weight in packed),
            num_experts=4,
            transport=transport,
            overlap=ANY_BUDGET,
            adapters=tm.ExpertAdapters(*(factor.bfloat16() for factor in factors)),
        )
        y.float().square().sum().backward()
        return [y.detach(), x.grad, *(factor.grad for factor in factors)]

    with forced(3, "nothing"):
        packed, decoded = (
            tm.run_on_emulated_ranks(lambda t, d=d: on_rank(t, d), 2, timeout_s=30) for d in (False, True)
        )
    for mine, other in zip(packed, decoded, strict=True):
        assert_same_bits(mine, other)
