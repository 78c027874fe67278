"""What every rank runs of first weights under FSDP2 alone: `torchrun first_weights_worker.py CASE...`."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.config import derive
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.qwen3 import qwen3_configs
from worker_cases import run_cases

from tritonmoe.integrations.torchtitan import routed_experts


def config(num_experts: int) -> RoutedExperts.Config:
    of_debug = qwen3_configs["debugmodel_moe"](attn_backend="flex").layers[0].moe.routed_experts
    inner = derive(of_debug.inner_experts, GroupedExperts.Config, num_experts=num_experts, dim=8, hidden_dim=4)
    return derive(of_debug, RoutedExperts.Config, inner_experts=inner)


def run(num_experts: int, cut: int, expert_parallel: int) -> None:
    """torchtitan cuts experts in F where there are fewer of them than ranks; under EP FSDP2 cuts what it has left."""
    found = []
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size() // expert_parallel, expert_parallel), mesh_dim_names=("dp", "ep")
    )
    for make in (config, lambda number: routed_experts(config(number))):
        with torch.device("meta"):
            experts: Any = make(num_experts).build()
        inner = experts.inner_experts
        if expert_parallel > 1:
            for name, weight in list(inner.named_parameters()):
                setattr(inner, name, nn.Parameter(distribute_tensor(weight, mesh["ep"], [Shard(0)])))
        fully_shard(inner, mesh=mesh["dp"], shard_placement_fn=lambda _: Shard(cut))
        experts.to_empty(device="cpu")
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in experts.parameters():
                weight.to_local().fill_(float("nan"))
            experts.init_states()
        found.append({name: weight.full_tensor() for name, weight in experts.state_dict().items()})
    for name, own in found[0].items():
        assert torch.equal(found[1][name], own), name


if __name__ == "__main__":
    cases = {"cut in F": (1, 1, 1), "cut in E": (4, 0, 1), "cut twice": (4, 0, 2), "cut in E and F": (2, 1, 2)}
    run_cases(lambda case: run(*cases[case]), sys.argv[1:])
