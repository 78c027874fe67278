"""torch.autograd.detect_anomaly around spread experts: right, or refused with the way out."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.autograd import detect_anomaly, set_detect_anomaly
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.transports import Transport

CONFIG = tm.MoEConfig(8, 6, 4, 2)
WAYS = ["whole", "checkpoint", "halves"]
REFUSED = r"detect_anomaly looks for NaN .*spread experts.*check_nan=False.*run_on_emulated_ranks"


@pytest.fixture
def _group_of_one(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def loss_of(layer: tm.MoELayer, x: torch.Tensor, way: str = "whole") -> torch.Tensor:
    if way == "halves":
        return sum(tm.two_batches(lambda half: layer(half).square().sum(), *x.split(3)))
    if way == "checkpoint":
        return checkpoint(layer, x, use_reentrant=False).square().sum()
    return layer(x).square().sum()


@pytest.mark.usefixtures("_group_of_one")
@pytest.mark.parametrize("expert_gradients", ["mean", "sum"])
def test_dtensors_refuse_the_search_for_nan(expert_gradients: str) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("expert",))
    layer = tm.MoELayer(CONFIG, mesh, expert_gradients=expert_gradients)
    x = torch.randn(6, 8)
    loss_of(layer, x).backward()
    expected = layer.experts.down_proj.grad.to_local().clone()
    for way in WAYS:
        with detect_anomaly(), pytest.raises(RuntimeError, match=REFUSED):
            loss_of(layer, x, way)
        layer.zero_grad()
        with detect_anomaly(check_nan=False):
            loss_of(layer, x, way).backward()
        torch.testing.assert_close(layer.experts.down_proj.grad.to_local(), expected)
    with detect_anomaly(), torch.no_grad():
        layer(x)
    layer.requires_grad_(False)
    x.requires_grad_()
    with detect_anomaly():
        loss_of(layer, x).backward()
    assert x.grad.any()


@pytest.mark.parametrize("way", WAYS)
def test_it_finds_nan_on_emulated_ranks(way: str) -> None:
    def on_rank(transport: Transport) -> tuple[torch.Tensor, str]:
        layer = tm.MoELayer(CONFIG, transport, tm.OverlapConfig(2), generator=torch.Generator().manual_seed(0))
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(transport.rank))
        loss_of(layer, x, way).backward()
        grad = layer.experts.down_proj.grad.clone()
        layer.zero_grad()
        loss_of(layer, x, way).backward()
        assert torch.equal(layer.experts.down_proj.grad, grad)
        with pytest.raises(RuntimeError) as caught:
            (loss_of(layer, x, way) * torch.nan).backward()
        return grad, str(caught.value)

    with set_detect_anomaly(True):
        watched = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert all("returned nan values in its 0th output" in said for _, said in watched)
