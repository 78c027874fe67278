"""A second derivative raises whichever tensors it is of and by, and a first one may keep its graph."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from same_bits import assert_same_bits
from torch import Tensor
from torch.autograd.functional import hessian, hvp, jvp, vhp
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tritonmoe as tm
from tritonmoe.transports import LocalTransport, Transport

T, E, D, FF, K = 9, 4, 16, 8, 3
REFUSED = r"cannot be differentiated again.*plain PyTorch"
ADAPTERS = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def draw(frozen: tuple[str, ...] = (), num_experts: int = E) -> tuple[dict[str, Tensor], Tensor]:
    """Return all that moe_mlp differentiates, and ids."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (T, D),
        "topk_weights": (T, K),
        "gate_up_proj": (num_experts, 2 * FF, D),
        "down_proj": (num_experts, D, FF),
        "gate_up_bias": (num_experts, 2 * FF),
        "down_bias": (num_experts, D),
        "gate_up_a": (num_experts, 2, D),
        "gate_up_b": (num_experts, 2 * FF, 2),
        "down_a": (num_experts, 2, FF),
        "down_b": (num_experts, D, 2),
    }
    leaves = {
        name: torch.randn(*shape, generator=generator).requires_grad_(name not in frozen)
        for name, shape in shapes.items()
    }
    return leaves, torch.randint(0, E, (T, K), generator=generator)


def call(mlp: Callable[..., Tensor], leaves: dict[str, Tensor], ids: Tensor) -> Tensor:
    factors = {name: leaves[name] for name in ADAPTERS}
    others = {name: leaf for name, leaf in leaves.items() if name not in ADAPTERS}
    return mlp(topk_ids=ids, adapters=tm.ExpertAdapters(**factors), **others)


def _operator(**arguments) -> Tensor:
    with FlopCounterMode(display=False):
        return tm.moe_mlp(**arguments)


def _checkpointed(use_reentrant: bool, **arguments) -> Tensor:
    names = [name for name in arguments if name != "adapters"]
    function = lambda *values: tm.moe_mlp(adapters=arguments["adapters"], **dict(zip(names, values, strict=True)))  # noqa: E731
    return checkpoint(function, *(arguments[name] for name in names), use_reentrant=use_reentrant)


parallel = partial(tm.expert_parallel_mlp, num_experts=E, transport=LocalTransport())
WAYS: dict[str, Callable[..., Tensor]] = {
    "eager": tm.moe_mlp,
    "reference": partial(tm.moe_mlp, backend="reference"),
    "save_input": partial(tm.moe_mlp, save="input"),
    "callable": partial(tm.moe_mlp, activation=lambda h: h[:, :FF].relu() * h[:, FF:]),
    "operator": _operator,
    "checkpointed": partial(_checkpointed, False),
    "expert_parallel": parallel,
    "expert_parallel_save_input": partial(parallel, save="input"),
    "expert_parallel_callable": partial(parallel, activation=lambda h: h[:, :FF].relu() * h[:, FF:]),
    "compiled": torch.compile(tm.moe_mlp, backend="eager"),
}


def check_every_pair(y: Tensor, leaves: dict[str, Tensor]) -> None:
    """Check that the gradient of any tensor is refused a derivative by any tensor, and by y's own gradient."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    dout = torch.ones_like(y).requires_grad_()
    grads = torch.autograd.grad(y, list(wanted.values()), dout, create_graph=True)
    for of, grad in zip(wanted, grads, strict=True):
        assert grad.requires_grad, of
        for by, tensor in {**wanted, "dout": dout}.items():
            with pytest.raises(RuntimeError, match=REFUSED):
                pytest.fail(f"{of} by {by}: {torch.autograd.grad(grad.sum(), tensor, allow_unused=True)}")


@pytest.mark.sweep(1)
@pytest.mark.parametrize("frozen", [(), ("gate_up_proj", "gate_up_a"), ("topk_weights", "down_proj", *ADAPTERS)])
@pytest.mark.parametrize("way", WAYS)
def test_every_pair_is_refused(way: str, frozen: tuple[str, ...]) -> None:
    """With frozen weights x is not among what is saved for the backward."""
    torch._dynamo.reset()
    leaves, ids = draw(frozen)
    check_every_pair(call(WAYS[way], leaves, ids), leaves)


@pytest.mark.parametrize("halves", [False, True])
def test_every_pair_is_refused_on_ranks(halves: bool) -> None:
    def on_rank(transport: Transport) -> None:
        leaves, ids = draw(("gate_up_proj",), E // 2)
        mlp = partial(tm.expert_parallel_mlp, num_experts=E, transport=transport, overlap=tm.OverlapConfig(2))
        rows = {name: leaves[name] for name in ("x", "topk_weights")}
        if halves:
            run = lambda half: call(mlp, {**leaves, "x": half[0], "topk_weights": half[1]}, half[2])  # noqa: E731
            parts = (tensor.split(5) for tensor in (*rows.values(), ids))
            y = torch.cat(tm.two_batches(run, *zip(*parts, strict=True)))
        else:
            y = call(mlp, leaves, ids)
        check_every_pair(y, leaves)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


@pytest.mark.parametrize("loss", [Tensor.sum, lambda y: y.square().sum()], ids=["linear", "square"])
@pytest.mark.parametrize("transport", [None, LocalTransport()], ids=["one device", "expert parallel"])
def test_products_with_the_hessian_of_a_layer(transport: Transport | None, loss: Callable[[Tensor], Tensor]) -> None:
    """The router's own second derivatives alone would be a wrong answer."""
    config = tm.MoEConfig(D, FF, E, 2, shared_intermediate_size=4)
    layer = tm.MoELayer(config, transport, dtype=torch.float64)
    x = torch.randn(3, D, dtype=torch.float64)
    for product in (hvp, vhp):
        with pytest.raises(RuntimeError, match=REFUSED):
            product(lambda x: loss(layer(x)), x, torch.ones_like(x))
    with pytest.raises(RuntimeError, match=REFUSED):
        hessian(lambda x: loss(layer(x)), x)
    with pytest.raises(RuntimeError, match=REFUSED):
        jvp(layer, x, torch.ones_like(x))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(loss(layer(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        dx.square().sum().backward(inputs=[x])


@pytest.mark.parametrize("way", WAYS)
def test_first_derivatives_that_keep_their_graph(way: str) -> None:
    """They are those without it, may be changed in place, and a second derivative elsewhere in the graph is right."""
    torch._dynamo.reset()
    leaves, ids = draw()
    expected = torch.autograd.grad(call(WAYS[way], leaves, ids).square().sum(), list(leaves.values()))
    other = torch.tensor(3.0, requires_grad=True)
    loss = call(WAYS[way], leaves, ids).square().sum() + other**3
    *grads, dother = torch.autograd.grad(loss, [*leaves.values(), other], create_graph=True)
    assert_same_bits(dict(zip(leaves, grads, strict=True)), dict(zip(leaves, expected, strict=True)))
    for grad in grads:
        grad.mul_(2)  # as gradient clipping does
    assert torch.autograd.grad(dother, other)[0] == 18.0


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_routers_second_derivatives_without_kernels(backend: str) -> None:
    router = tm.TopKRouter(tm.MoEConfig(D, FF, E, 2), backend=backend, dtype=torch.float64)
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: (router(x).topk_weights, router(x).logits), x)
