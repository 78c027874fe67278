"""Random faults of gloo processes, one after the other: all ranks rebuild their transport after each and go on.

Run as random_faults.py FOLDER SEED NUM_FAULTS, or random_faults.py FOLDER SEED soak SECONDS, it writes
FOLDER/results.json: a list of what happened, a Happening each. The processes of a world are forks of one
that has imported torch already; where one of them is killed, the others end too and the next world is made.
"""

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.transports import LocalTransport, ProcessGroupTransport, Transport

SIZE, NUM_EXPERTS, WIDTH = 3, 6, 8
TIMEOUT_S = 2.5
LATE_S = TIMEOUT_S + 1.5
KINDS = ("own code", "filler", "activation", "killed", "stopped", "late")
PASSES = ("forward", "backward")
FAULT_S = 60.0
"""Longer than any fault and what follows it may take."""


MAX_REBUILDS = 3
"""A rank that comes too late for one rebuild() finds the others in the next."""
WORLD_OF_SOAK = 200
"""Faults of a world, of which the last one kills."""


class Fault(NamedTuple):
    kind: str
    where: str
    victim: int


@dataclass
class Happening:
    """What one rank saw of one fault."""

    fault: Fault
    seed: int
    """Of the step."""
    rank: int
    error: str = ""
    seconds: float = 0.0
    """From the call until the error."""
    rebuilt: str = ""
    """"yes", or the error."""
    rebuild_s: float = 0.0
    value: float | None = None
    """Of a step afterwards."""
    rss: int = 0
    """Memory of the process, bytes."""


class OwnError(Exception):
    pass


def step(transport: Transport, seed: int = 0, fault: Fault | None = None, backend: str = "torch") -> float:
    """Run forward and backward, in which the victim meets its fault, and give a number that all of it goes into."""
    generator = torch.Generator().manual_seed(100 * seed + transport.rank)
    x = torch.randn(10, WIDTH, generator=generator, requires_grad=True)
    weights, ids = torch.randn(10, NUM_EXPERTS, generator=generator).softmax(1).topk(2)
    num_local = NUM_EXPERTS // transport.size
    experts = torch.Generator().manual_seed(seed)
    up = torch.randn(NUM_EXPERTS, 8, WIDTH, generator=experts)
    down = torch.randn(NUM_EXPERTS, WIDTH, 4, generator=experts)
    mine = slice(transport.rank * num_local, (transport.rank + 1) * num_local)
    up, down = (of[mine].clone().requires_grad_() for of in (up, down))

    has_met: list[str] = []

    def meet(kind: str, where: str) -> None:
        if fault is None or has_met or (fault.kind == "own code") != (kind == "own code") or fault.where != where:
            return
        if transport.rank != fault.victim or (fault.kind == "filler") != (kind == "filler"):
            return
        has_met.append(where)
        if fault.kind == "killed":
            time.sleep(0.2)  # what was posted before has left
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind == "late":
            time.sleep(LATE_S)
        else:
            raise OwnError(f"{kind} in {where}")

    def activation(h: Tensor) -> Tensor:
        if h.shape[0]:
            meet("activation", "forward")
        a = h[:, :4].sigmoid() * h[:, 4:]
        if a.requires_grad and h.shape[0]:
            a.register_hook(lambda _: meet("activation", "backward"))
        return a

    meet("own code", "forward")
    y = tm.expert_parallel_mlp(
        x,
        ids,
        weights,
        up,
        down,
        num_experts=NUM_EXPERTS,
        transport=transport,
        overlap=tm.OverlapConfig(2),
        activation=activation,
        backend=backend,
        fillers=[lambda: meet("filler", "forward")],
    )
    meet("own code", "backward")
    y.square().sum().backward()
    assert x.grad is not None
    assert up.grad is not None
    return float(y.detach().sum() + x.grad.sum() + up.grad.sum())


def random_faults(seed: int) -> Iterator[Fault]:
    """Return faults for ever: in every twelve, each kind in each pass once; a filler runs in forward only."""
    rng = random.Random(seed)
    while True:
        both = [(kind, where) for kind in KINDS for where in PASSES]
        rng.shuffle(both)
        for kind, where in both:
            yield Fault(kind, "forward" if kind == "filler" else where, rng.randrange(SIZE))


