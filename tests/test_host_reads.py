"""What a layer call reads on the host of tensors that may be on a device: its counts, in one copy, nothing before."""

import threading

import pytest
import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.transports import HostCopy, Transport, TwoLevelTransport

READS = ("tolist", "item", "cpu", "numpy", "__int__", "__bool__", "__float__", "__index__")


@pytest.mark.parametrize("levels", [1, 2])
def test_one_read_before_the_count_exchange(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of read is caught, unless it is of what a HostCopy gave."""
    reads = threading.local()
    wait = HostCopy.wait

    def waited(self: HostCopy) -> list[Tensor]:
        reads.of_device.append("HostCopy")
        parts = wait(self)
        reads.on_host.update(part.untyped_storage().data_ptr() for part in parts)
        return parts

    monkeypatch.setattr(HostCopy, "wait", waited)
    for name in READS:
        original = getattr(Tensor, name)

        def read(self: Tensor, *arguments, name=name, original=original):
            if hasattr(reads, "of_device") and self.untyped_storage().data_ptr() not in reads.on_host:
                reads.of_device.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(Tensor, name, read)

    def on_rank(world: Transport) -> list[str]:
        before: list[str] = []
        exchange_counts = world.exchange_counts

        def exchanged(counts: Tensor) -> Tensor:
            before.extend(reads.of_device)
            del reads.of_device
            return exchange_counts(counts)

        world.exchange_counts = exchanged
        transport = world if levels == 1 else TwoLevelTransport(world, 2)
        layer = tm.MoELayer(
            tm.MoEConfig(8, 4, 4, 2), transport, tm.OverlapConfig(2), generator=torch.Generator().manual_seed(0)
        )
        x = torch.randn(6, 8, requires_grad=True)
        reads.on_host, reads.of_device = set(), []
        layer(x)
        return before

    for before in tm.run_on_emulated_ranks(on_rank, 4, timeout_s=20):
        assert before == ["HostCopy"]


def test_a_copy_gives_shapes_and_values_back() -> None:
    counts, flag = torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor(7)
    on_host = HostCopy(counts, flag, torch.zeros(0, 2)).wait()
    assert [part.shape for part in on_host] == [(2, 3), (), (0, 2)]
    assert all(part.dtype == torch.int64 and part.device.type == "cpu" for part in on_host)
    assert on_host[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert on_host[1].item() == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_device_waits_only_for_itself() -> None:
    counts = torch.full((3,), 5, device="cuda")
    copy = HostCopy(counts)
    torch.cuda._sleep(2_000_000_000)  # about a second, enqueued behind the copy
    assert copy.wait()[0].tolist() == [5, 5, 5]
    assert not torch.cuda.current_stream().query()
