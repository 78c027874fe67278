"""What the host asks of a device; copies to the host are in tests/expert_parallel/test_host_reads.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tritonmoe.runtime import host_device
from tritonmoe.runtime.host_device import HostCopy, is_captured, wait_for_current_stream


def test_the_stream_of_the_device_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device than the current one may be captured, or not."""
    current = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current == [3])
    assert [is_captured(torch.device("cuda", number)) for number in (0, 3)] == [False, True]
    assert not is_captured(torch.device("cpu"))


def test_other_streams_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for = []

    def current_stream(device: str) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: waited_for.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waits for the whole device"))
    wait_for_current_stream("cpu")
    wait_for_current_stream("cuda:3")
    assert waited_for == ["cuda:3"]


def test_a_waiting_host_looks_around_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """At first it asks without a pause, since a forward waits for the answer."""
    clock, pauses, seen = [0.0], [], []

    def sleep(seconds: float) -> None:
        clock[0] += seconds + 1e-6
        pauses.append(seconds)

    monkeypatch.setattr(host_device, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=sleep))
    copy = HostCopy(torch.tensor([5, 7]))
    copy._copied = SimpleNamespace(query=lambda: clock[0] > 3.5)
    assert copy.wait(seen.append)[0].tolist() == [5, 7]
    assert seen == pytest.approx([1, 2, 3], abs=1e-3)
    assert set(pauses[:1900]) == {0.0}
    assert len(pauses) < 40_000

    copy._copied = SimpleNamespace(query=lambda: False)
    with pytest.raises(ZeroDivisionError):
        copy.wait(lambda waited_s: 1 // 0)
