"""Ranks of test_saved.py: `saved_worker.py CASE...` under torchrun says "passed CASE" of each on rank 0."""

import copy
import io
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from worker_cases import run_cases

import tritonmoe as tm

CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=4, top_k=2)
BEFORE_SHARDS = Path(__file__).parent / "written_by_0.1.0"
"""What 0.1.0 has written before a module's attributes became its ExpertShards: of a layer of 4 experts with biases
(D=8, F=4, K=2) itself, and the distributed checkpoint after a step of AdamW on ranks that held experts 2, 0 and 1, 3.
"""
REFUSED = "would keep one rank's experts alone"


def one_dimension() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))


def trained(mesh: DeviceMesh, *, is_sharded: bool = False) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Return a model after a step. Its second dense weight has the shape of the experts' first one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), tm.MoELayer(CONFIG))
    net.alike = nn.Parameter(torch.randn(4, 24, 8))
    tm.parallelize(net, mesh)
    if is_sharded:
        fully_shard(net, mesh=mesh, ignored_params=set(tm.expert_parameters(net)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    called = net if is_sharded else DistributedDataParallel(net, find_unused_parameters=True)
    called(torch.randn(6, 8, generator=torch.Generator().manual_seed(dist.get_rank()))).square().mean().backward()
    optimizer.step()
    return net, optimizer


def saved(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def case_written_before_shards() -> None:
    """A distributed checkpoint of a release before ExpertShards loads: on other placements, and on one device."""
    expected = torch.load(BEFORE_SHARDS / "expected.pt")
    config = tm.MoEConfig(8, 4, 4, 2, bias=True)
    moments = []
    for placement in (tm.ExpertPlacement(((2, 0), (1, 3))), None):
        layer = tm.MoELayer(config)
        tm.parallelize(layer, dist.group.WORLD, placement=placement)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=False)
        layer(torch.ones(3, 8)).sum().backward()
        optimizer.step()
        state = {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=str(BEFORE_SHARDS / "spread"))
        layer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            torch.testing.assert_close(layer(expected["x"]), expected["y"])
        shown = optimizer.state_dict()["state"].values()
        moments.append([one["exp_avg"].full_tensor() for one in shown if hasattr(one["exp_avg"], "full_tensor")])
    for one, other in zip(*moments, strict=True):
        assert torch.equal(one, other)
    assert len(moments[0]) == 4
    layer = torch.load(BEFORE_SHARDS / "layer.pt", weights_only=False)
    again = copy.deepcopy(layer)
    assert layer.experts.transport is layer.experts.placement is again.experts.expert_shards is None
    assert layer.experts.expert_ids == (0, 1, 2, 3)
    tm.parallelize(again, dist.group.WORLD)
    with torch.no_grad():
        torch.testing.assert_close(again(expected["x"]), layer(expected["x"]))


def case_dense_shards() -> None:
    """What FSDP2 shards on the experts' own mesh is saved and copied as torch does; experts and their states aren't."""
    net, optimizer = trained(one_dimension(), is_sharded=True)
    weights = net.state_dict()
    experts = {name for name in weights if ".experts." in name}
    assert len(experts) == 2
    dense = {name: weight for name, weight in weights.items() if name not in experts}
    assert dense["alike"].shape == net[1].experts.gate_up_proj.shape
    for name, weight in saved(dense).items():
        assert torch.equal(local(weight), local(dense[name]))
        assert weight.placements == dense[name].placements
    for weight in (net[0].weight, net.alike, net[1].router.weight):
        assert torch.equal(local(copy.copy(weight)), local(weight))
    assert torch.equal(
        local(saved(optimizer.state[net[0].weight]["exp_avg"])), local(optimizer.state[net[0].weight]["exp_avg"])
    )
    net.convolution = nn.Conv1d(8, 4, 3)  # as many rows as there are experts
    fully_shard(net.convolution, mesh=net[0].weight.device_mesh)
    convolved = torch.optim.AdamW(net.convolution.parameters(), lr=0.1)
    net.convolution(torch.ones(1, 8, 3)).sum().backward()
    convolved.step()
    of_convolution = convolved.state_dict()
    moment = saved(of_convolution)["state"][0]["exp_avg"]
    assert moment.shape == (4, 8, 3)
    assert torch.equal(local(moment), local(of_convolution["state"][0]["exp_avg"]))
    weight = net[1].experts.gate_up_proj
    factors = [weight.detach().mean(dim, keepdim=True) for dim in (-1, -2)]
    for value in (weight, weight.detach() * 2, weight.grad, optimizer.state[weight]["exp_avg"], *factors, weights):
        with pytest.raises(ValueError, match=REFUSED):
            saved(value)
    with pytest.raises(ValueError, match=REFUSED):
        copy.copy(weight)
    biased = tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=4, top_k=2, bias=True)
    experts = tm.GroupedExperts(biased, weight.device_mesh)
    adafactor = torch.optim.Adafactor(experts.parameters())
    for parameter in experts.parameters():
        parameter.grad = torch.ones_like(parameter)
    adafactor.step()
    for state in adafactor.state.values():
        for name in ("row_var", "col_var"):
            with pytest.raises(ValueError, match=REFUSED):
                saved(state[name])


def case_replicas_beside_dense() -> None:
    """Experts that FSDP2 shards over their replicas, and dense parameters on both dimensions of the mesh."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "expert"))
    net = nn.Sequential(nn.Linear(8, 8), tm.MoELayer(CONFIG, mesh, generator=torch.Generator().manual_seed(0)))
    fully_shard(net[1].experts, mesh=mesh["replica"])
    fully_shard(net[0], mesh=mesh)
    assert torch.equal(local(saved(net[0].weight)), local(net[0].weight))
    with pytest.raises(ValueError, match=REFUSED):
        saved(net[1].experts.gate_up_proj)


def case_written_by_a_process() -> None:
    """async_save writes in a thread or a process, of a state dict as it is, and all is read again."""
    for is_sharded in (False, True):
        net, optimizer = trained(one_dimension(), is_sharded=is_sharded)
        weights, state = get_state_dict(net, optimizer)
        expected = copy.deepcopy({"model": weights, "optimizer": state})
        for kind in (AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS):
            names = [tempfile.mkdtemp()]
            dist.broadcast_object_list(names)
            dcp.async_save(
                {"model": weights, "optimizer": state}, checkpoint_id=names[0], async_checkpointer_type=kind
            ).result()
            found = copy.deepcopy(expected)
            for weight in found["model"].values():
                weight.zero_()
            for values in found["optimizer"]["state"].values():
                values["exp_avg"].zero_()
            dcp.load(found, checkpoint_id=names[0])
            for name, weight in expected["model"].items():
                assert torch.equal(local(found["model"][name]), local(weight)), name
            for name, values in expected["optimizer"]["state"].items():
                assert torch.equal(local(found["optimizer"]["state"][name]["exp_avg"]), local(values["exp_avg"])), name
    with pytest.raises(ValueError, match=REFUSED):
        saved(net[1].experts.gate_up_proj)


if __name__ == "__main__":
    run_cases(lambda case: globals()[f"case_{case}"](), sys.argv[1:])
