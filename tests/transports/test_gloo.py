"""What makes gloo fast here: receives posted before sends, and threads that don't interrupt compute."""

import subprocess
import sys

import pytest
import torch
from processes import ENVIRONMENT

from tritonmoe.transports.gloo import GlooExchange


class Message:
    def wait(self) -> None:
        pass


def test_receives_are_posted_before_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the rank that comes later lets its peers wait until its own rows have left."""
    posted: list[tuple[str, int, list[float]]] = []

    def irecv(rows: torch.Tensor, *, group_src: int, **_: object) -> Message:
        posted.append(("receive", group_src, rows.tolist()))
        return Message()

    def isend(rows: torch.Tensor, *, group_dst: int, **_: object) -> Message:
        posted.append(("send", group_dst, rows.tolist()))
        return Message()

    monkeypatch.setattr(torch.distributed, "irecv", irecv)
    monkeypatch.setattr(torch.distributed, "isend", isend)
    rows, out = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(5)
    exchange = GlooExchange(rows, out, what="", timeout_s=1)
    exchange.post_rows(None, 1, rows, [2, 1, 0, 1], [0, 1, 3, 1], out)
    nothing = [0.0]
    assert posted == [("receive", 3, nothing), ("receive", 2, nothing * 3), ("send", 3, [4.0]), ("send", 0, [1.0, 2.0])]
    assert out.tolist() == [3.0, 0.0, 0.0, 0.0, 0.0]
    assert len(exchange.messages) == 4


POLICIES = """
import os, torch.distributed as dist
from pathlib import Path
from tritonmoe.transports import ProcessGroupTransport

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def policies():
    tasks = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text() == "gloo_tcp_loop\\n"]
    return [os.sched_getscheduler(int(task.name)) for task in tasks]
before = os.sched_getscheduler(0)
print(len(policies()), "named")
ProcessGroupTransport()
assert set(policies()) <= {os.SCHED_BATCH}, policies()
assert os.sched_getscheduler(0) == before != os.SCHED_BATCH
dist.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="SCHED_BATCH is a scheduling policy of Linux")
def test_threads_of_gloo_do_not_interrupt() -> None:
    ended = subprocess.run([sys.executable, "-c", POLICIES], env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if ended.stdout.strip() == "0 named":
        pytest.skip("this torch's gloo gives its threads no names")
