"""WeightFile: a file of safetensors from which experts are read one at a time; write_weights() writes it."""

import ctypes
import json
import os
import struct
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["WeightFile", "write_weights"]

ALIGNMENT = 64
"""Bytes; of what a file has before its weights."""
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""As files of safetensors call them."""


class WeightFile:
    """A file that is open for reading, and must stay as it is."""

    def __init__(self, path: Path, part: Path | None = None) -> None:
        """part: where the file is until it is renamed to `path`."""
        self.path = path
        self._descriptor = os.open(path if part is None else part, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = self._found()

    def _found(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill the memory with what the file has from `offset` on.

        Raises:
            OSError: it can't be read. ValueError: it is not what it was when it was opened.
        """
        done = 0
        while done < len(memory):
            count = os.preadv(self._descriptor, [memory[done:]], offset + done)
            if count == 0:
                break
            done += count
        if (found := self._found()) != self._state or done < len(memory):
            size, changed_at = self._state
            what = f"it has {found[0]} bytes instead of {size}" if found[0] != size else "it was written to"
            raise ValueError(f"the file has changed since it was opened: {what} (then {changed_at}, now {found[1]} ns)")


def write_weights(path: Path, weights: dict[str, Tensor]) -> tuple[WeightFile, dict[str, int]]:
    """Write tensors as a file of safetensors, one expert at a time, beside its place first; return it, and offsets.

    It is opened before it has its name, which another process may give to a file of its own at the same time.

    Raises:
        OSError: it could not be written; then nothing is left of it.
    """
    header: dict[str, object] = {}
    offsets: dict[str, int] = {}
    end = 0
    for name, weight in weights.items():
        offsets[name] = end
        end += weight.numel() * weight.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offsets[name], end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for weight in weights.values():
                for expert in weight.detach():
                    whole = expert.cpu().contiguous()
                    file.write((ctypes.c_char * whole.nbytes).from_address(whole.data_ptr()))
            file.flush()
            os.fsync(file.fileno())
        written = WeightFile(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return written, {name: 8 + len(encoded) + offset for name, offset in offsets.items()}
