"""One rank of `python -m bench.foreign_traces`: runs scenarios, healthy, ill and healthy again, profiled.

Of this package it uses on_trace_ready alone.
"""

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from bench.foreign_job import Job, overslept_s
from bench.foreign_scenarios import Scenario
from bench.foreign_trainers import MAKE
from tritonmoe.tools.benchmarks.namespaces import ask
from tritonmoe.tools.recording import on_trace_ready

RATE_BITS = 500e6
WARM_UP = 2
AGAIN = 1
"""So many times a scenario is repeated when the machine did something else: what it took is then not the fault's."""
MOST_APART, MOST_OVERSLEPT = 0.03, 0.03
"""Healthy steps before and after differ by no more than twice that part, and parts that sleep oversleep alike."""


def shape(scenario: Scenario, is_ill: bool) -> None:
    """Return the links their rates, from rank 0."""
    dist.barrier()
    if dist.get_rank() == 0:
        slow = [
            [*link, RATE_BITS / fault.amount]
            for fault in scenario.faults
            if is_ill and fault.kind == "slow link"
            for link in zip(fault.ranks[::2], fault.ranks[1::2], strict=True)
        ]
        ask(f"rates {json.dumps([[RATE_BITS] * dist.get_world_size(), slow])}")
        if scenario.num_hosts > 1:
            ask(f"uplink_rate {scenario.uplink_bits}")
    dist.barrier()


class Profile(torch.profiler.profile):
    """A profiler that ends on all ranks at once: what it does then must not hold up a rank that is in its last step."""

    def stop_trace(self) -> None:
        dist.barrier()
        super().stop_trace()


def _writer(scenario: Scenario, folder: Path) -> Callable[[torch.profiler.profile], None]:
    """Return what writes a trace: of several hosts under ddp torch's own way, which names files after them."""
    if scenario.num_hosts == 1 or scenario.trainer != "ddp":
        return on_trace_ready(folder)
    return torch.profiler.tensorboard_trace_handler(str(folder), use_gzip=True)


def steps(job: Job, step: Callable[[], None], num_steps: int, is_ill: bool, folder: Path | None) -> tuple[float, float]:
    """Run steps, profiled; give the seconds of one, and how much of it some rank has overslept."""
    shape(job.scenario, is_ill)
    job.is_ill = is_ill
    gc.collect()
    wait = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=num_steps, repeat=1)
    times: list[float] = []
    with Profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, schedule=wait,
        on_trace_ready=_writer(job.scenario, folder) if folder else None,
    ) as profile:  # fmt: skip
        for count in range(WARM_UP + num_steps):
            job.step = max(0, count - WARM_UP)
            if count == WARM_UP:
                overslept_s[0] = 0.0
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
            profile.step()
    overslept = torch.tensor(overslept_s)
    dist.all_reduce(overslept, op=dist.ReduceOp.MAX)
    return statistics.fmean(times[WARM_UP:]), overslept.item() / sum(times[WARM_UP:])


def run(scenario: Scenario, folder: Path) -> None:
    """Run a scenario, again where the machine was disturbed meanwhile."""
    torch.manual_seed(dist.get_rank())
    job, step = MAKE[scenario.trainer](scenario)
    count, healthy = scenario.num_steps, 2 * scenario.num_steps // 3
    for attempt in range(1 + AGAIN):
        into = folder / f"attempt-{attempt}"
        before_s, before = steps(job, step, healthy, False, None)
        ill_s, ill = steps(job, step, count, True, into)
        after_s, after = steps(job, step, healthy, False, None)
        apart = abs(before_s - after_s) / (before_s + after_s)
        overslept = sorted((before, ill, after))
        is_quiet = torch.tensor(float(apart < MOST_APART and overslept[2] - overslept[0] < MOST_OVERSLEPT))
        dist.broadcast(is_quiet, 0)
        if is_quiet:
            break
    dist.barrier()
    if dist.get_rank() == 0:
        seconds = {"ill": ill_s, "healthy": [before_s, after_s]}
        measured = {"scenario": scenario.plain(), "seconds": seconds, "attempts": attempt + 1, "quiet": bool(is_quiet)}
        (into / "measured.txt").write_text(json.dumps(measured))
        into.rename(folder / "judged")
    dist.barrier()


def main(scenarios: Sequence[Scenario], folder: Path) -> None:
    torch.set_num_threads(1)
    gc.disable()  # a collection in some steps and not in others is no fault of the scenario
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))  # what else the machine does is no fault of the job
    dist.init_process_group("gloo")
    for number, scenario in enumerate(scenarios):
        run(scenario, folder / str(number))
    dist.destroy_process_group()


if __name__ == "__main__":
    drawn = [Scenario.of(plain) for plain in json.loads(Path(sys.argv[1]).read_text())]
    main(drawn, Path(sys.argv[2]))
    os._exit(0)
