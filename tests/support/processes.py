"""Starts a script as the ranks of a group, with gloo or NCCL or under mpiexec, and never leaves one behind."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import tritonmoe
from tritonmoe.transports import mpi

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(tritonmoe.__file__).parents[1]), str(Path(__file__).parent)]),
    "OMP_NUM_THREADS": "1",
    # Open MPI refuses root, and more ranks than cores, unless it is told.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
NO_MPI = mpi.available()["mpi"]
NEEDS_MPI = pytest.mark.skipif(NO_MPI is not None, reason=str(NO_MPI))


@dataclass
class Ended:
    """What the processes printed, together, and their exit statuses (mpiexec: one for all)."""

    output: str
    statuses: list[int]


def run_processes(size: int, backend: str, *script: str, timeout_s: float = 60.0) -> Ended:
    """Run a script with its arguments on `size` ranks; those not started by mpiexec get rank and size as well."""
    command = [sys.executable, *script]
    if backend == "mpi":
        beside_python = Path(sys.executable).parent / "mpiexec"
        commands = [[str(beside_python) if beside_python.exists() else "mpiexec", "-n", str(size), *command]]
    else:
        commands = [[*command, str(rank), str(size)] for rank in range(size)]
    processes = [
        subprocess.Popen(c, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        for c in commands
    ]
    try:
        output = "\n".join(process.communicate(timeout=timeout_s)[0].decode() for process in processes)
        return Ended(output, [process.returncode for process in processes])
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # mpiexec ends its ranks with itself
                process.wait()


def run_torchrun(
    size: int, worker: Path, *arguments: str, cases: Sequence[str], timeout_s: float = 170.0, restarts: int = 0
) -> None:
    """Run the cases of a worker, in this order, on so many ranks; all must pass, each with a line `passed CASE`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    ended = subprocess.run(
        [*command, f"--max-restarts={restarts}", str(worker), *arguments, *cases],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=ENVIRONMENT,
        check=False,
    )
    passed = [line.removeprefix("passed ") for line in ended.stdout.splitlines() if line.startswith("passed ")]
    assert ended.returncode == 0, (passed, ended.stderr[-6000:])
    assert passed == list(cases)
