"""Processes that compile end with the one that started them, even if that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MODULE = [sys.executable, "-m", "tritonmoe.aot", "--targets", "sm_90", "--variants", "bf16", "--workers", "2"]


def children_of(pid: int) -> list[int]:
    """Give the ids of a process's children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent has ended")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia.compiler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    parent = subprocess.Popen(MODULE, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(children_of(parent.pid)) < 3 and time.monotonic() < deadline:  # two workers and a resource tracker
        time.sleep(0.1)
    children = children_of(parent.pid)
    assert len(children) == 3
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:  # they compile
        time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [child for child in children if Path(f"/proc/{child}").exists()] == []
