"""One rank of `python -m bench.uneven_pipelines --traced`: a stage of a pipeline over gloo, profiled.

Micro-batches sleep for as long as the job says, so that ranks which share cores don't disturb each other. Of this
package it uses on_trace_ready alone.
"""

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from bench.foreign_job import Work
from tritonmoe.tools.recording import on_trace_ready

__all__ = ["main"]

ROWS, WIDTH, WARM_UP = 8, 64, 2


class Stage(nn.Module):
    """The layers of a stage; the n-th call of a step is of its n-th micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.seconds: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        seconds = self.seconds.pop(0) if self.seconds else 0.0  # none where its shapes are asked for
        return Work.apply(x * self.scale, seconds, 2 * seconds)


def run(job: dict[str, Any], folder: Path) -> None:
    """Run the steps of a job, whose `seconds` are (steps, replicas, stages, batches), and write a trace of this rank.

    Rank 0 also writes how long a step took.
    """
    rank, seconds, stages = dist.get_rank(), job["seconds"], job["stages"]
    num_batches, replicas = len(seconds[0][0][0]), len(seconds[0])
    stage, replica = divmod(rank, replicas)
    of_stage = [dist.new_group([one * replicas + other for other in range(replicas)]) for one in range(stages)][stage]
    lines = [dist.new_group([one * replicas + other for one in range(stages)]) for other in range(replicas)]
    model = Stage()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    schedule_of: Callable[..., Any] = ScheduleGPipe if job["is_gpipe"] else Schedule1F1B
    schedule = schedule_of(
        PipelineStage(model, stage, stages, torch.device("cpu"), group=lines[replica]), num_batches,
        loss_fn=lambda output, target: (output - target).square().mean(),
    )  # fmt: skip
    times: list[float] = []
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True,
        schedule=torch.profiler.schedule(wait=0, warmup=WARM_UP, active=len(seconds), repeat=1),
        on_trace_ready=on_trace_ready(folder / "traces"),
    ) as profile:  # fmt: skip
        for step in [0] * WARM_UP + list(range(len(seconds))):
            begun = time.perf_counter()
            own = list(seconds[step][replica][stage])
            model.seconds = own if times else [0.0, *own]  # the first call tells the shapes
            x = torch.randn(num_batches * ROWS, WIDTH)
            schedule.step(*[x] * (stage == 0), **{"target": x} if stage == stages - 1 else {})
            dist.all_reduce(model.scale.grad, group=of_stage)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - begun)
            profile.step()
        dist.barrier()
    if rank == 0:
        (folder / "seconds.txt").write_text(str(statistics.fmean(times[WARM_UP:])))


def main() -> None:
    """Run the jobs of a list, each with a folder by its number."""
    store, rank, size, jobs, folder = sys.argv[1:]
    torch.set_num_threads(1)
    gc.disable()  # a collection in some steps and not in others is nothing of the jobs
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size))
    for number, job in enumerate(json.loads(Path(jobs).read_text())):
        (Path(folder) / str(number)).mkdir(parents=True, exist_ok=True)
        run(job, Path(folder) / str(number))
    dist.barrier()


if __name__ == "__main__":
    main()
    os._exit(0)
