"""Processes that compile end with the one that started them, even if that is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

MODULE = [sys.executable, "-m", "tritonmoe.ops.aot", "--targets", "sm_90", "--variants", "bf16", "--workers", "2"]


def children_of(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def is_running(pid: int) -> bool:
    """Say whether a process runs: one that has ended may wait for whoever inherited it to ask for its status."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], parent: subprocess.Popen | None = None) -> None:
    """Wait as long as it takes for a parent that goes on, else a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline if parent is None else parent.poll() is None
        time.sleep(0.1)


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent has ended")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia.compiler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    parent = subprocess.Popen(MODULE, env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(children_of(parent.pid)) >= 3, parent)  # two workers and a resource tracker
    children = children_of(parent.pid)
    assert len(children) == 3
    wait_until(lambda: any(tmp_path.iterdir()), parent)  # they compile
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(is_running(child) for child in children))
