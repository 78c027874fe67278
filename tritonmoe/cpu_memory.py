"""Memory on a CPU, where fresh pages cost more than the arithmetic on them: huge pages, buffers used again, tables."""

import ctypes
import sys
import threading
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["empty", "scratch", "to_device"]

SMALLEST_ADVISED_BYTES = 2**22
"""Smaller pieces mostly come from memory that the process already has."""
SMALLEST_SCRATCH_BYTES = 2**20
"""Smaller pieces come fast enough from the allocator."""
_PAGE_BYTES = 4096
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Any:
    """Give the C library's madvise where it knows huge pages, else None."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty(*shape: int, like: Tensor) -> Tensor:
    """Give uninitialised memory of `shape` with the dtype and device of `like`; large CPU memory in huge pages.

    Most Linux systems give huge pages only to who asks (transparent_hugepage = madvise): 33 MB of fresh memory then
    cost 16 page faults instead of 8,000. It is advice: where the system has none, nothing changes.
    """
    tensor = like.new_empty(*shape)
    num_bytes = tensor.numel() * tensor.itemsize
    if tensor.device.type != "cpu" or num_bytes < SMALLEST_ADVISED_BYTES:
        return tensor
    madvise = _madvise()
    if madvise is not None:
        first = -(-tensor.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
        last = (tensor.data_ptr() + num_bytes) // _PAGE_BYTES * _PAGE_BYTES
        madvise(first, last - first, _MADV_HUGEPAGE)
    return tensor


_read_by_replays: list[Tensor] = []


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to a device without waiting for what is enqueued there: from pinned memory.

    While a CUDA graph is captured that memory is kept for good, since every replay copies it again.
    """
    if device.type != "cuda":
        return table.to(device)
    pinned = table.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _read_by_replays.append(pinned)
    return pinned.to(device, non_blocking=True)


class _Scratch(threading.local):
    """Memory for what does not outlive one pass; a buffer goes back to its thread's pool when its owner goes.

    So nested runs never share one.
    """

    def __init__(self) -> None:
        self.free: dict[str, list[Tensor]] = {}

    def take(self, owner: object, name: str, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Give (num_rows, width) uninitialised, owned until `owner` is collected; `name` keeps like sizes together."""
        num_bytes = num_rows * width * dtype.itemsize
        if num_bytes < SMALLEST_SCRATCH_BYTES:
            return torch.empty(num_rows, width, dtype=dtype)
        pool = self.free.setdefault(name, [])
        buffer = pool.pop() if pool else torch.empty(0, dtype=torch.uint8)
        if buffer.shape[0] < num_bytes:
            buffer = empty(num_bytes, like=buffer)
        weakref.finalize(owner, pool.append, buffer).atexit = False
        return buffer[:num_bytes].view(dtype).view(num_rows, width)


scratch = _Scratch()
