"""Memory on a CPU, where fresh pages cost more than the arithmetic on them: huge pages, memory used again, tables."""

import ctypes
import math
import sys
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from tritonmoe.runtime.host_device import is_captured

__all__ = ["empty", "recycled", "to_device"]

SMALLEST_RECYCLED_BYTES = 2**20
"""Smaller pieces come fast enough from the allocator."""
SMALLEST_FREED_BYTES = 2**24
"""Smaller pieces are used again so soon and so often that to mark them costs as much as to use them."""
LARGEST_WASTE = 1.25
"""A recycled block may have at most so many times the bytes that were asked for."""
HUGE_PAGE_BYTES = 2**21
_MADV_FREE = 8
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's madvise where it knows huge pages, else None."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _advise(block: Tensor, advice: int) -> None:
    """Advise the system on the whole huge pages of a block, where it has any."""
    madvise = _madvise()
    first = -(-block.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    last = (block.data_ptr() + block.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if madvise is not None and first < last:
        madvise(first, last - first, advice)


class _Recycled:
    """Blocks of memory that outlive the tensors in them: the next tensor of about that size gets one that is mapped.

    A block that nobody uses stays mapped; of a large one the system may take the pages where
    memory is short (MADV_FREE).
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.returned: deque[Tensor] = deque()
        """The blocks that came back since take() last looked. Finalizers add them, which may run anywhere: no lock."""
        self.unused: list[Tensor] = []
        """The blocks in which no tensor lies, from the smallest to the largest."""

    def take(self, num_bytes: int) -> Tensor:
        """Return a block of num_bytes or somewhat more, uninitialised."""
        with self.lock:
            while self.returned:
                insort(self.unused, self.returned.popleft(), key=_num_bytes)
            place = bisect_left(self.unused, num_bytes, key=_num_bytes)
            if place < len(self.unused) and self.unused[place].nbytes <= LARGEST_WASTE * num_bytes:
                return self.unused.pop(place)
            if place > 0:
                del self.unused[place - 1]  # outgrown: so there are never more blocks than were in use at once
        block = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        # Most Linux systems give huge pages only to who asks (transparent_hugepage = madvise): 33 MB of fresh memory
        # then cost 16 page faults instead of 8,000. It is advice: where the system has none, nothing changes.
        _advise(block, _MADV_HUGEPAGE)
        return block

    def give_back(self, block: Tensor) -> None:
        if block.nbytes >= SMALLEST_FREED_BYTES:
            _advise(block, _MADV_FREE)
        self.returned.append(block)

    def clear(self) -> None:
        """Return the memory that nobody uses back to the system."""
        with self.lock:
            self.returned.clear()
            self.unused.clear()


def _num_bytes(block: Tensor) -> int:
    return block.nbytes


recycled = _Recycled()


def empty(*shape: int, like: Tensor) -> Tensor:
    """Return uninitialised memory of `shape` with the dtype and device of `like`; large CPU memory is recycled.

    It goes back when the last tensor in it is gone, wherever that was: gradients of weights, too, when an optimizer
    sets them to None.
    """
    num_bytes = math.prod(shape) * like.itemsize
    if like.device.type != "cpu" or num_bytes < SMALLEST_RECYCLED_BYTES:
        return like.new_empty(*shape)
    block = recycled.take(num_bytes)
    memory = (ctypes.c_char * num_bytes).from_address(block.data_ptr())
    weakref.finalize(memory, recycled.give_back, block).atexit = False
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


_read_by_replays: list[Tensor] = []


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to a device without waiting for what is enqueued there: from pinned memory.

    While a CUDA graph is captured that memory is kept for good, since every replay copies it again.
    """
    if device.type != "cuda":
        return table.to(device)
    pinned = table.pin_memory()
    if is_captured(device):
        _read_by_replays.append(pinned)
    return pinned.to(device, non_blocking=True)
