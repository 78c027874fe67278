"""What a TMA descriptor says of a tensor, and the copy of one box of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.faults import MemoryFault
from virtual_gpu.memory import GlobalMemory
from virtual_gpu.nvidia.fragments import swizzled

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
        if any(not 1 <= width <= 256 for width in self.box):
            raise MemoryFault(f"TMA's boxes have 1 to 256 elements an axis, not {self.box}")
        if self.swizzle_bytes and self.box[-1] * self.element_bytes > self.swizzle_bytes:
            raise MemoryFault(f"a box {self.box} is wider than its swizzle of {self.swizzle_bytes} bytes")

    def read(
        self, memory: GlobalMemory, program: int, target: int, coordinates: Sequence[int], gathers: bool
    ) -> tuple[NDArray[np.intp], NDArray[np.uint8]]:
        """Give the places in shared memory that a box is copied to, and its bytes; zeros outside the tensor.

        Args:
            target: address of the box in shared memory.
            coordinates: of its first element, the innermost axis first; with `gathers` its column and four rows.
        """
        if target % 128:
            raise MemoryFault(f"TMA needs a multiple of 128 bytes in shared memory, not {target}")
        if gathers:
            axes = [np.array(coordinates[1:]), coordinates[0] + np.arange(self.box[-1])]
        else:
            axes = [start + np.arange(width) for start, width in zip(reversed(coordinates), self.box, strict=True)]
        grid = np.meshgrid(*axes, indexing="ij")
        inside = np.logical_and.reduce([(at >= 0) & (at < n) for at, n in zip(grid, self.shape, strict=True)])
        elements = sum(at * stride for at, stride in zip(grid, self.strides, strict=True))
        size = self.element_bytes
        values = np.zeros((inside.size, size), np.uint8)
        addresses = (self.base + np.asarray(elements).reshape(-1) * size).astype(np.uint64)
        flat = inside.reshape(-1)
        values[flat] = memory.read(addresses[flat], size, program)
        places = swizzled(target + np.arange(values.size), self.swizzle_bytes)
        return places, values.reshape(-1)
