"""Spread experts in DistributedDataParallel and torch's tools around it, on two gloo processes, or in this one."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_torchrun
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tritonmoe as tm

WORKER = Path(__file__).parent / "data_parallel_worker.py"
CASES = ("whatever_it_is_told", "what_is_frozen", "nothing_else_changes", "join", "mixing")


@pytest.mark.thorough
def test_data_parallel():
    run_torchrun(2, WORKER, cases=CASES)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=4, top_k=2)
ASKS: dict[str, Callable[[nn.Module], object]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "fully_shard": fully_shard,
    "expert_parameters": tm.expert_parameters,
    "gather_state_dicts": tm.gather_state_dicts,
    "tm.rebalance": tm.rebalance,
}


COMPUTED: dict[str, Callable[[nn.Module, str], object]] = {
    "parametrization": lambda experts, name: nn.utils.parametrize.register_parametrization(experts, name, Doubled()),
    "hook": nn.utils.weight_norm,
}


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("before", ASKS)
def test_computed_weights_of_spread_experts_are_refused(before: str, how: str, group: dist.ProcessGroup) -> None:
    """DTensor's own errors named neither the layer nor the parametrization, or nothing was said at all."""
    model = nn.Sequential(nn.Linear(8, 8), tm.MoELayer(CONFIG))
    tm.parallelize(model, group)
    COMPUTED[how](model[1].experts, "down_proj")
    model(torch.randn(3, 8))
    with pytest.raises(ValueError, match=rf"down_proj of 1\.experts is computed from other .* before {before}"):
        ASKS[before](model)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_computed_weights_are_not_shown_in_another_order(group: dist.ProcessGroup) -> None:
    """A checkpoint would hold them by the slots of the placement, and nothing in it would say so."""
    layer = tm.MoELayer(CONFIG, group, placement=tm.ExpertPlacement(((1, 0, 3, 2),)))
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    for call in (lambda: pickle.dumps(optimizer), lambda: copy.deepcopy(optimizer)):
        with pytest.raises(ValueError, match="in the order of a placement, and not the placement: copy or save its"):
            call()
    kept = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(kept)
    nn.utils.parametrize.register_parametrization(layer.experts, "down_proj", Doubled())
    optimizer = torch.optim.AdamW(layer.parameters())
    for call in (layer.state_dict, optimizer.state_dict, lambda: layer.load_state_dict({}, strict=False)):
        with pytest.raises(ValueError, match=r"down_proj of .*GroupedExperts is computed from other parameters"):
            call()
