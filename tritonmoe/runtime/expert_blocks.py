"""ExpertBlocks: memory for experts that are read ahead of their use, on a CPU or on a GPU, which does all of it later.

On a CPU an expert is there when it was read, and its memory is free when its tensor is gone. On a GPU streams wait for
each other: a product for the copy of its expert, and the next copy into that memory for the product.
"""

import ctypes
import mmap
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonmoe.runtime.cpu_threads import num_workers
from tritonmoe.runtime.pinned_memory import PinnedMemory
from tritonmoe.runtime.weight_files import WeightFile

__all__ = [
    "Block",
    "DeviceSpans",
    "ExpertBlocks",
    "LoadedExpert",
    "Span",
    "StoredExpert",
    "copies_late",
    "has_late_device",
    "make_blocks",
    "noted_waits",
    "seconds_of",
    "timed_on",
]

NUM_STAGED = 2
"""So many experts of files have pinned memory: one is copied to the device while the next one is read."""

SHORTEST_SPAN_S = 2e-5
"""Between two events with nothing to wait for in between less passes on a device."""
MOST_SPANS = 256
"""So many are kept before those that are over are added up."""

Span = tuple["torch.cuda.Event", "torch.cuda.Event"]
"""Two events on one stream of a device, around what is timed."""


class StoredExpert(NamedTuple):
    """Where one expert is, and what it is."""

    source: WeightFile | PinnedMemory
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class LoadedExpert:
    """One expert in memory: a context in which operations with its tensor are enqueued, or computed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __enter__(self) -> Tensor:
        return self.tensor

    def __exit__(self, *_: object) -> None:
        pass


Block = Any
"""Memory of ExpertBlocks.allocate(), which has `nbytes`."""


class ExpertBlocks(ABC):
    """Memory of one device, and how experts come into it."""

    num_workers: int
    """How many threads multiply at a time."""
    is_late: bool
    """Whether what is called here has only been enqueued when the call returns."""

    @abstractmethod
    def allocate(self, num_bytes: int) -> Block:
        """Return a block.

        Raises:
            MemoryError, torch.OutOfMemoryError: there is no memory.
        """

    @abstractmethod
    def load(self, stored: StoredExpert, block: Block, free: Callable[[Block], object]) -> tuple[LoadedExpert, float]:
        """Bring an expert into a block; return it, and the seconds in which it was read from a file.

        free: called with the block when nobody has the expert any more, by any thread, in any place.

        Raises:
            OSError, ValueError: as WeightFile.read().
        """


def copies_late(device: torch.device) -> bool:
    """Return whether a device's streams copy and compute behind the host."""
    return device.type == "cuda"


def has_late_device() -> bool:
    """Return whether this machine has such a device."""
    return torch.cuda.is_available()


def make_blocks(device: torch.device, largest_bytes: int) -> ExpertBlocks:
    """Return the memory of a device. largest_bytes: of an expert."""
    return DeviceBlocks(device, largest_bytes) if copies_late(device) else HostBlocks()


class HostBlocks(ExpertBlocks):
    """Memory of the host, where it multiplies itself."""

    is_late = False

    def __init__(self) -> None:
        self.num_workers = num_workers(torch.device("cpu"))

    def allocate(self, num_bytes: int) -> Tensor:
        # Memory of its own, which goes back to the system: among the activations of a step it would lie between gaps.
        try:
            mapped = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"there is no memory for an expert of {num_bytes} bytes: {error}") from error
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def load(self, stored: StoredExpert, block: Tensor, free: Callable[[Block], object]) -> tuple[LoadedExpert, float]:
        assert isinstance(stored.source, WeightFile), "pinned experts are refused on a CPU"
        memory = (ctypes.c_char * stored.num_bytes).from_address(block.data_ptr())
        weakref.finalize(memory, free, block).atexit = False  # with the last tensor in it
        with torch.inference_mode(False):
            tensor = torch.frombuffer(memory, dtype=stored.dtype).view(stored.shape)
        started = time.perf_counter()
        stored.source.read(memoryview(memory).cast("B"), stored.offset)
        return LoadedExpert(tensor), time.perf_counter() - started


class _Noted(threading.local):
    waits: list[Span] | None = None


_noted = _Noted()


@contextmanager
def noted_waits() -> Iterator[list[Span]]:
    """Note where this thread's streams wait for experts inside."""
    before, _noted.waits = _noted.waits, []
    try:
        yield _noted.waits
    finally:
        _noted.waits = before


@contextmanager
def timed_on(device: torch.device, spans: "DeviceSpans") -> Iterator[None]:
    """Time what is called inside on a device's current stream."""
    started = _timed_event(device)
    try:
        yield
    finally:
        spans.add([(started, _timed_event(device))])


def _timed_event(device: torch.device) -> "torch.cuda.Event":
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_of(spans: Sequence[Span]) -> float:
    """Return how long spans took together, once the device has come to their ends: the host waits for that."""
    total_s = 0.0
    for started, ended in spans:
        ended.synchronize()
        total_s += _seconds(started, ended)
    return total_s


def _seconds(started: "torch.cuda.Event", ended: "torch.cuda.Event") -> float:
    seconds = float(started.elapsed_time(ended)) / 1e3
    return seconds if seconds > SHORTEST_SPAN_S else 0.0


