"""PinnedMemory: host memory of which a GPU copies experts while the host goes on; pin_weights() fills it."""

import ctypes
import mmap
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["PinnedMemory", "pin_weights"]

ALIGNMENT = 64
"""Bytes; each weight begins at a multiple of so many."""

MEMINFO = Path("/proc/meminfo")


class PinnedMemory:
    """Host memory that copies to a GPU read while the host goes on.

    A range of its own, of the size that is wanted and registered with the driver: PyTorch's pinned memory may take
    twice as much. A fork of the process does without it, instead of copying it.
    """

    def __init__(self, num_bytes: int) -> None:
        """Raise MemoryError where there is no such memory."""
        free = _free_bytes()
        if free is not None and num_bytes > free:
            # Linux gives more than it has, and would end this or another process once the pages are written.
            raise MemoryError(
                f"{num_bytes} bytes of experts can't be pinned in host memory, of which {free} bytes are free: free "
                "host memory, call quantize_experts first, or offload_experts() to a folder"
            )
        try:
            mapped = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"there is no host memory for {num_bytes} bytes of experts: {error}") from error
        if hasattr(mmap, "MADV_DONTFORK"):
            mapped.madvise(mmap.MADV_DONTFORK)
        memory = (ctypes.c_char * num_bytes).from_buffer(mapped)
        address = ctypes.addressof(memory)
        cudart = torch.cuda.cudart()
        failure = int(cudart.cudaHostRegister(address, num_bytes, 1))  # 1: for the contexts of all GPUs
        if failure:
            raise MemoryError(
                f"{num_bytes} bytes of host memory could not be pinned (cudaHostRegister: error {failure}): free "
                "host memory, or offload_experts() to a folder"
            )
        self._streams: set[torch.cuda.Stream] = set()
        # `mapped` stays until the copies have ended and the driver has let go of it.
        weakref.finalize(memory, _let_go, cudart, mapped, address, self._streams, os.getpid()).atexit = False
        with torch.inference_mode(False):
            self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
            """(num_bytes,)"""

    def copy(self, first: int, out: Tensor, stream: "torch.cuda.Stream") -> None:
        """Enqueue a copy of the bytes from `first` on to `out`, on a GPU, whose current stream is given."""
        self._streams.add(stream)
        out.copy_(self.bytes[first : first + out.numel()], non_blocking=True)


def _free_bytes() -> int | None:
    """Return the bytes that Linux would give without swapping, or None on a system that doesn't say."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _let_go(cudart: Any, _: mmap.mmap, address: int, streams: "set[torch.cuda.Stream]", process: int) -> None:
    if process == os.getpid():  # a fork has neither this memory nor the GPU
        for stream in streams:
            stream.synchronize()
        cudart.cudaHostUnregister(address)


def pin_weights(weights: Mapping[str, Tensor]) -> tuple[PinnedMemory, dict[str, int]]:
    """Copy tensors into one piece of pinned memory, one expert at a time; return it, and where each of them begins.

    Raises:
        MemoryError: there is no such memory.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, weight in weights.items():
        offsets[name] = end
        end += -(-weight.numel() * weight.itemsize // ALIGNMENT) * ALIGNMENT
    pinned = PinnedMemory(end)
    for name, weight in weights.items():
        target = pinned.bytes[offsets[name] :][: weight.numel() * weight.itemsize].view(weight.dtype)
        for expert, out in zip(weight.detach(), target.view(weight.shape), strict=True):
            out.copy_(expert)
    return pinned, offsets
