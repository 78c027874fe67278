"""What makes gloo fast here: receives posted before sends, and threads that don't interrupt compute."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import ENVIRONMENT, run_processes

from tritonmoe.transports import ProcessGroupTransport
from tritonmoe.transports.gloo import GlooExchange


class PostedMessages:
    """Stands in for GlooLinks: notes what is posted, and how it is tagged."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, int, list[float]]] = []
        self.tags: list[int] = []
        self.group = "0/0", range(4)

    def receive(self, part: torch.Tensor, peer: int, tag: int) -> object:
        return self._post("receive", part, peer, tag)

    def send(self, part: torch.Tensor, peer: int, tag: int) -> object:
        return self._post("send", part, peer, tag)

    def _post(self, what: str, part: torch.Tensor, peer: int, tag: int) -> object:
        self.posted.append((what, peer, part.tolist()))
        self.tags.append(tag)
        return object()


def post(number: int, rows: torch.Tensor, there: list[int], here: list[int]) -> tuple[PostedMessages, torch.Tensor]:
    """Post exchange `number` of rank 1 of 4."""
    links, out = PostedMessages(), rows.new_zeros(sum(here))
    exchange = GlooExchange(links, None, rows, out, what="", timeout_s=1)  # type: ignore[arg-type]
    exchange.post_rows(1, number, rows, there, here, out)
    assert len(exchange.messages) == len(links.posted)
    return links, out


def test_receives_are_posted_before_sends() -> None:
    """Otherwise the rank that comes later lets its peers wait until its own rows have left."""
    links, out = post(7, torch.tensor([1.0, 2.0, 3.0, 4.0]), [2, 1, 0, 1], [0, 1, 3, 1])
    nothing = [0.0]
    sent = [("send", 3, [4.0]), ("send", 0, [1.0, 2.0])]
    assert links.posted == [("receive", 3, nothing), ("receive", 2, nothing * 3), *sent]
    assert out.tolist() == [3.0, 0.0, 0.0, 0.0, 0.0]


def test_messages_of_other_exchanges_sizes_or_dtypes_have_other_tags() -> None:
    """gloo aborts a process that receives more than it expects."""
    splits = [1, 1, 1, 1]
    tags = [
        post(number, torch.zeros(4 * width, dtype=dtype), [width] * 4, [width] * 4)[0].tags
        for number in (1, 2)
        for width in (1, 2)
        for dtype in (torch.int64, torch.float32)
    ]
    assert all(len(set(of_one)) == 1 for of_one in tags)
    assert len({of_one[0] for of_one in tags}) == len(tags)
    assert post(1, torch.zeros(4, dtype=torch.int64), splits, splits)[0].tags == tags[0]


@pytest.fixture
def group_without_cpu() -> Iterator[None]:
    """Like init_process_group("nccl") it has no backend for tensors on the CPU."""
    dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_without_cpu")
def test_counts_of_a_group_without_a_cpu_backend_travel_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = ProcessGroupTransport()
    assert transport._timeout_s == 77
    counts = torch.arange(3).view(1, 3)
    assert torch.equal(transport.exchange_counts(counts), counts)
    assert transport._links is not None
    transport.close()
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    with pytest.raises(ValueError, match="built without gloo"):
        ProcessGroupTransport()


WRAPPED = """
import torch, torch.distributed as dist
import tritonmoe as tm
from torch.distributed.tensor import DTensor
from tritonmoe.transports import ProcessGroupTransport, Transport

class Around(Transport):
    def __init__(self, inner, group):
        self.rank, self.size, self.inner, self.given = inner.rank, inner.size, inner, group
    def exchange(self, *arguments): return self.inner.exchange(*arguments)
    def post_counts(self, counts): return self.inner.post_counts(counts)
    @property
    def group(self): return self.given

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
inner = ProcessGroupTransport()
for transport, is_dtensor in ((inner, True), (Around(inner, inner.group), True), (Around(inner, None), False)):
    layer = tm.MoELayer(tm.MoEConfig(8, 8, num_experts=4, top_k=2), transport)
    assert isinstance(layer.experts.gate_up_proj, DTensor) == is_dtensor
    layer(torch.ones(3, 8)).sum().backward()
    assert layer.experts.gate_up_proj.grad is not None
dist.destroy_process_group()
"""


def test_a_transport_around_another_tells_its_group() -> None:
    """Parameters are then DTensors, as they are over the transport inside."""
    ended = subprocess.run([sys.executable, "-c", WRAPPED], env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


POLICIES = """
import os, time, torch, torch.distributed as dist
from pathlib import Path
from tritonmoe.transports import ProcessGroupTransport

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def policies():
    tasks = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text() == "gloo_tcp_loop\\n"]
    return [os.sched_getscheduler(int(task.name)) for task in tasks]
before, deadline = os.sched_getscheduler(0), time.monotonic() + 5
while not policies() and time.monotonic() < deadline:  # a thread takes its name when it first runs
    time.sleep(0.01)
print(len(policies()), "named")
ProcessGroupTransport().exchange_counts(torch.zeros(1, 1, dtype=torch.int64))
assert set(policies()) <= {os.SCHED_BATCH}, policies()
assert os.sched_getscheduler(0) == before != os.SCHED_BATCH
dist.destroy_process_group()
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="SCHED_BATCH is a scheduling policy of Linux")
def test_threads_of_gloo_do_not_interrupt() -> None:
    ended = subprocess.run([sys.executable, "-c", POLICIES], env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if ended.stdout.strip() == "0 named":
        pytest.skip("this torch's gloo gives its threads no names")


UNWAITED = """
import sys, time, torch, torch.distributed as dist
from tritonmoe.transports import ProcessGroupTransport

store, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
transport, rows = ProcessGroupTransport(), torch.ones(2, 2)
transport.exchange(rows, [1, 1], [1, 1]).wait()
if rank == 1:
    transport.exchange(rows, [1, 1], [1, 1])
else:
    time.sleep(4)
"""


@pytest.mark.thorough
def test_an_exchange_that_nobody_waits_for_does_not_abort_the_process(tmp_path: Path) -> None:
    """A thread that is inside gloo when the interpreter ends would: "terminate called without an active exception"."""
    ended = [run_processes(2, "gloo", "-c", UNWAITED, str(tmp_path / f"store{k}")) for k in range(3)]
    assert all(of.statuses == [0, 0] for of in ended), ended
