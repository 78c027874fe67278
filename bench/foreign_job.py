"""What the trainers of `python -m bench.foreign_traces` share: parts of a model that sleep, and what is wrong.

It uses nothing of this package. Attention and experts are operators that sleep, so that ranks which share cores don't
disturb each other.
"""

import random
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.faults import Fault
from bench.foreign_scenarios import Scenario, level_on_rank

__all__ = ["ATTENTION_S", "ROWS", "ROW_S", "WIDTH", "Exchange", "Job", "Layer", "Nap", "Work", "overslept_s"]

ROWS, WIDTH = 192, 1024
ATTENTION_S, ROW_S = 0.006, 60e-6

overslept_s = [0.0]
"""By how much longer parts of the model have slept than they should: the machine did something else."""


@torch.library.custom_op("plain::compute", mutates_args=())
def compute(x: Tensor, seconds: float) -> Tensor:
    """Take so long."""
    begun = time.perf_counter()
    time.sleep(max(0.0, seconds))
    overslept_s[0] += time.perf_counter() - begun - seconds
    return x.clone()


class Work(torch.autograd.Function):
    """A part of the model that takes a while, and in backward twice as long; the host may take some time before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float, host_s: float = 0.0) -> Tensor:
        ctx.backward_s, ctx.host_s = backward_s, host_s
        if host_s:
            time.sleep(host_s)
        return compute(x, forward_s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.host_s:
            time.sleep(ctx.host_s)
        return compute(gradients[0], ctx.backward_s), None, None, None


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
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.splits = sent, received, group
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.splits
        out = gradients[0].new_empty(sum(sent), gradients[0].shape[1])
        dist.all_to_all_single(out, gradients[0].contiguous(), sent, received, group=group)
        return out, None, None, None


class Job:
    """What is wrong in the step that runs."""

    def __init__(self, scenario: Scenario, parts: int = 1) -> None:
        """parts: so many times a step is a layer called."""
        self.scenario, self.rank, self.size, self.parts = scenario, dist.get_rank(), dist.get_world_size(), parts
        self.step, self.is_ill = 0, False
        self.draw = random.Random(scenario.seed * 31 + self.rank)

    def of(self, kind: str, phase: str, layer: int) -> list[tuple[Fault, float]]:
        """Return the faults of a kind that are there now, and how much of each."""
        if not self.is_ill:
            return []
        is_spread = kind != "late rank"
        found = []
        for fault in self.scenario.faults:
            where = fault.phase or (phase if is_spread else "forward")
            which = fault.layer if fault.layer is not None else (layer if is_spread else 0)
            if fault.kind == kind and where == phase and which == layer:
                found.append((fault, level_on_rank(fault, self.scenario, self.step, self.rank)))
        return found

    def work(self, x: Tensor, layer: int, seconds: float) -> Tensor:
        """Compute as long as asked, where nothing is wrong."""
        seconds *= 1 + layer if self.scenario.is_unlike else 1
        seconds /= self.parts
        forward, backward = (
            1.0 + sum((fault.amount - 1) * level for fault, level in self.of("slow rank", phase, layer))
            for phase in ("forward", "backward")
        )
        host_s = sum(fault.amount * level for fault, level in self.of("host overhead", "forward", layer)) / self.parts
        return Work.apply(x, seconds * forward, 2 * seconds * backward, host_s)

    def nap(self, x: Tensor, layer: int) -> Tensor:
        """Come late, if that is what is wrong."""
        forward_s, backward_s = (
            sum(fault.amount * level for fault, level in self.of("late rank", phase, layer)) / self.parts
            for phase in ("forward", "backward")
        )
        return Nap.apply(x, forward_s, backward_s)

    def shares(self, ranks: list[int]) -> list[float]:
        """Return the share of this rank's tokens that chooses each of these ranks."""
        weights = [self.draw.uniform(0.85, 1.15) for _ in ranks]
        for fault in self.scenario.faults if self.is_ill else ():
            if fault.kind == "imbalance" and fault.ranks[0] in ranks:
                weights = [one * (1 - fault.amount) for one in weights]
                weights[ranks.index(fault.ranks[0])] += fault.amount * len(ranks)
        return [one / sum(weights) for one in weights]


class Layer(nn.Module):
    """Attention and experts, as slow as the job says; experts are spread over a group."""

    def __init__(self, job: Job, index: int, group: Any = None, rows: int = ROWS) -> None:
        super().__init__()
        self.job, self.index, self.group, self.rows = job, index, group, rows
        self.ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.big = nn.Parameter(torch.zeros(96, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        job, index = self.job, self.index
        x = job.work(job.nap(x, index) * self.scale, index, ATTENTION_S)
        own = [int(self.rows * one) for one in job.shares(self.ranks)]
        own[self.ranks.index(job.rank)] += self.rows - sum(own)
        sent = torch.tensor(own)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        out, back = sent.tolist(), received.tolist()
        y = Exchange.apply(x, out, back, self.group)
        y = job.work(y + self.big.sum(), index, ROW_S * sum(back) * job.parts)
        return x + Exchange.apply(y, back, out, self.group)
