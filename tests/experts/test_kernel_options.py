"""num_sms and batch_invariant: checked where they enter, and handed to every operation."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.layer import KernelOptions
from tritonmoe.ops.backends import torch as torch_backend
from tritonmoe.transports import LocalTransport, Transport

PRODUCTS = ("up", "down", "down_grad", "up_grad", "weight_grad")


def leaves() -> tuple[Tensor, ...]:
    """x (5, 4), ids (5, 2), weights (5, 2), gate_up_proj (3, 6, 4), down_proj (3, 4, 3)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 4), (5, 2), (3, 6, 4), (3, 4, 3))
    x, weights, w1, w2 = (torch.randn(*s, generator=generator).requires_grad_() for s in shapes)
    return x, torch.randint(3, (5, 2), generator=generator), weights, w1, w2


@pytest.fixture
def seen_options(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[KernelOptions]]:
    """What every product of the torch backend was given as options."""
    seen: dict[str, set[KernelOptions]] = {}

    def spied(name: str, op: Callable) -> Callable:
        def spy(*args, **kwargs):
            seen.setdefault(name, set()).add(kwargs.get("options", KernelOptions()))
            return op(*args, **kwargs)

        return spy

    for name in PRODUCTS:
        monkeypatch.setattr(torch_backend, name, spied(name, getattr(torch_backend, name)))
    return seen


def gated_silu(h: Tensor) -> Tensor:
    gate, up_half = h.chunk(2, dim=1)
    return F.silu(gate) * up_half


@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("activation", ["silu", gated_silu], ids=["fused", "callable"])
@pytest.mark.parametrize("parallel", [False, True], ids=["one_device", "expert_parallel"])
def test_options_reach_every_product(seen_options, parallel: bool, activation, save: str) -> None:
    options = {"num_sms": 7, "activation": activation, "save": save, "backend": "torch"}
    if parallel:
        y = tm.expert_parallel_mlp(*leaves(), num_experts=3, transport=LocalTransport(), **options)
    else:
        y = tm.moe_mlp(*leaves(), **options)
    y.sum().backward()
    assert seen_options == {name: {KernelOptions(num_sms=7)} for name in PRODUCTS}


def test_products_know_that_exchanges_run_beside_them(seen_options) -> None:
    def run(transport: Transport) -> None:
        x, ids, weights, w1, w2 = leaves()
        share = slice(2 * transport.rank, 2 * transport.rank + 2)
        w1, w2 = (torch.cat([w, w[:1]])[share].detach().requires_grad_() for w in (w1, w2))
        y = tm.expert_parallel_mlp(x, ids, weights, w1, w2, num_experts=4, transport=transport, backend="torch")
        y.sum().backward()

    tm.run_on_emulated_ranks(run, 2)
    assert seen_options == {name: {KernelOptions(beside_exchanges=True)} for name in PRODUCTS}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_products_know_of_other_collectives(num_ranks: int, seen_options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP or DistributedDataParallel kernels of one device run beside collectives, too."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: num_ranks)
    tm.moe_mlp(*leaves(), backend="torch").sum().backward()
    assert seen_options == {name: {KernelOptions(beside_exchanges=num_ranks > 1)} for name in PRODUCTS}


def test_modules_hand_them_on(seen_options) -> None:
    config = tm.MoEConfig(hidden_size=4, intermediate_size=3, num_experts=3, top_k=2)
    for transport in (None, LocalTransport()):
        layer = tm.MoELayer(config, transport, num_sms=7)
        layer(leaves()[0]).sum().backward()
    assert seen_options == {name: {KernelOptions(num_sms=7)} for name in PRODUCTS}


@pytest.mark.parametrize("num_sms", [0, -1, 1.5, True, "all"], ids=repr)
def test_bad_num_sms(num_sms) -> None:
    config = tm.MoEConfig(hidden_size=4, intermediate_size=3, num_experts=3, top_k=2)
    for call in (
        lambda: tm.moe_mlp(*leaves(), num_sms=num_sms),
        lambda: tm.expert_parallel_mlp(*leaves(), num_experts=3, transport=LocalTransport(), num_sms=num_sms),
        lambda: tm.MoELayer(config, num_sms=num_sms),
    ):
        with pytest.raises(ValueError, match=r"num_sms must be None \(all\) or an integer of at least 1"):
            call()


def test_batch_invariant_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="batch_invariant must be True or False, got 1"):
        tm.moe_mlp(*leaves(), batch_invariant=1)
