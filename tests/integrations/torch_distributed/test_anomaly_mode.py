"""torch.autograd.detect_anomaly around spread experts: finds NaN where experts are DTensors and where they are not."""

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
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("expert_gradients", ["mean", "sum"])
def test_it_finds_nan_in_dtensors(expert_gradients: str, way: str) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("expert",))
    layer = tm.MoELayer(CONFIG, mesh, expert_gradients=expert_gradients)
    x = torch.randn(6, 8)
    loss_of(layer, x).backward()
    expected = layer.experts.down_proj.grad.to_local().clone()
    layer.zero_grad()
    with detect_anomaly():
        loss_of(layer, x, way).backward()
        torch.testing.assert_close(layer.experts.down_proj.grad.to_local(), expected)
        with pytest.raises(RuntimeError, match="returned nan values in its 0th output"):
            (loss_of(layer, x, way) * torch.nan).backward()
        weight = layer.experts.down_proj.detach().requires_grad_()
        loss = (weight * torch.nan).to_local().sum()  # the first gradient that is NaN is a DTensor
        with pytest.raises(RuntimeError, match="MulBackward0"):
            loss.backward()


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
