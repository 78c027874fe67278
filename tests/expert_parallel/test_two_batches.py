"""two_batches: halves that take turns give what a whole batch gives, in one order on every rank, or say why not."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from same_bits import assert_same_bits
from tolerance import error_floor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.experts.weight_gradients import SharedWeightGrads
from tritonmoe.overlap import executor
from tritonmoe.overlap.tuning.tuner import SETTLING_CALLS
from tritonmoe.routing import save_topk
from tritonmoe.runtime.halves import NodeOrder
from tritonmoe.transports import Delay, Transport, TwoLevelTransport

D, NUM_LAYERS = 16, 3
CONFIG = {"hidden_size": D, "intermediate_size": 12, "num_experts": 8, "top_k": 3}


class Block(nn.Module):
    """What stands in for attention, and a layer of experts."""

    def __init__(self, dropout: float, make_layer: Callable[[], tm.MoELayer]) -> None:
        super().__init__()
        self.dense = nn.Linear(D, D, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.moe = make_layer()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(torch.tanh(self.dense(x)))
        return x + self.moe(x)


def make_model(
    transport: Transport | None,
    overlap: tm.OverlapConfig | tm.OverlapPlan | None = None,
    dropout: float = 0.0,
    num_layers: int = NUM_LAYERS,
    placement: tm.ExpertPlacement | None = None,
    expert_gradients: Literal["mean", "sum"] = "mean",
    **changes,
) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)  # emulated ranks are threads, which share the global one

    def make_layer() -> tm.MoELayer:
        config = tm.MoEConfig(**{**CONFIG, **changes})
        settings = {"placement": placement, "expert_gradients": expert_gradients, "generator": generator}
        layer = tm.MoELayer(config, transport, overlap, **settings, dtype=torch.float64)
        nn.init.normal_(layer.router.weight, generator=generator)  # else every token would be sure of little
        return layer

    model = nn.Sequential(*[Block(dropout, make_layer) for _ in range(num_layers)])
    for block in model:
        for parameter in block.dense.parameters():
            nn.init.normal_(parameter, std=0.25, generator=generator)
    return model


def batch_of(rank: int, num_sequences: int = 6) -> Tensor:
    return torch.randn(num_sequences, 5, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return model(x).square().sum()


def step(
    model: nn.Module, x: Tensor, sizes: list[int] | None, run: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The loss and every gradient of a step: of the whole batch, or of halves of these sizes at once."""
    for parameter in model.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    function = run or partial(loss_of, model)
    loss = function(x) if sizes is None else sum(tm.two_batches(function, *x.split(sizes)))
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = {name: grad.to_local() if hasattr(grad, "to_local") else grad for name, grad in grads.items()}
    return {"loss": loss.detach(), "x": x.grad, **grads}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In fp64, up to the order of sums; the chain of layers multiplies what one rounds."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        error = (value - expected[name]).abs().max().item() if value.numel() else 0.0
        assert error <= 10 * error_floor(value.dtype, expected[name]), (name, error)


def whole_and_halves(
    transport: Transport, overlap: tm.OverlapConfig | tm.OverlapPlan, num_sequences: int = 6, first: int = 3, **changes
) -> None:
    """Compare a step in two halves with one of the whole batch, and with itself, run again."""
    model, x = make_model(transport, overlap, **changes), batch_of(transport.rank, num_sequences)
    expected = step(model, x, None)
    halves = [step(model, x, [first, num_sequences - first]) for _ in range(2)]
    assert_close(halves[0], expected)
    assert_same_bits(*halves)


PLANS = {
    "one-chunk": tm.OverlapConfig(1),
    "three-chunks": tm.OverlapConfig(3),
    "all-travel": tm.OverlapConfig(2, local_first=False),
    "serial": tm.OverlapConfig(2, serial=True),
    "windows": tm.OverlapPlan((1, 2, 1), local_start=5, window=1, backward_window=2),
    "experts": tm.OverlapConfig(2, chunk_by="experts"),
    "auto": tm.OverlapConfig(),
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4], ids="W{}".format)
def test_equals_one_batch(num_ranks: int, plan: str) -> None:
    tm.run_on_emulated_ranks(lambda t: whole_and_halves(t, PLANS[plan]), num_ranks, timeout_s=20)


