"""LateDevice: a CPU that stands in for a GPU whose streams copy late, and which says what has no order.

Tensors are the CPU's. Copies into a device's blocks are only made when somebody waits for them; until then a block has
NaN. Each stream has a vector clock, which events carry to streams that wait for them: what reads a block, fills it,
fills pinned memory or frees memory must be behind what it depends on by these clocks, whatever the order in which this
host happened to call it. What computes is called at once, on the stream that is current in its thread.
"""

import contextlib
import ctypes
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tritonmoe.placement import offloaded
from tritonmoe.runtime import expert_blocks
from tritonmoe.runtime.pinned_memory import PinnedMemory
from tritonmoe.runtime.weight_files import WeightFile

__all__ = ["LateDevice", "LateStream"]

POISON = 0xFF
"""NaN in every dtype that has it."""
VIEWS = {"__get__", "view", "unsqueeze", "flatten", "as_strided", "untyped_storage", "data_ptr", "__getitem__"}
VIEWS |= {"stride", "dim", "storage_offset", "numel", "size", "is_contiguous", "nbytes", "__set__"}
"""Operations that read no value."""
Clock = dict["LateStream", int]


class LateStream:
    """A stream: copies that have not been made, and a clock of what stands behind what."""

    def __init__(self, device: "LateDevice", name: str) -> None:
        self._device, self._name = device, name
        self.clock: Clock = {self: 0}
        self.pending: list[tuple[int, Callable[[], None]]] = []

    def __repr__(self) -> str:
        return self._name

    def tick(self) -> int:
        self.clock[self] += 1
        return self.clock[self]

    def wait_event(self, event: "LateEvent") -> None:
        with self._device.lock:
            event.make()
            _join(self.clock, event.clock)

    def synchronize(self) -> None:
        with self._device.lock:
            self._device.host_waits.append(threading.get_ident())
            self.make(self.clock[self])
            _join(self._device.host, self.clock)

    def make(self, until: int) -> None:
        """Make the copies that stand before a moment."""
        while self.pending and self.pending[0][0] <= until:
            with torch._C.DisableTorchFunction():
                self.pending.pop(0)[1]()


class LateEvent:
    """An event; one that was never recorded is waited for by nobody, as on a GPU."""

    def __init__(self, device: "LateDevice") -> None:
        self._device = device
        self.clock: Clock = {}
        self._stream: LateStream | None = None

    def record(self, stream: LateStream) -> None:
        with self._device.lock:
            stream.tick()
            self._stream, self.clock = stream, dict(stream.clock)

    def query(self) -> bool:
        """Return whether everything is over, without a wait: it is where someone has waited for it."""
        with self._device.lock:
            return self._stream is None or not any(
                until <= self.clock[self._stream] for until, _ in self._stream.pending
            )

    def elapsed_time(self, end: "LateEvent") -> float:
        assert self._stream is end._stream, "of two streams"
        return float(end.clock[end._stream] - self.clock[self._stream])

    def make(self) -> None:
        if self._stream is not None:
            self._stream.make(self.clock[self._stream])

    def synchronize(self) -> None:
        with self._device.lock:
            self._device.host_waits.append(threading.get_ident())
            self.make()
            _join(self._device.host, self.clock)


def _join(clock: Clock, other: Clock) -> None:
    for stream, at in other.items():
        clock[stream] = max(clock.get(stream, 0), at)


@dataclass
class _Memory:
    """What happened to a block of the device, or to pinned memory, since it was filled."""

    allocated_on: LateStream | None = None
    filled: tuple[LateStream, int] | None = None
    read: list[tuple[LateStream, int]] = field(default_factory=list)


