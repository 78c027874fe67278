"""What a TMA descriptor says of a tensor, and how one box of it is read and written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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

    def places(self, address: int, num_boxes: int = 1) -> Pieces:
        """Return the pieces of shared memory in which boxes, one behind the other, lie at `address`."""
        num_bytes = num_boxes * math.prod(self.box) * self.element_bytes
        if address % 128:
            raise MemoryFault(f"TMA needs a multiple of 128 bytes in shared memory, not {address}")
        if num_bytes % 16:
            raise NotImplementedError(f"a box {self.box} of no multiple of 16 bytes")
        return Pieces(swizzled(address + np.arange(0, num_bytes, 16), self.swizzle_bytes) // 16, 16)

    def read(
        self, memory: GlobalMemory, program: int, coordinates: Sequence[int], gathers: bool = False
    ) -> NDArray[np.uint8]:
        """Return the bytes of a box; zeros outside the tensor.

        coordinates: of its first element, the innermost axis first; with `gathers` its column and four rows.
        """
        rows = self._rows(coordinates, gathers)
        values = np.zeros((len(rows.inside), self.box[-1] * self.element_bytes), np.uint8)
        if rows.num_bytes:
            found = memory.read(rows.addresses, rows.num_bytes, program, rows.aligned)
            values[rows.inside, rows.first_byte : rows.first_byte + rows.num_bytes] = found
        return values.reshape(-1)

    def write(self, memory: GlobalMemory, program: int, coordinates: Sequence[int], values: NDArray[np.uint8]) -> None:
        """Write the bytes of a box where it is inside the tensor."""
        rows = self._rows(coordinates, gathers=False)
        if rows.num_bytes:
            chosen = values.reshape(len(rows.inside), -1)[rows.inside]
            chosen = chosen[:, rows.first_byte : rows.first_byte + rows.num_bytes]
            memory.write(rows.addresses, chosen, program, rows.aligned)

    def _rows(self, coordinates: Sequence[int], gathers: bool) -> "_BoxRows":
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
        num_bytes = max(end - begin, 0) * size
        addresses = (self.base + (first_of_rows[flat] + begin) * size).astype(np.uint64)
        aligned = math.gcd(begin * size, num_bytes, 16)
        return _BoxRows(flat, addresses, (begin - coordinates[0]) * size, num_bytes, aligned)


class _BoxRows(NamedTuple):
    """The rows of a box, and what of them is inside the tensor."""

    inside: NDArray[np.bool_]
    addresses: NDArray[np.uint64]
    """Of the first byte inside of every row inside."""
    first_byte: int
    """The first byte inside of a row in shared memory."""
    num_bytes: int
    """The bytes inside of a row."""
    aligned: int
