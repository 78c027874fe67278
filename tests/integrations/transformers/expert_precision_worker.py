"""Ranks of test_expert_precision.py: `expert_precision_worker.py DIRECTORY CASE...` under torchrun."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from expert_precision_models import IDS, PRECISION, mixtral, relative, step
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from worker_cases import run_cases

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

DIRECTORY = Path(sys.argv[1])
CONFIG = tm.MoEConfig(64, 96, num_experts=4, top_k=2, expert_precision=PRECISION)
ROWS = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def run_model() -> None:
    """A model whose experts are spread computes as on one device."""
    model = mixtral()
    tmt.set_expert_precision(model, PRECISION)
    logits, grad = step(model)
    model.zero_grad()
    tmt.parallelize(model, dist.group.WORLD, tm.OverlapConfig(2))
    own_logits, own_grad = step(model, IDS.chunk(dist.get_world_size())[dist.get_rank()])
    assert relative(own_logits, logits.chunk(dist.get_world_size())[dist.get_rank()]) < 0.02
    assert relative(whole(own_grad), grad) < 0.05


def three_steps(layer: tm.MoELayer, rows: Tensor) -> list[Tensor]:
    """Train for three steps with AdamW and clipping, and give the losses."""
    optimizer, losses = torch.optim.AdamW(layer.parameters(), lr=0.01), []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(rows).float().square().mean()
        loss.backward()
        if layer.experts.transport is not None:
            dist.all_reduce(layer.router.weight.grad)
            layer.router.weight.grad /= dist.get_world_size()
        tm.clip_grad_norm_(layer.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def layer_of_everybody() -> tm.MoELayer:
    return tm.MoELayer(CONFIG, generator=torch.Generator().manual_seed(1))


def run_spread() -> None:
    """fp32 parameters under autocast, clipped and trained over ranks, and their checkpoint."""
    alone = layer_of_everybody()
    expected = three_steps(alone, ROWS)
    layer = layer_of_everybody()
    tm.parallelize(layer, dist.group.WORLD, tm.OverlapConfig(2))
    own = ROWS.chunk(dist.get_world_size())[dist.get_rank()]
    losses = three_steps(layer, own)
    for loss, of_all in zip(losses, expected, strict=True):
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / dist.get_world_size(), of_all, rtol=0.01, atol=0)
    dcp.save({"layer": layer.state_dict()}, checkpoint_id=DIRECTORY)
    loaded = layer_of_everybody()
    state = {"layer": loaded.state_dict()}
    dcp.load(state, checkpoint_id=DIRECTORY)
    loaded.load_state_dict(state["layer"])
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(loaded(own).detach(), layer(own).detach()) < 0.01


def run_fully_sharded() -> None:
    """FSDP2 keeps fp32 shards and gathers bf16 weights, which change under it after each step of the optimizer."""
    alone, mesh = layer_of_everybody(), init_device_mesh("cpu", (dist.get_world_size(),))
    layer = copy.deepcopy(alone)
    fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    alone_bf16, rows = torch.optim.AdamW(alone.parameters(), lr=0.01), ROWS.chunk(dist.get_world_size())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for _ in range(3):
        for one in (optimizer, alone_bf16):
            one.zero_grad()
        narrow = copy.deepcopy(alone).bfloat16()
        losses = [narrow(part.bfloat16()).float().square().mean() for part in rows]
        (sum(losses) / len(losses)).backward()
        for parameter, cast in zip(alone.parameters(), narrow.parameters(), strict=True):
            parameter.grad = cast.grad.float()
        loss = layer(rows[dist.get_rank()].bfloat16()).float().square().mean()
        loss.backward()
        torch.testing.assert_close(loss, losses[dist.get_rank()], rtol=0.01, atol=0)
        for mine, theirs in zip(layer.parameters(), alone.parameters(), strict=True):
            assert relative(whole(mine.grad), theirs.grad) < 0.03
        alone_bf16.step()
        optimizer.step()


CASES = {"model": run_model, "spread": run_spread, "fully_sharded": run_fully_sharded}
run_cases(lambda name: CASES[name](), sys.argv[2:])
