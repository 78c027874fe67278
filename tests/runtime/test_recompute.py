"""Activation checkpointing of experts: a backward goes on with what the recompute made, and plans change between."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.expert_parallel.plans import plain as agreement
from tritonmoe.overlap.tuning.tuner import SETTLING_CALLS
from tritonmoe.routing import z_loss
from tritonmoe.runtime import autograd
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.transports import LocalTransport, Transport


@pytest.fixture(autouse=True)
def _nothing_kept_by_others() -> None:
    """A backward that raises leaves what its recomputes kept."""
    autograd._kept_by_recomputes.clear()


def swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def make_layers(transport: Transport, overlap: tm.OverlapConfig, **changes) -> list[tm.MoELayer]:
    config = tm.MoEConfig(hidden_size=32, intermediate_size=16, num_experts=8, top_k=3, **changes)
    return [tm.MoELayer(config, transport, overlap, generator=torch.Generator().manual_seed(s)) for s in range(2)]


def step(layers: list[tm.MoELayer], x: Tensor, regions: list[list[int]], use_reentrant: bool | None) -> list[Tensor]:
    """The output, and the gradients of x and every parameter; None checkpoints nothing."""

    def run(region: list[int], rows: Tensor) -> Tensor:
        for index in region:
            rows = rows + layers[index](rows)
        return rows

    x = x.clone().requires_grad_()
    y = x
    for region in regions:
        y = run(region, y) if use_reentrant is None else checkpoint(run, region, y, use_reentrant=use_reentrant)
    parameters = [p for layer in layers for p in layer.parameters()]
    for parameter in parameters:
        parameter.grad = None
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in parameters)]


@pytest.mark.thorough
@pytest.mark.sweep(1)
@pytest.mark.parametrize("changes", [{}, {"activation": swiglu}], ids=["fused", "callable"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("regions", [[[0], [1]], [[0, 1]]], ids=["a_layer_each", "both_layers"])
def test_gradients_while_auto_still_tries_plans(
    regions: list[list[int]], use_reentrant: bool, changes: dict[str, Callable]
) -> None:
    def on_rank(transport: Transport) -> set[int]:
        tried = make_layers(transport, tm.OverlapConfig(), **changes)
        fixed = make_layers(transport, tm.OverlapConfig(2), **changes)
        num_chunks = set()
        for number in range(SETTLING_CALLS // 2 + 2):
            x = torch.randn(24 + 8 * transport.rank, 32, generator=torch.Generator().manual_seed(number))
            results = [step(tried, x, regions, use_reentrant), step(fixed, x, regions, None)]
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
            num_chunks.add(tried[0].last_report.num_chunks)
        return num_chunks

    for num_chunks in tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60):
        assert len(num_chunks) > 1
    assert not autograd._kept_by_recomputes


@pytest.mark.parametrize("regions", [[[0], [1]], [[0, 1]]], ids=["a_layer_each", "both_layers"])
def test_a_recompute_takes_the_plan_of_its_forward(regions: list[list[int]], monkeypatch) -> None:
    calls: dict[int, list[tuple[bool, tm.OverlapPlan]]] = {0: [], 1: []}
    plan_tokens = agreement.plan_tokens

    def recorded(topk_ids, num_experts, rank, size, chosen, *others):
        calls[rank].append((is_recomputing(), chosen))
        return plan_tokens(topk_ids, num_experts, rank, size, chosen, *others)

    monkeypatch.setattr(agreement, "plan_tokens", recorded)

    def on_rank(transport: Transport) -> None:
        layers = make_layers(transport, tm.OverlapConfig())
        for number in range(SETTLING_CALLS // 2 + 1):
            step(layers, torch.randn(40, 32, generator=torch.Generator().manual_seed(number)), regions, False)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)
    for of_rank in calls.values():
        for first in range(0, len(of_rank), 4):
            kinds, plans = zip(*of_rank[first : first + 4], strict=True)
            assert kinds == (False, False, True, True)
            assert plans[2:] == ((plans[1], plans[0]) if len(regions) == 2 else plans[:2])
    assert len({plan for _, plan in calls[0]}) > 1


@pytest.mark.parametrize("activation", ["silu", swiglu], ids=["fused", "callable"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_routes_that_flip_in_the_recompute(activation, use_reentrant: bool) -> None:
    """As PyTorch's own operations have it: all of the backward is that of the recompute."""
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((9, 8), (9, 2), (5, 12, 8), (5, 8, 6))]
    routes = [torch.rand(9, 5).topk(2).indices for _ in range(2)]

    def run(ids: Tensor, *tensors: Tensor) -> Tensor:
        x, weights, up, down = tensors
        return tm.moe_mlp(x, ids, weights, up, down, activation=activation).square()

    expected = torch.autograd.grad(run(routes[1], *leaves).sum(), leaves)
    pending = iter(routes)
    checkpoint(lambda *tensors: run(next(pending), *tensors), *leaves, use_reentrant=use_reentrant).sum().backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
    assert not autograd._kept_by_recomputes