def test_a_half_has_one_chunk_once_auto_has_tuned_whole_batches() -> None:
    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig()), batch_of(transport.rank)
        for _ in range(SETTLING_CALLS // NUM_LAYERS + 1):
            expected = step(model, x, None)
        assert_close(step(model, x, [2, 4]), expected)
        report = model[0].moe.last_report
        assert (report.num_chunks, report.first_half.num_chunks) == (1, 1)
        assert not report.overlap.local_first
        assert "half a batch" in report.choice

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_ranks_may_have_other_numbers_of_sequences() -> None:
    """Uneven halves, and empty ones."""

    def on_rank(transport: Transport) -> None:
        num_sequences, first = [(6, 1), (3, 3), (4, 0), (1, 1)][transport.rank]
        whole_and_halves(transport, tm.OverlapConfig(2), num_sequences, first)

    tm.run_on_emulated_ranks(on_rank, 4, timeout_s=20)


def test_one_device_and_no_layer_at_all() -> None:
    model, x = make_model(None), batch_of(0)
    assert_close(step(model, x, [2, 4]), step(model, x, None))
    assert tm.two_batches(lambda half: half + 1, 1, 2) == (2, 3)
    assert tm.two_batches(lambda half: half + 1, 1) == (2,)


def test_late_ranks_change_no_bit() -> None:
    def on_rank(transport: Transport) -> dict[str, Tensor]:
        return step(make_model(transport, tm.OverlapConfig(2)), batch_of(transport.rank), [3, 3])

    delays = [
        Delay(rank, exchange, 0.002 * (1 + (rank + exchange) % 3))
        for rank in range(2)
        for exchange in range(rank, 72, 4)
    ]
    link = tm.LinkModel(bandwidth_gb_per_s=0.01, latency_us=300)
    expected = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    for actual, wanted in zip(
        tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20, faults=delays, link=link), expected, strict=True
    ):
        assert_same_bits(actual, wanted)


def test_the_halves_alternate_and_the_backward_reverses_them(monkeypatch) -> None:
    """Each half's exchanges are posted before the other computes, in the same order on every rank."""
    events: dict[int, list[str]] = {0: [], 1: []}
    ranks: dict[int, int] = {}
    run = executor._run

    def recorded(current, actions):
        events[ranks[threading.get_ident()]].append(str(current))
        return run(current, actions)

    monkeypatch.setattr(executor, "_run", recorded)

    def on_rank(transport: Transport) -> None:
        ranks[threading.get_ident()] = transport.rank
        model = make_model(transport, tm.OverlapConfig(1, local_first=False), num_layers=2)
        step(model, batch_of(transport.rank), [3, 3])

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert events[0] == events[1]
    posts = ["metadata", "dispatch 0"]
    computes = ["group", "experts 0", "combine 0"]
    forward = [*posts * 2, *computes * 2, "reduce 0", *posts, "reduce 0", *posts, *computes * 2, *["reduce 0"] * 2]
    assert events[0][: len(forward)] == forward
    posts = ["combine_backward 0"]
    computes = ["experts_backward 0", "dispatch_backward 0", "routing_backward", "weight_grad"]
    sums = ["reduce_backward 0", "reduce_routing_backward"]
    backward = [*posts * 2, *computes * 2, *sums, *posts, *sums, *posts, *computes * 2, *sums * 2]
    assert events[0][len(forward) :] == backward


def test_the_halves_backwards_may_be_run_one_by_one() -> None:
    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig(2)), batch_of(transport.rank)
        expected = step(model, x, None)
        model.zero_grad()
        x = x.clone().requires_grad_()
        first, second = tm.two_batches(partial(loss_of, model), *x.split([2, 4]))
        first.backward()
        second.backward(retain_graph=True)
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        assert_close({"loss": (first + second).detach(), "x": x.grad, **grads}, expected)
        second.backward()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def left_by_second_halves(monkeypatch) -> list[bool]:
    """A list that gets, of each backward of half a batch, whether it leaves its gradients to the other half's."""
    found: list[bool] = []
    leave = SharedWeightGrads.leave

    def recorded(shared: SharedWeightGrads, grads: PerWeight[Tensor | None]) -> PerWeight[Tensor | None]:
        given = leave(shared, grads)
        found.append(any(grad is not None for grad in grads) and given is NO_WEIGHTS)
        return given

    monkeypatch.setattr(SharedWeightGrads, "leave", recorded)
    return found


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    """A loss whose graph reaches the experts' weights on another way, too."""
    return loss_of(model, x) + sum(block.moe.experts.gate_up_proj.square().sum() for block in model)


