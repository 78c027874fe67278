"""Ranks of test_pipeline.py: `pipeline_worker.py CASE...` under torchrun says "passed CASE" of each on rank 0.

A case is a schedule of torch.distributed.pipelining, or "WRAPPER SCHEDULE" with what is around the stages.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn.parallel import DistributedDataParallel
from worker_cases import run_cases

import tritonmoe as tm

WIDTH, NUM_LAYERS, MICRO_BATCHES, MICRO_BATCH = 8, 4, 4, 5
CONFIG = tm.MoEConfig(hidden_size=WIDTH, intermediate_size=12, num_experts=4, top_k=2)
V_SHAPED = {"ScheduleZBVZeroBubble", "ScheduleDualPipeV"}
ONE_STAGE_A_RANK = {"ScheduleGPipe", "Schedule1F1B"}


class Block(nn.Module):
    def __init__(self, number: int, ranks=None) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.moe = tm.MoELayer(CONFIG, ranks, generator=torch.Generator().manual_seed(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.moe(torch.tanh(self.dense(x)))


def batch(place: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(place)
    x, target = torch.randn(2, MICRO_BATCHES * MICRO_BATCH, WIDTH, generator=generator)
    return x, target


def loss_of(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().sum()


def gradients_of_one_device() -> list[dict[str, torch.Tensor | None]]:
    """Return each layer's gradients of both batches, the mean over them."""
    model = nn.Sequential(*map(Block, range(NUM_LAYERS)))
    for place in range(2):
        for x, target in zip(*(of.chunk(MICRO_BATCHES) for of in batch(place)), strict=True):
            (loss_of(model(x), target) / 2).backward()
    return [{name: parameter.grad for name, parameter in block.named_parameters()} for block in model]


def run(schedule: str, wrapper: str = "") -> None:
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("stage", "replica", "expert"))
    rank, place = mesh.get_local_rank("stage"), mesh.get_local_rank("expert")
    num_stages = 2 if schedule in ONE_STAGE_A_RANK else 4
    mine = [rank] if num_stages == 2 else [rank, 3 - rank if schedule in V_SHAPED else rank + 2]
    per_stage = NUM_LAYERS // num_stages
    modules, stages = {}, []
    for number in mine:
        layers = range(number * per_stage, (number + 1) * per_stage)
        modules[number] = module = nn.Sequential(*(Block(layer, mesh["replica", "expert"]) for layer in layers))
        if wrapper == "fsdp":
            fully_shard(module, mesh=mesh["expert"], ignored_params=set(tm.expert_parameters(module)))
        x = torch.empty(MICRO_BATCH, WIDTH)
        stages.append(
            PipelineStage(
                DistributedDataParallel(module, process_group=mesh.get_group("expert")) if wrapper == "ddp" else module,
                number,
                num_stages,
                torch.device("cpu"),
                input_args=(x.clone().requires_grad_(number > 0),),
                output_args=(x.clone().requires_grad_(),),
                group=mesh.get_group("stage"),
            )
        )
    x, target = batch(place)
    made = getattr(schedules, schedule)(
        stages[0] if num_stages == 2 else stages, MICRO_BATCHES, loss_fn=loss_of, scale_grads=False
    )
    for _ in range(2):
        for module in modules.values():
            module.zero_grad()
        made.step(*[x] * (0 in mine), **({"target": target} if num_stages - 1 in mine else {}))
    expected = gradients_of_one_device()
    for number, module in modules.items():
        for layer, block in enumerate(module, number * per_stage):
            for name, parameter in block.named_parameters():
                found = parameter.grad
                if found is None:
                    assert expected[layer][name] is None
                elif hasattr(found, "full_tensor"):
                    found = found.full_tensor()
                elif not wrapper:  # nobody averages the gradients of dense parameters
                    found = found.clone()
                    dist.all_reduce(found, group=mesh.get_group("expert"))
                    found /= 2
                torch.testing.assert_close(found, expected[layer][name], msg=f"{layer} {name}: {{}}".format)


def run_case(case: str) -> None:
    *wrapper, schedule = case.split()
    run(schedule, *wrapper)


if __name__ == "__main__":
    run_cases(run_case, sys.argv[1:])