class DeviceSpans:
    """Spans of a device, added up once they are over."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque()
        self._seconds = 0.0
        self._lock = threading.Lock()

    def add(self, spans: Sequence[Span]) -> None:
        self._spans.extend(spans)
        if len(self._spans) > MOST_SPANS:
            self.seconds_so_far()

    def seconds_so_far(self) -> float:
        """Return how long those took that are over, without waiting for others."""
        with self._lock:
            while self._spans and self._spans[0][1].query():
                self._seconds += _seconds(*self._spans.popleft())
            return self._seconds


Uses = dict["torch.cuda.Stream", "torch.cuda.Event"]
"""For each stream an event behind its last use of what a block has now."""


class _DeviceBlock:
    """A block of a device, whose memory was allocated on the stream that copies."""

    def __init__(self, memory: Tensor, copying: "torch.cuda.Stream") -> None:
        self.memory, self.nbytes = memory, memory.nbytes
        self.uses: Uses = {}
        # The allocator gives the memory to nobody but this stream: at once, so that blocks of other sizes need no new
        # memory. It holds the memory until the stream has been told what to wait for.
        weakref.finalize(self, _wait_for_uses, copying, self.uses, memory).atexit = False

    def used(self) -> None:
        """Note that what the current stream has by now may read the block."""
        stream = torch.cuda.current_stream(self.memory.device)
        # One event for all threads that are on this stream: whoever records last stands behind the others.
        self.uses.setdefault(stream, torch.cuda.Event()).record(stream)


def _wait_for_uses(copying: "torch.cuda.Stream", uses: Uses, _: Tensor | None = None) -> None:
    """Make what a stream does from now on wait for what reads a block."""
    for use in uses.values():
        copying.wait_event(use)
    uses.clear()


class _DeviceExpert(LoadedExpert):
    """An expert that a stream copies; the current stream waits for it, and the block's next copy for that stream."""

    def __init__(self, block: _DeviceBlock, tensor: Tensor, copied: torch.cuda.Event) -> None:
        super().__init__(tensor)
        self._block, self._copied = block, copied

    def __enter__(self) -> Tensor:
        device = self._block.memory.device
        stream = torch.cuda.current_stream(device)
        if _noted.waits is None or self._copied.query():  # then there is no wait to be timed
            stream.wait_event(self._copied)
            return self.tensor
        started = _timed_event(device)
        stream.wait_event(self._copied)
        _noted.waits.append((started, _timed_event(device)))
        return self.tensor

    def __exit__(self, *_: object) -> None:
        self._block.used()  # at once: the host may evict the expert long before the device has come here


class _Staging:
    """Pinned memory for one expert of a file."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = PinnedMemory(num_bytes)
        self.copied: torch.cuda.Event | None = None
        """Behind the copy that read it last."""


class DeviceBlocks(ExpertBlocks):
    """Memory of a GPU, into which a stream of its own copies experts from pinned memory.

    The host only waits where it reads a file: until its staging memory was copied.
    """

    is_late = True
    num_workers = 1

    def __init__(self, device: torch.device, largest_bytes: int) -> None:
        self._device, self._largest_bytes = device, largest_bytes
        self._stream = torch.cuda.Stream(device)
        self._staged: queue.SimpleQueue[_Staging | None] = queue.SimpleQueue()
        """The one that was copied longest ago comes first; None where there is no memory yet."""
        for _ in range(NUM_STAGED):
            self._staged.put(None)

    def allocate(self, num_bytes: int) -> _DeviceBlock:
        # On the stream that copies: what had this memory before stands there, or is waited for there.
        with torch.cuda.stream(self._stream), torch.inference_mode(False):
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            return _DeviceBlock(memory, self._stream)

    def load(
        self, stored: StoredExpert, block: _DeviceBlock, free: Callable[[Block], object]
    ) -> tuple[LoadedExpert, float]:
        if isinstance(stored.source, PinnedMemory):
            return self._copy(stored, stored.source, stored.offset, block, free), 0.0
        staging = self._staged.get()
        try:
            try:
                with torch.cuda.stream(self._stream):  # a thread's first device is not this one
                    staging = staging or _Staging(self._largest_bytes)
                if staging.copied is not None:
                    staging.copied.synchronize()
                started = time.perf_counter()
                memory = (ctypes.c_char * stored.num_bytes).from_address(staging.memory.bytes.data_ptr())
                stored.source.read(memoryview(memory).cast("B"), stored.offset)
                read_s = time.perf_counter() - started
            except BaseException:
                free(block)
                raise
            expert = self._copy(stored, staging.memory, 0, block, free)
            staging.copied = expert._copied
            return expert, read_s
        finally:
            self._staged.put(staging)

    def _copy(
        self,
        stored: StoredExpert,
        pinned: PinnedMemory,
        first: int,
        block: _DeviceBlock,
        free: Callable[[Block], object],
    ) -> _DeviceExpert:
        copied = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream), torch.inference_mode(False):
            _wait_for_uses(self._stream, block.uses)
            pinned.copy(first, block.memory, self._stream)
            copied.record(self._stream)
            expert = _DeviceExpert(block, block.memory.view(stored.dtype).view(stored.shape), copied)
        weakref.finalize(expert, free, block).atexit = False
        return expert
