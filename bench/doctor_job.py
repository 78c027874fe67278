"""A training job with faults in it, as bench.doctor measures it: on one rank, and on all emulated ones.

A step is a forward and a backward through layers that needn't be alike, with what a model does between them. All that
takes time in it sleeps, so that ranks which share cores don't disturb each other.
"""

import contextlib
import itertools
import json
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tritonmoe as tm
from bench.doctor_faults import Job
from bench.virtual_time import VirtualTime
from tritonmoe.tools.benchmarks.namespaces import ask
from tritonmoe.tools.benchmarks.ranks import gather
from tritonmoe.tools.recording.recorder import record
from tritonmoe.transports import EmulatedTransport, LinkModel, PendingExchange, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks
from tritonmoe.transports.two_level_transport import GroupView

__all__ = ["run_emulated", "run_real"]

TIMEOUT_S = 120.0
OPTIMIZER_S = 1e-3
LOCAL_PARTS = 2
"""Beside its chunks a pass computes what needs no exchange in so many parts."""


class _Nap(torch.autograd.Function):
    """Takes a while, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], forward: Callable[[], float], backward: Any) -> Tensor:
        ctx.shape, ctx.backward = x.shape, backward
        time.sleep(forward())
        return x.clone() if x.shape == shape else x.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(ctx.backward())
        gradient = gradients[0]
        return gradient if gradient.shape == ctx.shape else gradient.new_zeros(ctx.shape), None, None, None


class _Host(GroupView):
    """All ranks of a transport, whose host takes a time before it sends its counts."""

    def __init__(self, world: Transport, host_s: Callable[[], float]) -> None:
        super().__init__(world, range(world.size))
        self.host_s = host_s

    def post_counts(self, counts: Tensor) -> PendingExchange:
        time.sleep(self.host_s())
        return super().post_counts(counts)


class _Rank:
    """A rank of a job."""

    def __init__(self, job: Job, transport: Transport) -> None:
        self.job, self.rank = job, transport.rank
        self.draw = random.Random(f"{job.seed} {transport.rank}")
        self.step = self.layer = 0
        """Which are under way; the layer is the next one, in backward too."""
        self.transport = _Host(transport, lambda: self.noisy(job.host_s + self.sum_of("host overhead")))
        self.modules = [self._module(number) for number in range(len(job.layers))]
        x = torch.zeros(job.layers[0].tokens, job.hidden_size)
        self.x = x.requires_grad_()

    def _module(self, number: int) -> tm.GroupedExperts:
        job, layer = self.job, self.job.layers[number]

        def experts(h: Tensor) -> Tensor:
            pairs = len(h)
            gate, up = h.chunk(2, dim=1)

            def seconds(phase: str, times: float) -> float:
                return times * self.compute_s(number, phase, pairs)

            return _Nap.apply(gate * up, up.shape, lambda: seconds("forward", 1.0), lambda: seconds("backward", 2.0))

        config = tm.MoEConfig(job.hidden_size, 8, job.num_experts, layer.top_k, activation=experts)
        return tm.GroupedExperts(config, self.transport, tm.OverlapConfig(layer.num_chunks), backend="torch")

    def noisy(self, seconds: float) -> float:
        return seconds * self.job.pace(self.step) * self.draw.lognormvariate(0.0, self.job.noise)

    def amounts(self, kind: str, phase: str = "", layer: int | None = None) -> list[float]:
        """Return how much there is of each fault of a kind, here and now."""
        found = [
            fault.amount_at(self.step, self.rank, self.job)
            for fault in self.job.faults
            if fault.kind == kind and fault.is_in(phase, layer, self.step, self.job)
        ]
        return [amount for amount in found if amount is not None]

    def sum_of(self, kind: str, phase: str = "", layer: int | None = None) -> float:
        return sum(self.amounts(kind, phase, layer))

    def compute_s(self, number: int, phase: str, pairs: int) -> float:
        """Return how long the experts take for so many pairs."""
        if not pairs:
            return 0.0
        layer = self.job.layers[number]
        slow = 1.0 + sum(amount - 1.0 for amount in self.amounts("slow rank", phase, number))
        fixed_s = self.job.fixed_s + self.sum_of("chunk overhead") / (layer.num_chunks + LOCAL_PARTS)
        return self.noisy(slow * (fixed_s + layer.pair_s * pairs))

    def before_s(self, number: int) -> float:
        """Return what the model takes before a layer, and this rank by itself."""
        before_s = self.noisy(self.job.layers[number].before_s) * (1 + self.draw.uniform(0.0, self.job.ragged))
        return before_s + self.sum_of("late rank", "forward", number)

    def behind_s(self, number: int) -> float:
        """Return what it takes in backward before it comes to a layer, from the end on."""
        behind = 2 * self.job.layers[number + 1].before_s if number + 1 < len(self.job.layers) else 0.0
        return self.noisy(behind) + self.sum_of("late rank", "backward", number)

    def run_step(self, step: int) -> None:
        """Make a forward and a backward."""
        self.step = step
        h: Tensor = self.x
        for number, layer in enumerate(self.job.layers):
            shape = layer.tokens, self.job.hidden_size
            ids = self.job.ids(step, self.rank, number)
            module = self.modules[number]
            module.overlap = tm.OverlapConfig(1 if step < self.job.one_chunk_steps else layer.num_chunks)
            before, behind = (lambda n=number: self.before_s(n)), (lambda n=number: self.behind_s(n - 1))
            h = _Nap.apply(h, shape, before, behind if number else lambda: 0.0)
            h = module(h, ids, torch.ones(ids.shape))
        last = len(self.job.layers) - 1
        _Nap.apply(h, h.shape, lambda: 0.0, lambda: self.behind_s(last)).sum().backward()
        time.sleep(self.noisy(OPTIMIZER_S))


def link_of(job: Job, step: int) -> LinkModel:
    """Return the link as the faults have it in a step."""
    ports: dict[int, float] = {}
    links: dict[tuple[int, int], float] = {}
    late_us: dict[tuple[int, int], float] = {}
    rate, latency_s = job.rate, job.latency_s
    for fault in job.faults:
        amount = fault.amount_at(step, None, job)
        if amount is None:
            continue
        ends = [(sender, receiver) for sender, receiver in zip(fault.ranks[::2], fault.ranks[1::2], strict=False)]
        if fault.kind == "slow link":
            links |= dict.fromkeys(ends, amount)
        elif fault.kind == "late link":
            late_us |= dict.fromkeys(ends, 1e6 * amount)
        elif fault.kind == "slow port":
            ports |= dict.fromkeys(fault.ranks, amount)
        elif fault.kind == "bandwidth":
            rate /= amount
        elif fault.kind == "latency":
            latency_s += amount
    return LinkModel(rate, 1e6 * latency_s, ports, links, late_us)


def run_rank(
    transport: Transport,
    job: Job,
    steps: Sequence[int],
    folder: Path | None,
    set_link: Callable[[LinkModel], object],
    meet: Callable[[], object],
) -> list[float]:
    """Return when this rank began, and when each of these steps was over; they are recorded where a folder is given.

    set_link: called on rank 0. meet: returns on all ranks together.
    """
    rank = _Rank(job, transport)
    link: LinkModel | None = None
    times: list[float] = []
    with contextlib.nullcontext() if folder is None else record(folder):
        for step in steps:
            now = link_of(job, step)
            if transport.rank == 0 and now != link:
                set_link(link := now)
            if not times:
                meet()
                times.append(time.perf_counter())
            rank.run_step(step)
            times.append(time.perf_counter())
    return times


def run_emulated(job: Job, folder: Path | None) -> list[float]:
    """Return the seconds of a job's steps on emulated ranks, in virtual time."""
    clock = VirtualTime(job.size)

    def on_rank(transport: Transport) -> list[float]:
        assert isinstance(transport, EmulatedTransport)
        arguments = transport, job, range(job.num_steps), folder, transport.world.set_link, lambda: None
        return clock.run(transport.rank, lambda: run_rank(*arguments))

    with clock.installed():
        return step_seconds(run_on_emulated_ranks(on_rank, job.size, link=link_of(job, 0), timeout_s=TIMEOUT_S))


