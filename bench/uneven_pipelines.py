"""`python -m bench.uneven_pipelines`: does the doctor tell uneven micro-batches and stages from slow machines?

Timelines of pipelines (1F1B), as StragglerAnalysis has them, made by a small simulation: stages with unlike layers,
sequences of unlike lengths, slow machines, and several of these. The gain is that of even stages or micro-batches, at
the mean of what they were. A third of the kinds is held out: nothing is tuned on those.

--traced runs pipelines of torch.distributed.pipelining instead, in four processes over gloo, with torch.profiler around
them. What they would take if they were even is measured too.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tritonmoe.tools.benchmarks.argument_types import positive, seed
from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.reading import read_traces

CLOSE = 0.15
TRACED_S = 0.02
FORWARD_S, BACKWARD_S, TRANSFER_S, GATHER_S = 0.05, 0.1, 0.001, 0.02
HELD_OUT = (
    "uneven stages of one replica", "uneven micro-batches and stages", "uneven micro-batches in few steps",
    "uneven micro-batches, one slow",
)  # fmt: skip
"""Kinds on which nothing is tuned."""


@dataclass(frozen=True)
class Pipeline:
    """A job, and what is wrong with it."""

    replicas: int = 4
    stages: int = 4
    batches: int = 8
    steps: int = 6
    stage_times: tuple[float, ...] = ()
    """How many times as long as the others each stage computes."""
    length: Callable[[random.Random, int, int, int], float] | None = None
    """How many times as long as usual a micro-batch is, by chance, replica, step, and its number."""
    slow: tuple[int, int, float] | None = None
    """Replica, stage, and how many times as long it computes."""
    expected: tuple[str, ...] = field(default=())
    is_gpipe: bool = False
    """Of a traced one: all forwards before all backwards, and not 1F1B."""

    def even(self) -> "Pipeline":
        """Return the job with nothing wrong."""
        return replace(self, slow=None)


def traced_kinds(draw: random.Random) -> dict[str, Pipeline]:
    """Return jobs of four ranks: two replicas of two stages, or four stages."""
    replica, times, long = draw.randrange(2), draw.uniform(1.5, 2.0), draw.randrange(4)

    def drawn(of: random.Random, replica: int, step: int, batch: int) -> float:
        return of.lognormvariate(0, 0.4)

    def one_long(of: random.Random, replica: int, step: int, batch: int) -> float:
        return 3.0 if batch == long else 1.0

    def long_replica(of: random.Random, replica_: int, step: int, batch: int) -> float:
        return times if replica_ == replica else 1.0

    two, four = Pipeline(2, 2, 4), Pipeline(1, 4, 4)
    uneven, batches, slow = ("uneven stages",), ("uneven micro-batches",), ("slow rank",)
    return {
        "healthy": two,
        "uneven stages, the last of two": replace(two, stage_times=(1.0, times), expected=uneven),
        "uneven stages, the second of four": replace(four, stage_times=(1.0, times, 1.0, 1.0), expected=uneven),
        "uneven micro-batches of two": replace(two, length=drawn, expected=batches),
        "one long micro-batch of two": replace(two, length=one_long, expected=batches),
        "slow machine": replace(two, slow=(replica, long % 2, times), expected=slow),
        "uneven stages, GPipe": replace(four, stage_times=(1.0, 1.0, 1.0, times), is_gpipe=True, expected=uneven),
        "one long micro-batch of four": replace(four, length=one_long, expected=batches),
        "healthy, GPipe": replace(four, is_gpipe=True),
        "uneven micro-batches, GPipe": replace(four, length=drawn, is_gpipe=True, expected=batches),
        "one replica with long sequences": replace(two, length=long_replica, expected=batches),
        "uneven stages, one slow": replace(
            two, stage_times=(times, 1.0), slow=(replica, 1, 2.5), expected=(*uneven, *slow)
        ),
    }


TRACED_HELD_OUT = (
    "healthy, GPipe", "uneven micro-batches, GPipe", "one replica with long sequences", "uneven stages, one slow",
)  # fmt: skip


def kinds_of(draw: random.Random) -> dict[str, Pipeline]:
    replica, stage, times = draw.randrange(4), draw.randrange(4), draw.uniform(1.4, 2.0)

    def drawn(of: random.Random, replica: int, step: int, batch: int) -> float:
        return of.lognormvariate(0, 0.4)

    def one_long(of: random.Random, replica_: int, step: int, batch: int) -> float:
        return 4.0 if (replica_, batch) == (replica, 3) else 1.0

    def in_all(of: random.Random, replica_: int, step: int, batch: int) -> float:
        return 4.0 if batch == 3 else 1.0

    def long_replica(of: random.Random, replica_: int, step: int, batch: int) -> float:
        return times if replica_ == replica else 1.0

    def in_few(of: random.Random, replica_: int, step: int, batch: int) -> float:
        return of.lognormvariate(0, 0.7) if step >= 3 else 1.0

    last, first = (1.0, 1.0, 1.0, times), (times, 1.0, 1.0, 1.0)
    uneven, batches, slow = ("uneven stages",), ("uneven micro-batches",), ("slow rank",)
    machine = (replica, stage, 2.0)
    return {
        "healthy": Pipeline(),
        "uneven stages, the last": Pipeline(stage_times=last, expected=uneven),
        "uneven stages, the first": Pipeline(stage_times=first, expected=uneven),
        "uneven micro-batches": Pipeline(length=drawn, expected=batches),
        "one long micro-batch": Pipeline(length=one_long, expected=batches),
        "one long micro-batch of all": Pipeline(length=in_all, expected=batches),
        "one replica with long sequences": Pipeline(length=long_replica, expected=batches),
        "slow machine": Pipeline(slow=machine, expected=slow),
        "uneven stages, one slow": Pipeline(stage_times=last, slow=machine, expected=(*uneven, *slow)),
        "uneven stages of one replica": Pipeline(1, stage_times=last, expected=uneven),
        "uneven micro-batches and stages": Pipeline(stage_times=last, length=drawn, expected=(*batches, *uneven)),
        "uneven micro-batches in few steps": Pipeline(length=in_few, expected=batches),
        "uneven micro-batches, one slow": Pipeline(length=drawn, slow=machine, expected=(*batches, *slow)),
    }


class _Run:
    """All steps of a job, and their events."""

    def __init__(self, of: Pipeline, seed_: int, is_even: bool) -> None:
        self.of, self.is_even, self.now_s = of, is_even, 0.0
        self.events: list[dict[str, Any]] = []
        self.step_s: list[float] = []
        self.draw, self.noise = random.Random(seed_), random.Random(seed_ + 1)
        for step in range(of.steps):
            self._step(step)

    def event(self, name: str, replica: int, stage: int, start_s: float, end_s: float, step: int, batch: int) -> None:
        lane = 0 if name.endswith("compute") else 1 if name.endswith(("send", "recv")) else 3
        self.events.append(
            {"name": name, "ph": "X", "pid": replica, "tid": 10 * stage + lane, "ts": start_s * 1e6,
             "dur": (end_s - start_s) * 1e6, "args": {"step": step, "seq_id": batch, "model_chunk": 0}}
        )  # fmt: skip

    def _step(self, step: int) -> None:
        of = self.of
        lengths = [
            [1.0 if of.length is None else of.length(self.draw, replica, step, batch) for batch in range(of.batches)]
            for replica in range(of.replicas)
        ]
        if self.is_even:
            mean = statistics.fmean(one for own in lengths for one in own)
            lengths = [[mean] * of.batches for _ in lengths]
        ends = []
        for replica in range(of.replicas):
            for stage in range(of.stages):
                self.event("params-all-gather", replica, stage, self.now_s, self.now_s + GATHER_S, step, 0)
            ends.append(self._replica(step, replica, lengths[replica]))
        last_s = max(max(own) for own in ends)
        for stage in range(of.stages):
            latest_s = max(own[stage] for own in ends) + GATHER_S
            for replica in range(of.replicas):
                self.event("grads-reduce-scatter", replica, stage, ends[replica][stage], latest_s, step, 0)
                self.event("optimizer-clip-main-grad", replica, stage, latest_s, last_s + 1.1 * GATHER_S, step, 0)
        self.step_s.append(last_s + 1.1 * GATHER_S - self.now_s)
        self.now_s = last_s + 1.1 * GATHER_S

    def _seconds(self, replica: int, stage: int, length: float, is_backward: bool) -> float:
        of = self.of
        times = of.stage_times or (1.0,) * of.stages
        factor = statistics.fmean(times) if self.is_even else times[stage]
        if of.slow is not None and of.slow[:2] == (replica, stage):
            factor *= of.slow[2]
        return (BACKWARD_S if is_backward else FORWARD_S) * factor * length * math.exp(self.noise.gauss(0, 0.01))

    def _replica(self, step: int, replica: int, lengths: list[float]) -> list[float]:
        """Run one pipeline, sends and receives of a stage at once as Megatron does; return when each stage ends."""
        of = self.of
        programs = [_program(stage, of.stages, of.batches) for stage in range(of.stages)]
        now, lane_s = ([self.now_s + GATHER_S] * of.stages for _ in range(2))
        posted: dict[tuple[int, int, int], float] = {}
        counts: dict[tuple[int, int], int] = defaultdict(int)
        begun = [False] * of.stages  # whether the first item is an exchange that waits for the other stage
        batches: dict[tuple[str, int], int] = defaultdict(int)

        def end_of(stage: int, names: tuple[str, ...], number: int, other: int) -> bool:
            """Note when an exchange of two stages ends, once both have posted it."""
            own_s, others_s = posted[stage, other, number], posted.get((other, stage, number))
            if others_s is None:
                return False
            end_s = max(own_s, others_s) + TRANSFER_S
            for name in names:
                batch = batches[name, stage]
                batches[name, stage] += 1
                self.event(name, replica, stage, own_s, end_s, step, batch)
            lane_s[stage] = end_s
            return True

        pending: list[list[tuple[tuple[str, ...], int, int]]] = [[] for _ in range(of.stages)]
        while any(programs) or any(pending):
            for stage, program in enumerate(programs):
                while pending[stage] and end_of(stage, *pending[stage][0]):
                    pending[stage].pop(0)
                while program:
                    way, batch, names, other = program[0]
                    if way:
                        seconds = self._seconds(replica, stage, lengths[batch], way == "backward")
                        self.event(f"{way}-compute", replica, stage, now[stage], now[stage] + seconds, step, batch)
                        now[stage] += seconds
                    else:
                        if pending[stage]:
                            break
                        if not begun[stage]:
                            number = counts[stage, other]
                            counts[stage, other] += 1
                            posted[stage, other, number] = max(now[stage], lane_s[stage])
                        else:
                            number = counts[stage, other] - 1
                        if all(name.endswith("send") for name in names):
                            pending[stage].append((names, number, other))
                            while pending[stage] and end_of(stage, *pending[stage][0]):
                                pending[stage].pop(0)
                        else:
                            begun[stage] = not end_of(stage, names, number, other)
                            if begun[stage]:
                                break
                            now[stage] = max(now[stage], lane_s[stage])
                    program.pop(0)
        return now


_Item = tuple[str, int, tuple[str, ...], int]
"""Way and number of a micro-batch that is computed; or names of what is sent and received, and the other stage."""


def _program(stage: int, stages: int, batches: int) -> list[_Item]:
    """Return what a stage does in 1F1B."""
    ahead = min(batches, stages - stage - 1)
    before, after = stage > 0, stage + 1 < stages
    get_forward: list[_Item] = [("", 0, ("forward-recv",), stage - 1)] if before else []
    give_forward: list[_Item] = [("", 0, ("forward-send",), stage + 1)] if after else []
    get_backward: list[_Item] = [("", 0, ("backward-recv",), stage + 1)] if after else []
    give_backward: list[_Item] = [("", 0, ("backward-send",), stage - 1)] if before else []
    found: list[_Item] = []
    for batch in range(ahead):
        found += [*get_forward, ("forward", batch, (), -1), *give_forward]
    found += get_forward
    for batch in range(batches - ahead):
        found += [("forward", batch + ahead, (), -1)]
        found += [("", 0, ("forward-send", "backward-recv"), stage + 1)] if after else []
        found += [("backward", batch, (), -1)]
        is_last = batch + 1 == batches - ahead
        found += give_backward if is_last else [("", 0, ("backward-send", "forward-recv"), stage - 1)] if before else []
    for batch in range(batches - ahead, batches):
        found += [*get_backward, ("backward", batch, (), -1), *give_backward]
    return found


def write_timeline(of: Pipeline, seed_: int, folder: Path) -> float:
    """Write a job's timeline; return the share of a step that it would gain."""
    was, even = _Run(of, seed_, False), _Run(of.even(), seed_, True)
    names = [
        {"name": "process_name", "ph": "M", "pid": replica, "args": {"name": f"DP rank {replica}"}}
        for replica in range(of.replicas)
    ] + [
        {"name": "thread_name", "ph": "M", "pid": replica, "tid": 10 * stage + lane,
         "args": {"name": f"PP rank {stage}, TP rank 0, lane"}}
        for replica in range(of.replicas) for stage in range(of.stages) for lane in (0, 1, 3)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    was.events.sort(key=lambda event: event["ts"])
    (folder / "timeline.json").write_text(json.dumps({"traceEvents": [*was.events[:1], *names, *was.events[1:]]}))
    return 1 - statistics.fmean(even.step_s) / statistics.fmean(was.step_s)


def seconds_of(of: Pipeline, seed_: int, is_even: bool) -> list[list[list[list[float]]]]:
    """Return how long each micro-batch's forward takes: (steps, replicas, stages, batches)."""
    draw, found = random.Random(seed_), []
    times = of.stage_times or (1.0,) * of.stages
    for step in range(of.steps):
        lengths = [
            [1.0 if of.length is None else of.length(draw, replica, step, batch) for batch in range(of.batches)]
            for replica in range(of.replicas)
        ]
        if is_even:
            lengths = [[statistics.fmean(one for own in lengths for one in own)] * of.batches] * of.replicas
        factors = [
            [
                statistics.fmean(times)
                if is_even
                else times[stage] * (of.slow[2] if of.slow and (replica, stage) == of.slow[:2] else 1.0)
                for stage in range(of.stages)
            ]
            for replica in range(of.replicas)
        ]
        found.append(
            [
                [[TRACED_S * factor * one for one in own] for factor in of_stages]
                for own, of_stages in zip(lengths, factors, strict=True)
            ]
        )
    return found


def trace(jobs: list[tuple[int, Pipeline]], folder: Path) -> list[float]:
    """Run jobs, each as it is and then even, and keep their traces; return the share of a step that each would gain."""
    plain = [
        {"stages": job.stages, "is_gpipe": job.is_gpipe, "seconds": seconds_of(job, number, is_even)}
        for number, job in jobs
        for is_even in (False, True)
    ]
    (folder / "jobs.txt").write_text(json.dumps(plain))
    command = [sys.executable, "-m", "bench.uneven_rank", str(folder / "store")]
    ranks = [subprocess.Popen([*command, str(rank), "4", str(folder / "jobs.txt"), str(folder)]) for rank in range(4)]
    if sum(rank.wait() for rank in ranks):
        raise SystemExit("a rank failed")
    times = [float((folder / str(number) / "seconds.txt").read_text()) for number in range(len(plain))]
    return [1 - even / was for was, even in zip(times[::2], times[1::2], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", choices=["open", "held_out", "all"], default="all", help="which kinds")
    parser.add_argument("--each", type=positive, default=1, help="jobs of each kind")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--only", help="one kind alone")
    parser.add_argument("--traced", action="store_true", help="run pipelines over gloo, and read their traces")
    arguments = parser.parse_args()
    right, count = [0, 0, 0], 0
    kinds, held_out = (traced_kinds, TRACED_HELD_OUT) if arguments.traced else (kinds_of, HELD_OUT)
    jobs = [
        (number, kind, job)
        for number in range(arguments.seed, arguments.seed + arguments.each)
        for kind, job in kinds(random.Random(number)).items()
        if arguments.only in (None, kind)
        if arguments.kinds == "all" or (kind in held_out) == (arguments.kinds == "held_out")
    ]
    with tempfile.TemporaryDirectory() as kept:
        folders = [Path(kept) / str(place) for place in range(len(jobs))]
        if arguments.traced:
            shares = trace([(number, job) for number, _, job in jobs], Path(kept))
            folders = [Path(kept) / str(2 * place) / "traces" for place in range(len(jobs))]
        else:
            shares = [write_timeline(job, number, into) for (number, _, job), into in zip(jobs, folders, strict=True)]
        for (number, kind, job), folder, share in zip(jobs, folders, shares, strict=True):
            found = attribute(read_traces(folder).graph)
            said = [one.kind for one in found.findings]
            promised = found.together.share(found.replayed_s)
            marks = ((not said) if not job.expected else bool(said) and said[0] in job.expected,
                     set(said) == set(job.expected), not job.expected or abs(promised - share) <= CLOSE)  # fmt: skip
            right, count = [total + mark for total, mark in zip(right, marks, strict=True)], count + 1
            words = "; ".join(
                f"{one.kind} {found.graph.named(one.culprits.ranks) if one.culprits.ranks else ''} {one.when} "
                f"{one.cost.share(found.replayed_s):.0%}"
                for one in found.findings
            )
            names = zip(("cause", "all causes", "gain"), marks, strict=True)
            print(
                f"{kind} (seed {number}): "
                + ", ".join(f"{name} {'right' if mark else 'WRONG'}" for name, mark in names)
                + f"; true {share:.0%}, promised {promised:.0%}, replay {found.error:+.1%}; said: {words or 'healthy'}"
            )
    print(f"of {count} jobs: first cause {right[0]}, all causes {right[1]}, gain within 15 points {right[2]}")


if __name__ == "__main__":
    main()
