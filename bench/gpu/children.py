"""Programs with a time limit, which end with the process that started them."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tritonmoe.runtime.files import Json
from tritonmoe.runtime.processes import dies_with_its_parent

__all__ = ["ROOT", "run_program", "tail"]

ROOT = Path(__file__).parents[2]
TAIL = 4000


def run_program(command: Sequence[str], limit_s: float, variables: Mapping[str, str | None] | None = None) -> Json:
    """Run a program in the repository's root; give its status, its seconds, and the end of what it printed.

    variables: what differs from this process's environment, None where a variable is to be missing. A program that
    takes longer than `limit_s` is killed with what it started, and has status None.
    """
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, **(variables or {})}
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=dies_with_its_parent,
    )
    status: int | None
    try:
        output, _ = process.communicate(timeout=limit_s)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = None
    return {
        "command": " ".join(command),
        "status": status,
        "program_s": round(time.perf_counter() - started, 2),
        "output": output,
    }


def tail(output: str) -> str:
    """Give the end of a program's output, as much as a line of results should hold."""
    return output[-TAIL:]