def twice(model: nn.Module, x: Tensor) -> Tensor:
    return loss_of(model, model(x))


@pytest.mark.parametrize("run", [loss_of, penalised, twice])
def test_the_first_half_adds_to_the_gradients_that_the_second_one_left(monkeypatch, run: Callable) -> None:
    """Autograd has no two tensors of all weights' size to sum, whoever else uses the weights."""
    left = left_by_second_halves(monkeypatch)

    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig(2), bias=True), batch_of(transport.rank)
        halves = step(model, x, [2, 4], partial(run, model))
        expected = [step(model, part, None, partial(run, model)) for part in x.split([2, 4])]
        assert_close(halves, {name: sum_or_cat(name, *(one[name] for one in expected)) for name in halves})

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert left.count(True) == left.count(False) == 2 * NUM_LAYERS * (1 + (run is twice))


def sum_or_cat(name: str, first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second]) if name == "x" else first + second


def test_gradients_are_left_to_no_half_that_does_not_follow(monkeypatch) -> None:
    """A loss of one half, a backward of each half by itself, and one that failed in between."""
    left = left_by_second_halves(monkeypatch)

    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig(2)), batch_of(transport.rank)
        first, second = x.split([2, 4])
        alone = [step(model, part, None) for part in (first, second)]
        for kept in (0, 1):
            run = partial(loss_of, model)
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            tm.two_batches(run, *leaf.split([2, 4]))[kept].backward()
            expected = {**alone[kept], "x": leaf.grad[:2] if kept == 0 else leaf.grad[2:]}
            grads = {name: p.grad for name, p in model.named_parameters()}
            assert_close({**expected, **grads}, alone[kept])

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert not any(left)


def test_what_a_failed_backward_left_reaches_no_other() -> None:
    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig(2)), batch_of(transport.rank)
        expected = step(model, x, None)
        model.zero_grad()
        is_failing = True

        def fail(grad: Tensor) -> None:
            if is_failing:
                raise KeyError("asked for")

        leaf = x.clone().requires_grad_()
        first, second = leaf.split([2, 4])
        loss = sum(tm.two_batches(partial(loss_of, model), first, second))
        leaf.register_hook(fail)  # runs behind both halves' backwards
        with pytest.raises(KeyError):
            loss.backward(retain_graph=True)
        is_failing = False
        model.zero_grad()
        leaf.grad = None
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert_close({**grads, "loss": loss.detach(), "x": leaf.grad}, expected)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_what_another_run_left_is_not_taken() -> None:
    left = PerWeight(torch.ones(1), None, None, None)
    assert SharedWeightGrads(left={torch._C._current_graph_task_id() + 1: left}).take() is NO_WEIGHTS


def test_a_half_without_gradients_takes_none_from_the_other() -> None:
    def on_rank(transport: Transport) -> None:
        model, (first, second) = make_model(transport, tm.OverlapConfig(2)), batch_of(transport.rank).split([2, 4])
        expected = step(model, second, None)
        model.zero_grad()
        leaf = second.clone().requires_grad_()

        def run(x: Tensor) -> Tensor:
            with torch.set_grad_enabled(x is leaf):
                return loss_of(model, x)

        _, loss = tm.two_batches(run, first, leaf)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert_close({**grads, "loss": loss.detach(), "x": leaf.grad}, expected)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_main_grads_get_both_halves() -> None:
    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig(2), expert_gradients="sum"), batch_of(transport.rank)
        expected = step(model, x, None)
        weights = {n: p for n, p in model.named_parameters() if n.endswith("gate_up_proj")}
        for weight in weights.values():
            weight.main_grad = torch.zeros_like(weight)
        got = step(model, x, [2, 4])
        assert not weights.keys() & got.keys()
        assert_close({**got, **{name: weight.main_grad for name, weight in weights.items()}}, expected)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_another_order_of_the_backward_is_refused() -> None:
    nodes = NodeOrder()
    numbers = [nodes.next_number() for _ in range(3)]
    nodes._task = torch._C._current_graph_task_id()
    nodes._latest = 3
    for number in reversed(numbers):
        nodes.check(number)
    with pytest.raises(RuntimeError, match="another order"):
        nodes.check(numbers[0])


