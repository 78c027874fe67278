"""What a layer call reads on the host of tensors that may be on a device: its counts, in one copy, nothing before.

With a capacity: one flag, behind the last combine.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batches import KERNEL_DEVICE, Batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tritonmoe as tm
from tritonmoe.transports import HostCopy, PendingExchange, Transport, TwoLevelTransport

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
        post_counts = world.post_counts

        def posted(counts: Tensor) -> PendingExchange:
            before.extend(reads.of_device)
            del reads.of_device
            return post_counts(counts)

        world.post_counts = posted
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


class DeviceReads(TorchDispatchMode):
    """Notes what one thread reads on the host of given tensors and of all that is computed from them.

    Tables that the host makes itself are its own. `happened` has whatever else a test notes, in order.
    """

    SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount")

    def __init__(self, given: list[Tensor], happened: list[str]) -> None:
        super().__init__()
        self.happened = happened
        self.of_device: dict[int, torch.UntypedStorage] = {}  # kept, so that no address comes again
        self.is_paused = False
        self.add(given)

    def add(self, tensors: Any) -> None:
        storages = [t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, Tensor)]
        self.of_device |= {storage.data_ptr(): storage for storage in storages if storage.nbytes()}

    def forget(self, tensor: Tensor) -> None:
        self.of_device.pop(tensor.untyped_storage().data_ptr(), None)

    def reads(self, values: Any) -> bool:
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
        return not self.is_paused and any(t.untyped_storage().data_ptr() in self.of_device for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        is_of_device = self.reads((args, kwargs))
        has_unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        if is_of_device and (name in self.SYNCHRONISING or has_unknown_size):
            self.happened.append(name)
        result = func(*args, **kwargs)
        if is_of_device:
            self.add(result)
        return result


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Reads that reach no dispatch mode go to `noted.mode` of their thread; an interpreted kernel's don't count."""
    threads = threading.local()
    for name in ("tolist", "cpu", "numpy", "__array__"):
        original = getattr(Tensor, name)

        def read(self: Tensor, *arguments, name=name, original=original, **options):
            mode = getattr(threads, "mode", None)
            if mode is not None and mode.reads(self):
                mode.happened.append(name)
            return original(self, *arguments, **options)

        monkeypatch.setattr(Tensor, name, read)
    wait = HostCopy.wait

    def waited(self: HostCopy) -> list[Tensor]:
        parts = wait(self)
        threads.mode.happened.append("HostCopy")
        threads.mode.forget(parts[0])
        return parts

    monkeypatch.setattr(HostCopy, "wait", waited)

    @contextlib.contextmanager
    def paused() -> Iterator[None]:
        threads.mode.is_paused = True
        yield
        threads.mode.is_paused = False

    if KERNEL_DEVICE == "cpu":
        from triton.runtime.interpreter import GridExecutor

        interpret = GridExecutor.__call__

        def interpreted(self: Any, *arguments: Any, **options: Any) -> None:
            with paused():
                interpret(self, *arguments, **options)

        monkeypatch.setattr(GridExecutor, "__call__", interpreted)
    return threads


@pytest.mark.sweep(1)
@pytest.mark.parametrize("capacity", [None, 100.0, 0.1], ids=["exact", "fits", "overflows"])
@pytest.mark.parametrize("local_first", [True, False])
def test_with_a_capacity_nothing_is_read_before_the_last_combine(
    local_first: bool, capacity: float | None, noted: threading.local
) -> None:
    """Metadata, two dispatches, two combines; then one flag. Backward reads nothing of the device."""
    batch = Batch(2, 6, 2, torch.float32, device=KERNEL_DEVICE)
    overlap = tm.OverlapConfig(2, local_first, capacity=capacity)

    def on_rank(transport: Transport) -> tuple[list[str], list[str]]:
        happened: list[str] = []
        exchange, post_counts = transport.exchange, transport.post_counts
        transport.exchange = lambda *a, **k: happened.append("rows") or exchange(*a, **k)
        transport.post_counts = lambda counts: happened.append("counts") or post_counts(counts)
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        given = [*leaves.values(), batch.ids[transport.rank], batch.tokens["dout"][transport.rank]]
        noted.mode = DeviceReads(given, happened)
        with noted.mode:
            out = batch.call(transport, leaves, overlap, backend="triton")
            in_forward = list(happened)
            happened.clear()
            torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][transport.rank])
        return in_forward, happened

    exact = ["HostCopy", "counts", *["rows"] * 5]
    expected = exact if capacity is None else ["counts", *["rows"] * 5, "HostCopy", "counts"]
    if capacity == 0.1:
        expected += exact
    for forward, backward in tm.run_on_emulated_ranks(on_rank, 2, device=KERNEL_DEVICE, timeout_s=120):
        assert forward == expected
        assert backward[0] == "counts"
        assert set(backward[1:]) == {"rows"}


@pytest.mark.parametrize("name", ["tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"])
def test_every_kind_of_read_is_noted(name: str, noted: threading.local) -> None:
    given, table, happened = torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64), []
    noted.mode = DeviceReads([given], happened)
    with noted.mode:
        getattr(table, name)()
        assert not happened
        getattr(given[:1] * table, name)()
    assert len(happened) == 1
    noted.mode = None


def test_a_copy_gives_shapes_and_values_back() -> None:
    counts, flag = torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor(7)
    on_host = HostCopy(counts, flag, torch.zeros(0, 2)).wait()
    assert [part.shape for part in on_host] == [(2, 3), (), (0, 2)]
    assert all(part.dtype == torch.int64 and part.device.type == "cpu" for part in on_host)
    assert on_host[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert on_host[1].item() == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_device_waits_only_for_itself() -> None:
    counts = torch.full((3,), 5, device="cuda")
    copy = HostCopy(counts)
    torch.cuda._sleep(2_000_000_000)  # about a second, enqueued behind the copy
    assert copy.wait()[0].tolist() == [5, 5, 5]
    assert not torch.cuda.current_stream().query()