def test_a_second_backward_recomputes_again() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((9, 8), (9, 2), (5, 12, 8), (5, 8, 6))]
    ids = torch.rand(9, 5).topk(2).indices

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return tm.moe_mlp(x, ids, weights, up, down)

    expected = torch.autograd.grad(run(*leaves).sum(), leaves)
    out = checkpoint(run, *leaves, use_reentrant=False).sum()
    for _ in range(2):
        grads = torch.autograd.grad(out, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert not autograd._kept_by_recomputes


class _Recomputed(torch.autograd.Function):
    """Does nothing, and tells which graphs of recomputes are alive."""

    graphs: ClassVar["weakref.WeakSet[Any]"] = weakref.WeakSet()
    num_alive: ClassVar[list[int]] = []
    """When each recompute began."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if is_recomputing():
            _Recomputed.num_alive.append(len(_Recomputed.graphs))
            ctx.held = torch.nn.Identity()
            _Recomputed.graphs.add(ctx.held)
        return x * 1

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant", "two_batches"])
def test_a_layer_keeps_no_recomputed_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the function reads of its layers is the recompute's; before the next recompute it is the forward's again."""
    if kind == "two_batches":
        pytest.importorskip("greenlet")
    monkeypatch.setattr(_Recomputed, "num_alive", [])
    layers = make_layers(LocalTransport(), tm.OverlapConfig(2), load_balance_loss_weight=0.1)
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    leaves = [x, *(parameter for layer in layers for parameter in layer.parameters())]

    def block(layer: tm.MoELayer, rows: Tensor) -> tuple[Tensor, Tensor]:
        y = layer(_Recomputed.apply(rows))
        return y + rows, z_loss(layer.last_routing.logits) + layer.aux_loss

    def model(rows: Tensor, use_reentrant: bool | None) -> Tensor:
        loss = torch.zeros(())
        for layer in layers:
            run = partial(block, layer)
            rows, own = run(rows) if use_reentrant is None else checkpoint(run, rows, use_reentrant=use_reentrant)
            loss = loss + own
        return loss + rows.square().mean()

    def gradients(use_reentrant: bool | None) -> list[Tensor]:
        if kind == "two_batches":
            loss = sum(tm.two_batches(lambda rows: model(rows, use_reentrant), x[:8], x[8:]))
        else:
            loss = model(x, use_reentrant)
        left = [(layer.last_routing, layer.aux_loss) for layer in layers]
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        assert all(layer.last_routing is a and layer.aux_loss is b for layer, (a, b) in zip(layers, left, strict=True))
        return [leaf.grad for leaf in leaves]

    for actual, expected in zip(gradients(kind == "reentrant"), gradients(None), strict=True):
        torch.testing.assert_close(actual, expected)
    assert _Recomputed.num_alive == ([0, 1, 0, 1] if kind == "two_batches" else [0, 0])
    assert not _Recomputed.graphs


def test_after_a_backward_that_raised_a_layer_has_what_the_next_forward_leaves() -> None:
    layer = make_layers(LocalTransport(), tm.OverlapConfig(2))[0]

    def forward(hook: Callable[[Tensor], None]) -> Tensor:
        def run(x: Tensor) -> Tensor:
            y = layer(x)
            y.register_hook(hook)
            return y.square()

        return checkpoint(run, torch.randn(8, 32, requires_grad=True), use_reentrant=False).sum()

    def fail(_: Tensor) -> None:
        raise ValueError("own")

    loss, of_forward = forward(fail), layer.last_routing
    with pytest.raises(ValueError, match="own"):
        loss.backward()
    assert layer.last_routing is not of_forward
    loss, of_forward = forward(lambda _: None), layer.last_routing
    loss.backward()
    assert layer.last_routing is of_forward


def keeping_everything(function: Callable, *tensors: Tensor) -> Tensor:
    return function(*tensors)


def checkpointed(function: Callable, *tensors: Tensor) -> Tensor:
    return checkpoint(function, *tensors, use_reentrant=False)


@pytest.mark.parametrize("way", ["one device", "one device, fused", "ranks", "two_batches"])
def test_a_checkpointed_forward_keeps_nothing_for_its_backward(way: str) -> None:
    """What autograd saves is left to checkpointing, so nothing else may hold it."""
    if way == "two_batches":
        pytest.importorskip("greenlet")
    torch.manual_seed(0)
    shapes = (9, 16), (9, 2), (4, 24, 16), (4, 16, 12)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ids, transport, made = torch.rand(9, 4).topk(2).indices, LocalTransport(), []

    def remember(tensor: Tensor) -> Tensor:
        made.append(weakref.ref(tensor))
        return tensor

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        up, down = remember(up * 0.5), remember(down * 0.5)
        halves = []
        if way.startswith("one device"):
            activation = "silu" if "fused" in way else lambda h: remember(swiglu(h))
            return tm.moe_mlp(x, ids, weights, up, down, activation=activation)
        y = tm.expert_parallel_mlp(
            *(x, ids, weights, up, down),
            num_experts=4,
            transport=transport,
            activation=lambda h: remember(swiglu(h)),
            fillers=[lambda: halves.append(remember(x * x))],
        )
        return y + halves[0]

    def gradients(call: Callable) -> tuple[Tensor, ...]:
        if way == "two_batches":
            losses = tm.two_batches(lambda scale: call(run, leaves[0] * scale, *leaves[1:]).square().sum(), 1.0, 2.0)
        else:
            losses = (call(run, *leaves).square().sum(),)
        gc.collect()
        alive = [tuple(tensor().shape) for tensor in made if tensor() is not None]
        assert bool(alive) == (call is keeping_everything), alive
        return torch.autograd.grad(sum(losses), leaves)

    for actual, expected in zip(gradients(checkpointed), gradients(keeping_everything), strict=True):
        torch.testing.assert_close(actual, expected)
