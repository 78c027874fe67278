"""Runs the cases of fault_cases.py in gloo processes, and gives what every rank heard.

Run as fault_processes.py FOLDER CASES [SECONDS] it writes FOLDER/results.json: by case, what every rank raised or gave,
with SECONDS only of the cases in which a rank comes late, by so many. CASES: "one" (level), "two" (levels), or "quick
two" (some of them). The processes of a case are forks of one that has imported torch already.

Run as fault_processes.py FOLDER gloo CASE RANK SIZE, or by mpiexec as fault_processes.py FOLDER mpi CASE, it is one
rank of one case on one level, whose end is a user's.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # a layer on a process group imports these, which takes seconds on a busy machine
import torch.distributed.fsdp
import torch.distributed.tensor
from fault_cases import (
    CASES,
    CONFIG,
    LATE_S,
    NODE_SIZE,
    QUICK_TWO_LEVEL_CASES,
    SIZE,
    TIMEOUT_S,
    TWO_LEVEL_CASES,
    TWO_LEVEL_SIZE,
    late,
    step,
)

import tritonmoe as tm
from tritonmoe.transports import LocalTransport, MPITransport, ProcessGroupTransport, Transport

HANGS_AFTER_S = 20.0
CASES_OF = {
    "one": CASES,
    "two": TWO_LEVEL_CASES,
    "quick two": QUICK_TWO_LEVEL_CASES,
}


def run_rank(name: str, rank: int, folder: Path, which: str, timeout_s: float) -> None:
    """Run one rank of one case, and write what became of it."""
    size = SIZE if which.endswith("one") else TWO_LEVEL_SIZE
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=size, timeout=timedelta(seconds=300)
    )
    world = ProcessGroupTransport(timeout_s=HANGS_AFTER_S if "interrupted" in name else timeout_s)
    transport: Transport = world if which.endswith("one") else world.with_nodes(NODE_SIZE)
    transport.exchange_counts(torch.zeros(size, 1, dtype=torch.int64))
    tm.GroupedExperts(CONFIG, ProcessGroupTransport())  # the first one imports for as long as a rank here is late
    (folder / f"{name}.{rank}.started").touch()
    started = time.perf_counter()
    result: dict[str, Any] = {}
    try:
        result["value"] = CASES_OF[which][name](transport)
    except BaseException as error:
        result["error"], result["words"] = type(error).__name__, str(error)
    result["seconds"] = time.perf_counter() - started
    (folder / f"{name}.{rank}.json").write_text(json.dumps(result))


def run_as_a_user(folder: Path, backend: str, name: str, rank: int = 0) -> None:
    """Run one rank of one case in a process of its own; what it raises ends it as it would end a user's."""
    if backend == "mpi":
        from mpi4py import MPI

        transport: Transport = MPITransport(MPI.COMM_WORLD, timeout_s=TIMEOUT_S)
    else:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=SIZE)
        # gloo knows of a dead process without a timeout, which a busy machine could run into first
        transport = ProcessGroupTransport(timeout_s=TIMEOUT_S if "late" in name else HANGS_AFTER_S)
    (folder / f"{name}.{transport.rank}.pid").write_text(str(os.getpid()))
    transport.exchange_counts(torch.zeros(SIZE, 1, dtype=torch.int64))
    CASES[name](transport)


def run_case(name: str, folder: Path, which: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    size = SIZE if which.endswith("one") else TWO_LEVEL_SIZE
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                run_rank(name, rank, folder, which, timeout_s)
            finally:
                os._exit(0)  # with exchanges under way, gloo's own threads abort an ordinary exit
        pids.append(pid)
    deadline = time.monotonic() + HANGS_AFTER_S + 3 * timeout_s
    running = set(pids)
    to_be_interrupted = {"interrupted": pids, "one_interrupted": pids[-1:]}.get(name)
    while running and time.monotonic() < deadline:
        running -= {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]}
        if to_be_interrupted and len(list(folder.glob(f"{name}.*.started"))) == size:
            time.sleep(LATE_S)  # now all but the late one, which is the last, wait for it
            for pid in to_be_interrupted:
                os.kill(pid, signal.SIGINT)
            to_be_interrupted = None
        time.sleep(0.01)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    files = [folder / f"{name}.{rank}.json" for rank in range(size)]
    return {
        "ranks": [json.loads(file.read_text()) if file.exists() else None for file in files],
        "hung": [rank for rank, pid in enumerate(pids) if pid in running],
    }


def run_late_cases(late_s: float, folder: Path, which: str) -> dict[str, Any]:
    """Let a rank come so many seconds late, with a timeout that allows it, and with half of that time."""
    CASES_OF[which].update(late=late(late_s), too_late=late(late_s))
    timeouts = {"late": late_s + HANGS_AFTER_S, "too_late": late_s / 2, "healthy": TIMEOUT_S}
    return {name: run_case(name, folder, which, timeout_s) for name, timeout_s in timeouts.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    step(LocalTransport())  # what is imported in the first backward takes as long
    folder, which, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if which in CASES_OF:
        late_s = [float(seconds) for seconds in arguments]
        results = (
            run_late_cases(*late_s, folder, which)
            if late_s
            else {name: run_case(name, folder, which) for name in CASES_OF[which]}
        )
        (folder / "results.json").write_text(json.dumps(results))
    else:
        run_as_a_user(folder, which, arguments[0], *map(int, arguments[1:2]))
