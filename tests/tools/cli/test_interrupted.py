"""Ctrl-C in the middle of a run: every process ends, no namespace, process or file stays behind, the next run works."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from namespace_processes import processes_in, start_of

import tritonmoe as tm
from tritonmoe.tools.benchmarks.namespaces import INTERFACE, unusable_reason

ROOT = Path(tm.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
STARTED_WITHIN_S = 90.0
ENDS_WITHIN_S = 20.0
TRITONMOE = [sys.executable, "-m", "tritonmoe"]
BENCH = [*TRITONMOE, "bench", "overlap", "--model", "tiny", "--tokens", "64"]
ONE_LEVEL = ["--netns", "2"]
TWO_LEVELS = ["--netns", "4", "--node-size", "2", "--inter-rate", "500mbit"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TRAIN = [*TORCHRUN, str(ROOT / "examples" / "train_expert_parallel.py"), "--steps"]


def processes_of(session: int) -> dict[int, str]:
    """Return the network namespace of every process of a session."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(own_session) == session and state != "Z":
                found[int(entry.name)] = os.readlink(entry / "ns" / "net")
        except OSError:  # it has ended in the meantime
            pass
    return found


def wait_for(is_so: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def interrupt(
    command: list[str], folder: Path, is_running: Callable[[int, str], bool], end: Callable[[int], None]
) -> str:
    """Start a command, end it once it runs, and give what it said; nothing of it must be left.

    end: what is done to it, given the session's number, which is that of its first process.
    """
    said = folder / "said"
    with said.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(lambda: is_running(process.pid, said.read_text()), STARTED_WITHIN_S, "it has not started")
        assert process.poll() is None, said.read_text()
        inside = processes_in(set(processes_of(process.pid).values()) - {os.readlink("/proc/self/ns/net")})
        end(process.pid)
        assert process.wait(timeout=ENDS_WITHIN_S) != 0
        wait_for(lambda: not processes_of(process.pid), ENDS_WITHIN_S, "a process is left")
    finally:
        for pid in processes_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert not {pid for pid, started in inside if start_of(pid) == started}, "a process is left in a namespace"
    assert [path.name for path in folder.iterdir()] == ["said"]
    return said.read_text()


def run(command: list[str], folder: Path) -> None:
    ended = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def interrupt_all(session: int) -> None:
    """As from a terminal."""
    os.killpg(session, signal.SIGINT)


def interrupt_first(session: int) -> None:
    os.kill(session, signal.SIGINT)


def kill_rank_1(session: int) -> None:
    (rank_1,) = (pid for pid in processes_of(session) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(rank_1, signal.SIGKILL)


@pytest.mark.slow
def test_a_demo(tmp_path: Path) -> None:
    said = interrupt(
        [*TRITONMOE, "demo", "--ranks", "2", "--steps", "100000"],
        tmp_path,
        lambda _, said: "step 11: loss" in said,
        interrupt_all,
    )
    assert said.endswith("tritonmoe demo: interrupted\n")
    assert "Traceback" not in said


SLOW = pytest.mark.slow


@pytest.mark.skipif(unusable_reason() is not None, reason=str(unusable_reason()))
@pytest.mark.parametrize(
    ("ranks", "end"),
    [
        pytest.param(ONE_LEVEL, interrupt_all, id="all", marks=SLOW),
        pytest.param(ONE_LEVEL, interrupt_first, id="the first", marks=SLOW),
        pytest.param(ONE_LEVEL, kill_rank_1, id="killed", marks=SLOW),
        pytest.param(TWO_LEVELS, interrupt_all, id="all of two levels", marks=SLOW),
        pytest.param(TWO_LEVELS, interrupt_first, id="the first of two levels", marks=SLOW),
        pytest.param(TWO_LEVELS, kill_rank_1, id="killed on two levels", marks=SLOW),
    ],
)
def test_a_benchmark_in_namespaces(tmp_path: Path, ranks: list[str], end: Callable[[int], None]) -> None:
    """The ranks have run some calls: 300 kB have come to each."""

    def is_running(session: int, said: str) -> bool:
        received, own = [], os.readlink("/proc/self/ns/net")
        for pid in (pid for pid, namespace in processes_of(session).items() if namespace != own):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/net/dev").read_text().split("\n")
                received += [int(line.split()[1]) for line in lines if line.strip().startswith(f"{INTERFACE}:")]
        return len([count for count in received if count > 3e5]) >= int(ranks[1])

    files = ["--json", "figures", "--trace", "trace", "--png", "picture"]
    command = [*BENCH, *ranks, "--timeout-s", "10", "--rounds"]
    said = interrupt([*command, "100000", *files], tmp_path, is_running, end)
    if end == kill_rank_1:
        assert re.search(f"TransportError: .*rank 0 of {ranks[1]}", said), said
    else:
        assert "tritonmoe bench: interrupted" in said
    if end != interrupt_all:
        run([*command, "1", "--chunks", "1"], tmp_path)


@pytest.mark.parametrize(
    "end", [pytest.param(interrupt_all, marks=pytest.mark.thorough), pytest.param(interrupt_first, marks=SLOW)]
)
def test_training_under_torchrun(tmp_path: Path, end: Callable[[int], None]) -> None:
    said = interrupt([*TRAIN, "100000"], tmp_path, lambda _, said: "step 9 loss" in said, end)
    assert re.search("KeyboardInterrupt|got signal: 2", said)
    if end == interrupt_first:
        run([*TRAIN, "2"], tmp_path)
