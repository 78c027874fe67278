"""A host that waits for its device, where over NCCL the device waits for rows that never come."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import tritonmoe as tm
from tritonmoe.runtime import host_device
from tritonmoe.transports import HostCopy, ProcessGroupTransport, Transport, TwoLevelTransport
from tritonmoe.transports.notices import Notice, Notices
from tritonmoe.transports.process_group import CollectiveExchange


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setattr(host_device, "LOOK_S", 0.01)
    return dist.HashStore()


def first_of_two(store: dist.Store, timeout_s: float) -> ProcessGroupTransport:
    """Return rank 0's transport of a group that is never connected."""
    transport = object.__new__(ProcessGroupTransport)
    transport.rank, transport.size = 0, 2
    transport._timeout_s, transport._pid, transport.is_closed = timeout_s, os.getpid(), False
    transport._notices = Notices(store, 0, 2, 0)
    transport._begin_generation(1)
    return transport


def copy_behind(num_queries: float) -> HostCopy:
    """Return a copy that the device has made at the last of so many queries."""
    copy, left = HostCopy(torch.tensor([5, 7])), [num_queries]

    def query() -> bool:
        left[0] -= 1
        return left[0] <= 0

    copy._copied = SimpleNamespace(query=query, synchronize=lambda: pytest.fail("nothing would end this"))
    return copy


def test_a_rank_that_failed_ends_the_waiting(store: dist.Store) -> None:
    transport = first_of_two(store, timeout_s=60)
    Notices(store, 1, 2, 0).put_up(Notice(0, 1, "failed with OutOfMemoryError: as if"))
    with pytest.raises(tm.TransportError, match=r"rows that will never come: .*; rank 1 failed with OutOfMem"):
        transport.wait_for_copy(copy_behind(float("inf")))
    with pytest.raises(tm.TransportError, match="is broken on rank 0 of 2"):
        transport._check_usable()


def test_the_timeout_ends_the_waiting(store: dist.Store) -> None:
    transport = first_of_two(store, timeout_s=0.05)
    with pytest.raises(tm.TransportError, match=r"never come: rank 0 waited 0\.\d s for its device$"):
        transport.wait_for_copy(copy_behind(float("inf")))
    assert Notices(store, 1, 2, 0).find_broken(1) == 0


def test_a_notice_of_before_ends_nothing(store: dist.Store) -> None:
    """The ranks have met since, and a later take_down() of one of them takes nothing back of another."""
    transport, other = first_of_two(store, timeout_s=60), Notices(store, 1, 2, 0)
    other.put_up(Notice(0, 0, "failed with OutOfMemoryError: as if"))
    received = transport.wait_for_copy(copy_behind(500))
    assert received[0].tolist() == [5, 7]
    other.put_up(Notice(0, 1, "failed again"))
    transport._notices.take_down()
    assert transport._notices.find_broken(1) == 1


def test_a_lost_exchange_cuts_the_connections(store: dist.Store) -> None:
    """Otherwise the other ranks wait for this one's counts until their timeout; of a generation before it cuts none."""
    transport, cuts = first_of_two(store, timeout_s=60), []

    def fail() -> None:
        raise RuntimeError("as NCCL with blocking wait")

    def lost_exchange() -> CollectiveExchange:
        rows = torch.zeros(2, 1)
        transport._links = SimpleNamespace(cut=lambda: cuts.append(transport.generation))
        return CollectiveExchange(transport, SimpleNamespace(wait=fail), rows, rows, "rows")

    before = lost_exchange()
    transport._begin_generation(2)
    now = lost_exchange()
    for exchange, expected in ((before, []), (now, [2])):
        with pytest.raises(tm.TransportError, match="as NCCL with blocking wait"):
            exchange.wait()
        assert cuts == expected
    assert Notices(store, 1, 2, 0).find_broken(2) == 0


@pytest.mark.parametrize(
    ("levels", "options"),
    [(1, {}), (2, {}), (1, {"chunk_by": "experts"}), (1, {"capacity": 4.0}), (1, {"capacity": 0.1})],
)
def test_every_wait_of_a_call_can_be_ended(levels: int, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    of_thread = threading.local()
    wait = HostCopy.wait

    def waited(copy: HostCopy) -> list[torch.Tensor]:
        of_thread.waits.append("copy")
        return wait(copy)

    def wait_for_copy(self: Transport, copy: HostCopy) -> list[torch.Tensor]:
        of_thread.waits.append("transport")
        return copy.wait()

    monkeypatch.setattr(HostCopy, "wait", waited)
    monkeypatch.setattr(Transport, "wait_for_copy", wait_for_copy)

    def on_rank(world: Transport) -> list[str]:
        of_thread.waits = []
        transport = world if levels == 1 else TwoLevelTransport(world, 2)
        layer = tm.MoELayer(tm.MoEConfig(8, 4, 4, 2), transport, tm.OverlapConfig(2, **options))
        layer(torch.randn(6, 8, generator=torch.Generator().manual_seed(world.rank)))
        return of_thread.waits

    for waits in tm.run_on_emulated_ranks(on_rank, 4, timeout_s=20):
        assert waits == ["transport", "copy"] * (2 if options.get("capacity") == 0.1 else 1)
