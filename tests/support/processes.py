"""Starts a script as the ranks of a group, with gloo or NCCL or under mpiexec, and never leaves one behind."""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
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
LEAKS = re.compile(r"^nanobind: (leaked|this is likely).*\n?( - .*\n?|See https.*\n?)*", re.MULTILINE)
"""What Triton's bindings say at the end of a process that an error ends: more lines than the error has."""
NO_MPI = mpi.available()["mpi"]
NEEDS_MPI = pytest.mark.skipif(NO_MPI is not None, reason=str(NO_MPI))


@dataclass
class Ended:
    """What the processes printed, together, and their exit statuses (mpiexec: one for all)."""

    output: str
    statuses: list[int | None]
    """None of a rank that was killed after another had failed."""


@functools.cache
def forks() -> subprocess.Popen:
    """Return the process whose forks the ranks of this pytest process are."""
    started = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "forks.py")],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(started.communicate)  # it ends when nobody can ask it for more
    return started


def run_forks(scripts: Sequence[Sequence[str]], timeout_s: float, *, is_group: bool) -> tuple[list[str], Ended]:
    """Run a script, with its arguments, on each rank; give what went to stdout, and all that was printed.

    Args:
        is_group: they find each other through the environment, as torchrun's processes do.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "scripts": scripts,
            "folder": folder,
            "cwd": os.getcwd(),
            "timeout_s": timeout_s,
            "is_group": is_group,
        }
        server = forks()
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, f"forks.py ended with {server.wait()}"
        statuses = json.loads(answer)
        outputs, errors = (
            [
                LEAKS.sub("", (Path(folder) / f"{rank}.{kind}").read_text(errors="replace"))
                for rank in range(len(scripts))
            ]
            for kind in ("output", "errors")
        )
    if None in statuses and not (is_group and any(statuses)):
        raise subprocess.TimeoutExpired(list(scripts[0]), timeout_s, "\n".join(outputs), "\n".join(errors))
    return outputs, Ended("\n".join(map("".join, zip(outputs, errors, strict=True))), statuses)


def run_processes(size: int, backend: str, *script: str, timeout_s: float = 60.0) -> Ended:
    """Run a script with its arguments on `size` ranks; those not started by mpiexec get rank and size as well."""
    if backend != "mpi":
        scripts = [[*script, str(rank), str(size)] for rank in range(size)]
        return run_forks(scripts, timeout_s, is_group=False)[1]
    beside_python = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside_python) if beside_python.exists() else "mpiexec"
    process = subprocess.Popen(
        [mpiexec, "-n", str(size), sys.executable, *script],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    try:
        output = process.communicate(timeout=timeout_s)[0].decode()
        return Ended(output, [process.returncode])
    finally:
        if process.poll() is None:
            process.terminate()  # mpiexec ends its ranks with itself
            process.wait()


def run_torchrun(
    size: int, worker: Path, *arguments: str, cases: Sequence[str], timeout_s: float = 170.0, restarts: int = 0
) -> None:
    """Run the cases of a worker, in this order, on so many ranks; all must pass, each with a line `passed CASE`.

    restarts: torchrun itself starts the ranks, and again so often; else they are forks, as its processes would be.
    """
    if restarts:
        options = ["--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, str(worker), *arguments, *cases]
        by_torchrun = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=ENVIRONMENT, check=False
        )
        printed, ended = by_torchrun.stdout, Ended(by_torchrun.stderr, [by_torchrun.returncode])
    else:
        outputs, ended = run_forks([[str(worker), *arguments, *cases]] * size, timeout_s, is_group=True)
        printed = "".join(outputs)
    passed = [line.removeprefix("passed ") for line in printed.splitlines() if line.startswith("passed ")]
    assert not any(ended.statuses), (passed, ended.statuses, ended.output[-6000:])
    assert passed == list(cases)
