"""What a TMA descriptor says of a tensor, and the copy of one box of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.faults import MemoryFault
from virtual_gpu.memory import GlobalMemory
from virtual_gpu.nvidia.fragments import swizzled
from virtual_gpu.shared_memory import Pieces

__all__ = ["TensorMap"]


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory, the box that one instruction copies, and how the box lies in shared memory."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements; the last is 1."""
    box: tuple[int, ...]
    element_bytes: int
    swizzle_bytes: int

    def __post_init__(self) -> None:
        if self.base % 16:
            raise MemoryFault(f"TMA needs a base that is a multiple of 16 bytes, not {self.base:#x}")
        if self.strides[-1] != 1 or any(stride * self.element_bytes % 16 for stride in self.strides[:-1]):
            raise MemoryFault(f"TMA needs strides of multiples of 16 bytes, not {self.strides} elements")
        if any(stride * self.element_bytes >= 2**40 for stride in self.strides):
            raise MemoryFault(f"TMA needs strides below 2^40 bytes, not {self.strides} elements")
        if len(self.shape) > 5 or max(self.shape) > 2**32:
            raise MemoryFault(f"TMA has at most five axes of up to 2^32 elements, not {self.shape}")
        if any(not 1 <= width <= 256 for width in self.box):
            raise MemoryFault(f"TMA's boxes have 1 to 256 elements an axis, not {self.box}")
        if self.swizzle_bytes and self.box[-1] * self.element_bytes > self.swizzle_bytes:
            raise MemoryFault(f"a box {self.box} is wider than its swizzle of {self.swizzle_bytes} bytes")

    def read(
        self, memory: GlobalMemory, program: int, target: int, coordinates: Sequence[int], gathers: bool
    ) -> tuple[Pieces, NDArray[np.uint8]]:
        """Return the pieces of shared memory that a box is copied to, and their bytes; zeros outside the tensor.

        Args:
            target: address of the box in shared memory.
            coordinates: of its first element, the innermost axis first; with `gathers` its column and four rows.
        """
        if target % 128:
            raise MemoryFault(f"TMA needs a multiple of 128 bytes in shared memory, not {target}")
        if gathers:
            axes = [np.array(coordinates[1:])]
        else:
            axes = [start + np.arange(n) for start, n in zip(coordinates[:0:-1], self.box[:-1], strict=True)]
        outer = np.meshgrid(*axes, indexing="ij")
        inside = np.logical_and.reduce([(at >= 0) & (at < n) for at, n in zip(outer, self.shape, strict=False)])
        rows = sum(at * stride for at, stride in zip(outer, self.strides, strict=False))
        flat, first_of_rows = np.ravel(inside), np.ravel(rows)
        size, width = self.element_bytes, self.box[-1]
        begin, end = max(coordinates[0], 0), min(coordinates[0] + width, self.shape[-1])
        values = np.zeros((len(flat), width * size), np.uint8)
        if end > begin:
            aligned = math.gcd(begin * size, (end - begin) * size, 16)
            addresses = (self.base + (first_of_rows[flat] + begin) * size).astype(np.uint64)
            found = memory.read(addresses, (end - begin) * size, program, aligned)
            values[flat, (begin - coordinates[0]) * size : (end - coordinates[0]) * size] = found
        if values.size % 16:
            raise NotImplementedError(f"a box {self.box} of no multiple of 16 bytes")
        places = swizzled(target + np.arange(0, values.size, 16), self.swizzle_bytes)
        return Pieces(places // 16, 16), values.reshape(-1)
