"""A weight for an auxiliary loss that nobody reads is said once; whoever reads it hears nothing."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.transports import LocalTransport

CONFIG = tm.MoEConfig(8, 6, 4, 2, load_balance_loss_weight=0.01)
SAID = "add layer.aux_loss to the loss"


def steps(layer: tm.MoELayer, loss_of: Callable[[tm.MoELayer, torch.Tensor], torch.Tensor], number: int = 5) -> None:
    for _ in range(number):
        loss_of(layer, torch.randn(6, 8, requires_grad=True)).backward()


def forgotten(layer: tm.MoELayer, x: torch.Tensor) -> torch.Tensor:
    return layer(x).square().mean()


def added(layer: tm.MoELayer, x: torch.Tensor) -> torch.Tensor:
    return layer(x).square().mean() + layer.aux_loss


def messages(caplog: pytest.LogCaptureFixture) -> int:
    return sum(SAID in record.message for record in caplog.records)


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


@pytest.mark.parametrize("config", [CONFIG, tm.MoEConfig(8, 6, 4, 2, z_loss_weight=0.1)], ids=["balance", "z"])
@pytest.mark.parametrize("transport", [None, LocalTransport()], ids=["one device", "transport"])
def test_it_is_said_once_at_the_third_forward(config, transport, caplog) -> None:
    layer = tm.MoELayer(config, transport)
    steps(layer, forgotten, 2)
    assert messages(caplog) == 0
    layer(torch.randn(6, 8))
    assert messages(caplog) == 1
    steps(layer, forgotten)
    steps(copy.deepcopy(layer), forgotten)
    assert messages(caplog) == 1


def test_checkpointed_and_in_halves(caplog) -> None:
    steps(tm.MoELayer(CONFIG), lambda layer, x: checkpoint(layer, x, use_reentrant=False).sum())
    assert messages(caplog) == 1
    halves = lambda layer, x: sum(tm.two_batches(lambda half: layer(half).sum(), *x.split(3)))  # noqa: E731
    steps(tm.MoELayer(CONFIG, LocalTransport()), halves)
    assert messages(caplog) == 2


def _backward_first(layer: tm.MoELayer, x: torch.Tensor) -> torch.Tensor:
    layer(x).sum().backward(retain_graph=True)
    return layer.aux_loss


def _accumulated(layer: tm.MoELayer, x: torch.Tensor) -> torch.Tensor:
    return sum(layer(part).sum() + layer.aux_loss for part in x.split(2))


def _reentrant(layer: tm.MoELayer, x: torch.Tensor) -> torch.Tensor:
    return sum(part.sum() for part in checkpoint(lambda x: (layer(x), layer.aux_loss), x, use_reentrant=True))


def _in_halves(layer: tm.MoELayer, x: torch.Tensor) -> torch.Tensor:
    return sum(tm.two_batches(lambda half: added(layer, half), *x.split(3)))


@pytest.mark.parametrize("loss_of", [added, _backward_first, _accumulated, _reentrant])
def test_who_reads_it_hears_nothing(loss_of, caplog) -> None:
    steps(tm.MoELayer(CONFIG), loss_of)
    assert messages(caplog) == 0


def test_who_reads_it_in_halves_hears_nothing(caplog) -> None:
    steps(tm.MoELayer(CONFIG, LocalTransport()), _in_halves)
    assert messages(caplog) == 0


def test_nothing_is_said_without_a_weight_or_without_training(caplog) -> None:
    steps(tm.MoELayer(tm.MoEConfig(8, 6, 4, 2)), forgotten)
    steps(tm.MoELayer(CONFIG).eval(), forgotten)
    for _ in range(5):
        tm.MoELayer(CONFIG)(torch.randn(6, 8))
    layer = tm.MoELayer(CONFIG)
    for _ in range(5):
        layer(torch.randn(6, 8))  # no backward
        with torch.no_grad():
            layer(torch.randn(6, 8))
    frozen = tm.MoELayer(CONFIG)
    frozen.router.requires_grad_(False)
    for _ in range(5):
        frozen(torch.randn(6, 8)).sum().backward()
    assert messages(caplog) == 0


def test_the_attribute_is_as_before(caplog) -> None:
    layer = tm.MoELayer(CONFIG)
    assert layer.aux_loss is None
    layer(torch.randn(6, 8))
    assert layer.aux_loss.requires_grad
    assert copy.deepcopy(layer).aux_loss is None
    layer.aux_loss = None
    assert layer.aux_loss is None
    assert "aux_loss" not in layer.state_dict()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_who_reads_it_in_a_compiled_loss_hears_nothing(backend, caplog) -> None:
    layer = tm.MoELayer(CONFIG)
    loss = torch.compile(lambda y: y.square().mean() + layer.aux_loss, backend=backend, fullgraph=True)
    steps(layer, lambda layer, x: loss(layer(x)))
    assert messages(caplog) == 0