class _Shaper:
    """Has the process that made the namespaces give the links their rates, on a thread: no rank is late for it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._links: queue.SimpleQueue[LinkModel] = queue.SimpleQueue()
        self._is_done = threading.Semaphore(0)
        threading.Thread(target=self._work, daemon=True).start()

    def set(self, link: LinkModel, waits: bool) -> None:
        self._links.put(link)
        if waits:
            self._is_done.acquire()

    def _work(self) -> None:
        while True:
            link = self._links.get()
            assert link.bandwidth_gb_per_s is not None
            bits = 8e9 * link.bandwidth_gb_per_s
            of_ranks = [bits / link.slow_ports.get(rank, 1.0) for rank in range(self._size)]
            of_links = [[*ends, bits / times] for ends, times in link.slow_links.items()]
            ask(f"rates {json.dumps([of_ranks, of_links])}")
            self._is_done.release()


def run_real(transport: Transport, job: Job, variants: dict[str, Job], folder: Path) -> dict[str, list[float]]:
    """Return the seconds of the steps of every variant over real links: half of those without faults are the last.

    Those of the job itself are recorded.
    """
    shaper = _Shaper(job.size)
    healthy = variants.get("without", job)
    blocks = [("", healthy, range(2)), ("without", healthy, range(0, job.num_steps, 2))]
    blocks += [(name, of, range(job.num_steps)) for name, of in variants.items() if name != "without"]
    blocks += [("without", healthy, range(1, job.num_steps, 2))]
    seconds: dict[str, list[float]] = {}
    for name, of, steps in blocks:
        is_first = True

        def set_link(link: LinkModel) -> None:
            nonlocal is_first
            shaper.set(link, waits=is_first)
            is_first = False

        times = run_rank(transport, of, steps, folder if name == "with" else None, set_link, transport.barrier)
        seconds.setdefault(name, []).extend(step_seconds(gather(transport, times)))
    del seconds[""]
    return seconds


def step_seconds(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Return how long each step took, until the last rank had ended it."""
    ends = [max(times) for times in zip(*ranks, strict=True)]
    return [end - before for before, end in itertools.pairwise(ends)]