def test_gradients_of_some_inputs_only_and_second_derivatives() -> None:
    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig(2)), batch_of(transport.rank).requires_grad_()
        weight = model[1].moe.router.weight
        for leaves in ([weight], [x], [model[0].moe.experts.down_proj]):
            expected = torch.autograd.grad(loss_of(model, x), leaves)
            losses = tm.two_batches(partial(loss_of, model), *x.split(3))
            assert_close(dict(enumerate(torch.autograd.grad(sum(losses), leaves))), dict(enumerate(expected)))
        losses = tm.two_batches(partial(loss_of, model), *x.split(3))
        (grad,) = torch.autograd.grad(sum(losses), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            grad.sum().backward()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_a_rank_that_needs_no_gradient_takes_part() -> None:
    def on_rank(transport: Transport) -> None:
        model = make_model(transport, tm.OverlapConfig(2)).requires_grad_(transport.rank == 0)
        x = batch_of(transport.rank)
        losses = tm.two_batches(partial(loss_of, model), *x.split(3))
        sum(losses).backward()
        expected = [p.grad for p in model.parameters()]
        model.zero_grad()
        loss_of(model, x).backward()
        for parameter, grad in zip(model.parameters(), expected, strict=True):
            assert (grad is None) == (parameter.grad is None)
            if grad is not None:
                assert_close({"": grad}, {"": parameter.grad})

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


@pytest.mark.parametrize("enter", [torch.no_grad, torch.inference_mode])
def test_inference(enter: Callable) -> None:
    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig(2)), batch_of(transport.rank)
        with enter():
            expected = model(x)
            halves = tm.two_batches(model, *x.split([2, 4]))
        assert not any(half.requires_grad for half in halves)
        assert_close({"": torch.cat(halves)}, {"": expected})
        # entered and left inside the function, between two layers
        grads = tm.two_batches(partial(_without_grad_in_the_middle, model), *x.split([2, 4]))
        assert all(grads)
        assert torch.is_grad_enabled()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def _without_grad_in_the_middle(model: nn.Sequential, x: Tensor) -> bool:
    was_right = torch.is_grad_enabled()
    with torch.no_grad():
        x = model[1](model[0](x))
        was_right &= not torch.is_grad_enabled() and not x.requires_grad
    x = model[2](x)
    return was_right and torch.is_grad_enabled() and x.requires_grad


def test_autocast_is_each_half_its_own() -> None:
    def on_rank(transport: Transport) -> None:
        model = make_model(transport, tm.OverlapConfig(2)).to(torch.float32)
        x = batch_of(transport.rank).float()

        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = model[1](model[0](x))
                assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_enabled("cpu")
            return model[2](x).square().sum()

        expected, halves = step(model, x, None, run), step(model, x, [2, 4], run)
        assert not torch.is_autocast_enabled("cpu")
        for name, value in halves.items():  # the sums of halves are rounded to bf16 each
            error = (value - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 0.02, (name, error)
        assert_same_bits(halves, step(model, x, [2, 4], run))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Sequential, num_regions: int, **settings) -> None:
        super().__init__()
        size = len(model) // num_regions
        self.regions = nn.ModuleList(model[i : i + size] for i in range(0, len(model), size))
        self.settings = {"use_reentrant": False, **settings}

    def forward(self, x: Tensor) -> Tensor:
        for region in self.regions:
            x = checkpoint(region, x, **self.settings)
        return x


@pytest.mark.sweep(1)
@pytest.mark.parametrize("overlap", [tm.OverlapConfig(2), tm.OverlapConfig()], ids=["two-chunks", "auto"])
@pytest.mark.parametrize("settings", [{}, {"context_fn": save_topk}], ids=["plain", "selective"])
@pytest.mark.parametrize("num_regions", [1, 3])
def test_checkpointing_has_the_same_bits(num_regions: int, settings: dict, overlap: tm.OverlapConfig) -> None:
    """A recompute runs alone, and is the forward's: dropout between and around the handovers tells.

    That is of one rank, since emulated ranks share the global generator.
    """

    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, overlap, dropout=0.3), batch_of(0)
        torch.manual_seed(5)
        expected = step(model, x, [2, 4])
        torch.manual_seed(5)
        again = Checkpointed(model, num_regions, **settings)
        assert_same_bits(list(step(again, x, [2, 4]).values()), list(expected.values()))

    tm.run_on_emulated_ranks(on_rank, 1, timeout_s=20)

    def on_two_ranks(transport: Transport) -> None:
        model, x = make_model(transport, overlap), batch_of(transport.rank)
        for _ in range(2):
            expected = step(model, x, [2, 4])
            again = Checkpointed(model, num_regions, **settings)
            assert_same_bits(list(step(again, x, [2, 4]).values()), list(expected.values()))

    tm.run_on_emulated_ranks(on_two_ranks, 2, timeout_s=20)


