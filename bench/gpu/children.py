"""Programs and processes with a time limit, which end with the process that started them."""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from tritonmoe.runtime.files import Json
from tritonmoe.runtime.processes import dies_with_its_parent, ends_with_its_parent

__all__ = ["ROOT", "Child", "answers", "run_program", "tail"]

ROOT = Path(__file__).parents[2]
TAIL = 4000
Job = TypeVar("Job")


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
    """Return the end of a program's output, as much as a line of results should hold."""
    return output[-TAIL:]


class Child:
    """A process of multiprocessing that answers what it is sent, one message after the other."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        """Start target(pipe, *arguments) at the head of a new session, so that what it starts can end with it."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_lead, args=(target, theirs, *arguments), daemon=False)
        self._process.start()
        theirs.close()

    def send(self, message: object) -> None:
        """Send it something to answer; where its process has ended, the answer will say so."""
        with contextlib.suppress(ConnectionError):
            self.pipe.send(message)

    def answer(self) -> Json:
        """Return what it sent; where its process ended instead, why under "failed"."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)
            return {"failed": f"its process ended with status {self._process.exitcode}"}

    def kill(self) -> None:
        """End it, whatever it does, with what it started."""
        if self._process.exitcode is None and self._process.pid is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it leads no session yet
                self._process.kill()
        self._process.join()
        self.pipe.close()


def _lead(target: Callable[..., None], pipe: Connection, *arguments: object) -> None:
    os.setsid()
    ends_with_its_parent()
    target(pipe, *arguments)


def answers(
    target: Callable[..., None], jobs: Sequence[Job], limit_s: float, deadline: float
) -> Iterator[tuple[Job, Json]]:
    """Run jobs in as many processes as there are cores; yield each job and its answer as soon as it is known.

    A job whose process ends, or takes longer than `limit_s`, is answered with why under "failed", and another process
    goes on. At `deadline`, on the clock of time.monotonic, all end; what is left has no answer.

    target: as for Child; it answers one job after the other.
    """
    waiting = collections.deque(jobs)
    num_processes = min(os.cpu_count() or 1, len(jobs))
    idle: list[Child] = []
    busy: dict[Connection, tuple[Child, Job, float]] = {}
    try:
        while (waiting or busy) and time.monotonic() < deadline:
            while waiting and len(busy) < num_processes:
                child, job = idle.pop() if idle else Child(target), waiting.popleft()
                child.send(job)
                busy[child.pipe] = child, job, time.monotonic() + limit_s
            until = min(deadline, *(until for _, _, until in busy.values()))
            ready = multiprocessing.connection.wait(list(busy), max(0.0, until - time.monotonic()))
            for pipe, (child, job, until) in tuple(busy.items()):
                if pipe in ready:
                    found = child.answer()
                elif until <= time.monotonic():
                    found = {"failed": f"it took longer than {limit_s:.0f} s"}
                else:
                    continue
                del busy[pipe]
                if "failed" in found:
                    child.kill()
                else:
                    idle.append(child)
                yield job, found
    finally:
        for child in [*idle, *(child for child, _, _ in busy.values())]:
            child.kill()