class LateDevice:
    """What stands in the places of torch.cuda's streams and events; install() puts it there."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.faults: list[str] = []
        self.host_waits: list[int] = []
        """The threads that have waited for the device."""
        self.num_checked = self.num_copies = 0
        self.registered: dict[int, int] = {}
        self.host: Clock = {}
        self._of_thread = threading.local()
        self._numbers = iter(range(10**9))
        self._blocks: dict[int, _Memory] = {}
        self._pinned: dict[int, tuple[int, _Memory]] = {}

    # What tests call

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.set_num_threads(1)  # products in the thread that calls, as on a GPU
        for module in (expert_blocks, offloaded):
            monkeypatch.setattr(module, "copies_late", lambda device: device.type == "cpu")
        monkeypatch.setattr(offloaded, "has_late_device", lambda: True)
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: self.stream())
        monkeypatch.setattr(torch.cuda, "Event", self._event_type())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waits for the whole device"))
        monkeypatch.setattr(
            torch.cuda,
            "cudart",
            lambda: SimpleNamespace(cudaHostRegister=self._register, cudaHostUnregister=self._unregister),
        )
        monkeypatch.setattr(PinnedMemory, "copy", lambda *given: self._copy(*given))
        allocate, read = expert_blocks.DeviceBlocks.allocate, WeightFile.read

        def allocate_here(blocks: expert_blocks.DeviceBlocks, num_bytes: int) -> Any:
            with _Allocations(self):
                block = allocate(blocks, num_bytes)
            block.memory.fill_(POISON)
            return block

        def read_here(file: WeightFile, memory: memoryview, offset: int) -> None:
            self._host_writes(memory)
            read(file, memory, offset)

        monkeypatch.setattr(expert_blocks.DeviceBlocks, "allocate", allocate_here)
        monkeypatch.setattr(WeightFile, "read", read_here)

    def _event_type(self) -> type:
        device = self

        class Event(LateEvent):
            def __init__(self, **_: bool) -> None:
                super().__init__(device)

        return Event

    def stream(self) -> LateStream:
        return LateStream(self, f"stream {next(self._numbers)}")

    @property
    def current(self) -> LateStream:
        found = self._of_thread.__dict__.setdefault("streams", [])
        if not found:
            found.append(self.stream())
        return found[-1]

    @contextlib.contextmanager
    def computing(self, stream: LateStream | None = None) -> Iterator[LateStream]:
        """Check what this thread computes inside, on a stream."""
        with self._on(stream or self.stream()) as current, _Reads(self):
            yield current

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def check(self) -> None:
        """Raise AssertionError where something had no order, or nothing was seen."""
        assert not self.faults, "\n".join(self.faults[:5])
        assert self.num_checked
        assert self.num_copies

    def is_given_back(self) -> bool:
        """Return whether all memory is, as soon as threads that read ahead have let go of their readers."""
        for _ in range(1000):
            gc.collect()  # a reader and its weights know each other
            if not self.registered and not self._blocks:
                return True
            time.sleep(0.01)
        return False

    # What stands in torch's places

    @contextlib.contextmanager
    def _on(self, stream: LateStream) -> Iterator[LateStream]:
        streams = self._of_thread.__dict__.setdefault("streams", [])
        streams.append(stream)
        try:
            yield stream
        finally:
            streams.pop()

    def _register(self, address: int, num_bytes: int, flags: int) -> int:
        assert flags == 1
        with self.lock:
            assert address not in self.registered
            self.registered[address] = num_bytes
            self._pinned[address] = num_bytes, _Memory()
        return 0

    def _unregister(self, address: int) -> int:
        with self.lock:
            del self.registered[address]
            self._check_host("pinned memory is let go", self._pinned.pop(address)[1])
        return 0

    def allocated(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, memory = storage.data_ptr(), _Memory(self.current)
        self._blocks[address] = memory
        weakref.finalize(storage, self._freed, address, memory).atexit = False

    def _freed(self, address: int, memory: _Memory) -> None:
        with self.lock:
            if self._blocks.get(address) is memory:
                del self._blocks[address]
            for stream, time in memory.read:
                if memory.allocated_on is not None and memory.allocated_on.clock.get(stream, 0) < time:
                    self.faults.append(
                        f"memory that {stream} reads goes back to the allocator, which doesn't know of it"
                    )

    def _copy(self, pinned: PinnedMemory, first: int, out: Tensor, stream: LateStream) -> None:
        with self.lock:
            address = pinned.bytes.untyped_storage().data_ptr()
            memory, source = self._blocks[out.untyped_storage().data_ptr()], self._pinned[address][1]
            pinned._streams.add(stream)
            if stream is not self.current:
                self.faults.append(f"a copy is called on {self.current}, not on {stream}")
            if stream is not memory.allocated_on:
                self.faults.append(f"{stream} fills memory that was allocated on {memory.allocated_on}")
            for reader, time in memory.read:
                if stream.clock.get(reader, 0) < time:
                    self.faults.append(f"{stream} fills a block that {reader} may still read")
            memory.filled, memory.read = (stream, stream.tick()), []
            source.read.append(memory.filled)
            with torch._C.DisableTorchFunction():
                out.fill_(POISON)
                from_here = pinned.bytes[first : first + out.numel()]
            stream.pending.append((memory.filled[1], lambda: out.copy_(from_here)))
            self.num_copies += 1

    def _host_writes(self, memory: memoryview) -> None:
        address = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
        with self.lock:
            for first, (num_bytes, pinned) in self._pinned.items():
                if first <= address < first + num_bytes:
                    self._check_host("the host fills pinned memory", pinned)
                    pinned.read.clear()

    def _check_host(self, what: str, memory: _Memory) -> None:
        for stream, at in memory.read:
            if self.host.get(stream, 0) < at:
                self.faults.append(f"{what} that {stream} may still copy")

    def reads(self, tensors: list[Tensor], name: str) -> None:
        with self.lock:
            for tensor in tensors:
                memory = self._blocks.get(tensor.untyped_storage().data_ptr())
                if memory is None or memory.filled is None:
                    continue
                current, (stream, time) = self.current, memory.filled
                if current.clock.get(stream, 0) < time:
                    self.faults.append(f"{name} on {current} reads a block that {stream} may still fill")
                memory.read.append((current, current.tick()))
                self.num_checked += 1


class _Reads(TorchFunctionMode):
    """Notes which blocks the operations of a thread read."""

    def __init__(self, device: LateDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in VIEWS:
            tensors = [
                leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is Tensor and leaf.device.type == "cpu"
            ]
            self._device.reads(tensors, name)
        return func(*args, **(kwargs or {}))


class _Allocations(TorchFunctionMode):
    """Notes on which stream memory is allocated."""

    def __init__(self, device: LateDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.empty:
            self._device.allocated(found)
        return found