def faults_of_soak(seed: int) -> Iterator[Fault]:
    """Return the same, with few kills and few that take seconds: what counts is how many a process outlives."""
    rng, faults = random.Random(seed), random_faults(seed)
    for number, fault in enumerate(faults):
        is_last = number % WORLD_OF_SOAK == WORLD_OF_SOAK - 1
        while not is_last and (fault.kind == "killed" or (fault.kind in ("stopped", "late") and rng.random() < 0.8)):
            fault = next(faults)
        yield fault._replace(kind="killed") if is_last else fault


def meet_fault(transport: Transport, fault: Fault, seed: int) -> Happening:
    """Run a step with the fault, rebuild, and run one without."""
    happening = Happening(fault, seed, transport.rank)
    before = time.perf_counter()
    try:
        step(transport, seed, fault)
    except (tm.TransportError, OwnError) as error:
        happening.error = f"{type(error).__name__}: {error}"
    happening.seconds = time.perf_counter() - before
    if fault.kind != "own code":  # whose rank says nothing, not even that it is broken, before it calls rebuild()
        with pytest.raises(tm.TransportError, match=r"broken.*since its first failure.*rebuild"):
            transport.exchange_counts(torch.zeros(SIZE, 1, dtype=torch.int64))
    before = time.perf_counter()
    for _ in range(1 if fault.kind == "killed" else MAX_REBUILDS):
        try:
            transport.rebuild()
            happening.rebuilt = "yes"
            break
        except tm.TransportError as error:
            happening.rebuilt = str(error)
    happening.rebuild_s = time.perf_counter() - before
    if happening.rebuilt == "yes":
        happening.value = step(transport, seed)
    happening.rss = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return happening


def run_rank(rank: int, folder: Path, world: int, faults: list[Fault], first: int) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{world}",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=300),
    )
    torch.distributed.barrier()  # ranks that have just started may be further apart than the timeout
    transport = ProcessGroupTransport(timeout_s=TIMEOUT_S)
    transport.exchange_counts(torch.zeros(SIZE, 1, dtype=torch.int64))
    with (folder / f"{world}.{rank}.lines").open("w", buffering=1) as lines:
        for number, fault in enumerate(faults, first):
            lines.write(json.dumps(asdict(meet_fault(transport, fault, number % 5))) + "\n")


def run_world(folder: Path, world: int, faults: list[Fault], first: int) -> list[dict]:
    """Run faults of which only the last may kill, and give what the ranks saw."""
    pids = []
    for rank in range(SIZE):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run_rank(rank, folder, world, faults, first)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    running, statuses = set(pids), {}
    stopped_since: dict[int, float] = {}
    deadline = time.monotonic() + FAULT_S * len(faults)
    while running and time.monotonic() < deadline:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if ended and os.WIFSTOPPED(status):
                stopped_since[pid] = time.monotonic()
            elif ended:
                running.discard(pid)
                statuses[pid] = status
        for pid, since in list(stopped_since.items()):
            if time.monotonic() > since + LATE_S:
                os.kill(pid, signal.SIGCONT)
                del stopped_since[pid]
        time.sleep(0.01)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    files = [folder / f"{world}.{rank}.lines" for rank in range(SIZE)]
    happenings = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    killed = [faults[-1].victim] if faults[-1].kind == "killed" else []
    said = {rank: statuses.get(pid, "hangs") for rank, pid in enumerate(pids) if rank not in killed}
    return [{"world": world, **happening} for happening in happenings] + [{"world": world, "statuses": said}]


def main(folder: Path, faults: Iterator[Fault], seconds: float) -> None:
    torch.set_num_threads(1)
    step(LocalTransport())  # what is imported in the first backward takes seconds on a busy machine
    results: list[dict] = []
    until = time.monotonic() + seconds
    number = world = 0
    while time.monotonic() < until:
        of_world: list[Fault] = []
        for fault in faults:
            of_world.append(fault)
            if fault.kind == "killed":
                break
        if not of_world:
            break
        results += run_world(folder, world, of_world, number)
        number, world = number + len(of_world), world + 1
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    if sys.argv[3] == "soak":
        main(folder, faults_of_soak(seed), float(sys.argv[4]))
    else:
        main(folder, islice(random_faults(seed), int(sys.argv[3])), float("inf"))
