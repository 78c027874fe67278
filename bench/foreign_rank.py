"""One rank of `python -m bench.foreign_traces`: a plain MoE of all_to_all_single under DDP, profiled, with faults.

It uses nothing of this package but on_trace_ready. Attention and experts are operators that sleep, so that ranks which
share cores don't disturb each other.
"""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.foreign_scenarios import Fault, Scenario
from tritonmoe.benchmarks.inside_namespace import ask
from tritonmoe.diagnosis import on_trace_ready

ROWS, WIDTH = 192, 1024
RATE_BITS = 500e6
ATTENTION_S, ROW_S = 0.006, 60e-6
WARM_UP = 2


@torch.library.custom_op("plain::compute", mutates_args=())
def compute(x: Tensor, seconds: float) -> Tensor:
    """Take so long."""
    time.sleep(max(0.0, seconds))
    return x.clone()


class Work(torch.autograd.Function):
    """A part of the model that takes a while, and in backward twice as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        return compute(x, forward_s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return compute(gradients[0], ctx.backward_s), None, None


class Nap(torch.autograd.Function):
    """What happens in a layer outside of operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return gradients[0], None, None


class Exchange(torch.autograd.Function):
    """all_to_all_single, and its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.splits = sent, received
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        sent, received = ctx.splits
        out = gradients[0].new_empty(sum(sent), gradients[0].shape[1])
        dist.all_to_all_single(out, gradients[0].contiguous(), sent, received)
        return out, None, None


class Job:
    """What is wrong in the step that runs."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.rank, self.size = scenario, dist.get_rank(), dist.get_world_size()
        self.step, self.is_ill = 0, False
        self.draw = random.Random(scenario.seed * 31 + self.rank)

    def of(self, kind: str, phase: str, layer: int) -> list[tuple[Fault, float]]:
        if not self.is_ill:
            return []
        found = []
        for fault in self.scenario.faults:
            where = fault.phase or (phase if kind == "slow rank" else "forward")
            which = fault.layer if fault.layer is not None else (layer if kind == "slow rank" else 0)
            if fault.kind == kind and where == phase and which == layer:
                of = self.scenario
                found.append((fault, fault.level(self.step, of.num_steps, self.rank, self.size, of.seed)))
        return found

    def factor(self, phase: str, layer: int) -> float:
        return 1.0 + sum((fault.amount - 1) * level for fault, level in self.of("slow rank", phase, layer))

    def nap_s(self, phase: str, layer: int) -> float:
        return sum(fault.amount * level for fault, level in self.of("late rank", phase, layer))

    def splits(self) -> list[int]:
        weights = [self.draw.uniform(0.85, 1.15) for _ in range(self.size)]
        for fault in self.scenario.faults if self.is_ill else ():
            if fault.kind == "imbalance":
                weights = [one * (1 - fault.amount) for one in weights]
                weights[fault.ranks[0]] += fault.amount * self.size
        own = [int(ROWS * one / sum(weights)) for one in weights]
        own[self.rank] += ROWS - sum(own)
        return own


class Layer(nn.Module):
    """Attention and experts, as slow as the job says."""

    def __init__(self, job: Job, index: int) -> None:
        super().__init__()
        self.job, self.index = job, index
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.big = nn.Parameter(torch.zeros(96, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        job, index = self.job, self.index
        forward, backward = (job.factor(phase, index) for phase in ("forward", "backward"))
        x = Nap.apply(x, job.nap_s("forward", index), job.nap_s("backward", index))
        x = Work.apply(x * self.scale, ATTENTION_S * forward, 2 * ATTENTION_S * backward)
        sent = torch.tensor(job.splits())
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        out, back = sent.tolist(), received.tolist()
        y = Exchange.apply(x, out, back)
        rows_s = ROW_S * sum(back)
        y = Work.apply(y + self.big.sum(), rows_s * forward, 2 * rows_s * backward)
        return x + Exchange.apply(y, back, out)


def shape(scenario: Scenario, is_ill: bool) -> None:
    """Give the links their rates, from rank 0."""
    dist.barrier()
    if dist.get_rank() == 0:
        slow = [
            [*fault.ranks, RATE_BITS / fault.amount]
            for fault in scenario.faults
            if is_ill and fault.kind == "slow link"
        ]
        ask(f"rates {json.dumps([[RATE_BITS] * dist.get_world_size(), slow])}")
    dist.barrier()


def steps(job: Job, model: nn.Module, num_steps: int, is_ill: bool, folder: str | None) -> float:
    """Run steps, profiled; give the seconds of one."""
    shape(job.scenario, is_ill)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    job.is_ill = is_ill
    wait = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=num_steps, repeat=1)
    times: list[float] = []
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, schedule=wait,
        on_trace_ready=on_trace_ready(folder) if folder else None,
    ) as profile:  # fmt: skip
        for count in range(WARM_UP + num_steps):
            job.step = max(0, count - WARM_UP)
            begun = time.perf_counter()
            loss = model(torch.randn(ROWS, WIDTH)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - begun)
            profile.step()
    return statistics.fmean(times[WARM_UP:])


def main(scenarios: Sequence[Scenario], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for number, scenario in enumerate(scenarios):
        torch.manual_seed(0)
        job = Job(scenario)
        model = DistributedDataParallel(nn.Sequential(*[Layer(job, index) for index in range(scenario.num_layers)]))
        half = max(3, scenario.num_steps // 2)
        into = folder / str(number)
        before_s = steps(job, model, half, False, None)
        ill_s = steps(job, model, scenario.num_steps, True, str(into))
        after_s = steps(job, model, half, False, None)
        dist.barrier()
        if dist.get_rank() == 0:
            measured = {"scenario": scenario.plain(), "seconds": {"ill": ill_s, "healthy": [before_s, after_s]}}
            (into / "measured.txt").write_text(json.dumps(measured))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    drawn = [Scenario.of(plain) for plain in json.loads(Path(sys.argv[1]).read_text())]
    main(drawn, Path(sys.argv[2]))
    os._exit(0)