def test_dropout_is_the_same_in_every_run_and_other_in_the_halves() -> None:
    masks: list[Tensor] = []

    def run(model: nn.Module, x: Tensor) -> Tensor:
        masks.append(torch.rand(4))
        y = model(x)
        masks.append(torch.rand(4))
        return y.square().sum()

    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig(2), dropout=0.5), batch_of(0)
        results = []
        for _ in range(2):
            torch.manual_seed(7)
            results.append(step(model, x, [3, 3], partial(run, model)))
        assert_same_bits(*results)
        first, second = masks[:4], masks[4:]
        assert_same_bits(first, second)
        assert len({tuple(mask.tolist()) for mask in first}) == 4

    tm.run_on_emulated_ranks(on_rank, 1, timeout_s=20)


def test_aux_loss_is_each_half_its_own() -> None:
    def on_rank(transport: Transport) -> None:
        model = make_model(transport, tm.OverlapConfig(2), load_balance_loss_weight=0.5)
        x = batch_of(transport.rank)

        def run(x: Tensor) -> Tensor:
            loss = loss_of(model, x)
            return loss + sum(block.moe.aux_loss for block in model)

        expected = step(model, x[:2], None, run), step(model, x[2:], None, run)
        halves = step(model, x, [2, 4], run)
        assert_close(
            {name: value for name, value in halves.items() if name != "x"},
            {name: value + expected[1][name] for name, value in expected[0].items() if name != "x"},
        )
        assert all(block.moe.aux_loss is None for block in model)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


@pytest.mark.parametrize("capacity", [1024.0, 0.2], ids=["roomy", "tight"])
def test_capacity(capacity: float) -> None:
    """Where rows of a half don't fit, that call runs again alone."""
    tm.run_on_emulated_ranks(lambda t: whole_and_halves(t, tm.OverlapConfig(2, capacity=capacity)), 2, timeout_s=20)


def test_shared_expert_is_a_filler_in_both_directions() -> None:
    tm.run_on_emulated_ranks(
        lambda t: whole_and_halves(t, tm.OverlapConfig(2), shared_intermediate_size=10), 2, timeout_s=20
    )


@pytest.mark.thorough
def test_two_levels() -> None:
    tm.run_on_emulated_ranks(lambda t: whole_and_halves(TwoLevelTransport(t, 2), tm.OverlapConfig(2)), 4, timeout_s=20)


def test_a_placement_with_replicas() -> None:
    placement = tm.ExpertPlacement(((0, 1, 2, 3, 4), (5, 6, 7, 0, 1)))
    tm.run_on_emulated_ranks(lambda t: whole_and_halves(t, tm.OverlapConfig(2), placement=placement), 2, timeout_s=20)


def test_callable_activations_and_saved_inputs() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

        def forward(self, h: Tensor) -> Tensor:
            gate, up = h.chunk(2, 1)
            return torch.tanh(self.scale * gate) * up

    def on_rank(transport: Transport) -> None:
        whole_and_halves(transport, tm.OverlapConfig(2), activation=Gate())

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["parts", "all-but-the-layers"])
def test_what_stands_around_the_layers_may_be_compiled(what: str) -> None:
    """On one rank: some releases can't compile in two threads at once."""

    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig(2)), batch_of(0)
        expected = step(model, x, [2, 4])
        run = partial(loss_of, model)
        if what == "parts":
            for block in model:
                block.dense.compile(backend="eager")
        else:
            for block in model:
                block.moe.forward = torch.compiler.disable(block.moe.forward)
            run = torch.compile(run, backend="eager")
        for _ in range(2):
            assert_close(step(model, x, [2, 4], run), expected)
        assert_close(step(model, x, None, run), step(model, x, None))
        assert torch._C._dynamo.eval_frame.get_eval_frame_callback() is None

    tm.run_on_emulated_ranks(on_rank, 1, timeout_s=60)
