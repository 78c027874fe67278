"""Global memory: the views of tensors that a launch has, by address; programs have no order, and addresses are checked.

One program may not read or write what another wrote, nor write what another read.
"""

import bisect
import ctypes
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.faults import MemoryFault
from virtual_gpu.shared_memory import LARGEST_PIECE, Pieces

__all__ = ["GlobalMemory", "View"]

Words = NDArray[np.unsignedinteger]
"""Unsigned integers: the bits of a register in every thread, or a column of such."""
Flags = NDArray[np.bool_]
Numbers = NDArray[np.intp] | slice
"""Of pieces: an array, or neighbours."""


@dataclass(frozen=True)
class View:
    """What a kernel may touch of one argument: an address, and a shape and strides in elements."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element_bytes: int

    @property
    def num_bytes(self) -> int:
        """The bytes from the first to the end of the last element."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.element_bytes

    @property
    def is_dense(self) -> bool:
        """Whether no byte between the first and the last is another's."""
        return math.prod(self.shape) * self.element_bytes == self.num_bytes


class _Region:
    """Bytes side by side of which views are made, and what lies between them and the next multiples of 16 bytes."""

    def __init__(self, base: int, size: int, views: Sequence[View]):
        self.origin = base // LARGEST_PIECE * LARGEST_PIECE
        self.base, self.end = base, base + size
        length = -(-(self.end - self.origin) // LARGEST_PIECE) * LARGEST_PIECE
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.origin))
        self.writer = np.zeros(length, np.int32)
        """For each byte: the program that wrote it in this launch, from 1; 0 for none."""
        self.reader = np.zeros(length, np.int32)
        """The last program that read it; -1 once there are several."""
        self.writers: set[int] = set()
        self.readers: set[int] = set()
        self.of_view: Flags | None = None
        """Whether a byte belongs to a view; None where all do."""
        if not any(view.is_dense and view.base == base and view.num_bytes == size for view in views):
            self.of_view = np.zeros(length, np.bool_)
            for view in views:
                strides = (*(stride * view.element_bytes for stride in view.strides), 1)
                begin = self.of_view[view.base - self.origin :]
                np.lib.stride_tricks.as_strided(begin, (*view.shape, view.element_bytes), strides)[...] = True

    def check(self, owners: NDArray[np.int32], known: set[int], numbers: Numbers, unit: int, program: int) -> bool:
        """Return whether another program is among the `owners` of some pieces; `known` are all that own any."""
        if known <= {program}:
            return False
        found = owners.reshape(-1, unit)[numbers]
        return bool(((found != 0) & (found != program)).any())

    def mark_read(self, numbers: Numbers, unit: int, program: int) -> None:
        """Keep that a program reads pieces."""
        rows = self.reader.reshape(-1, unit)
        if self.readers <= {program}:
            rows[numbers] = program
        else:
            before = rows[numbers]
            rows[numbers] = np.where((before == 0) | (before == program), program, -1)
        self.readers.add(program)


class GlobalMemory:
    """The bytes of tensors, by address: those alone that are in a view of a tensor."""

    def __init__(self, views: Iterable[View]):
        """Open views of this process's memory, which may overlap."""
        self._regions: list[_Region] = []
        group: list[View] = []
        end = 0
        for view in sorted({view for view in views if view.num_bytes}, key=lambda view: view.base):
            if group and view.base >= end:
                self._regions.append(_Region(group[0].base, end - group[0].base, group))
                group = []
            group.append(view)
            end = max(end, view.base + view.num_bytes) if len(group) > 1 else view.base + view.num_bytes
        if group:
            self._regions.append(_Region(group[0].base, end - group[0].base, group))
        self._bases = [region.base for region in self._regions]

    def read(self, addresses: Words, size: int, program: int, aligned: int = 0) -> NDArray[np.uint8]:
        """Return (n, size) bytes at `addresses` (n,), which are multiples of `aligned`, or of `size` (0)."""
        out = np.empty((len(addresses), size), np.uint8)
        for region, chosen, numbers, unit in self._places(addresses, size, aligned or size):
            if region.check(region.writer, region.writers, numbers, unit, program):
                raise MemoryFault(f"program {program - 1} reads global memory that another program wrote")
            region.mark_read(numbers, unit, program)
            out[chosen] = region.data.reshape(-1, unit)[numbers].reshape(-1, size)
        return out

    def write(self, addresses: Words, values: NDArray[np.uint8], program: int, aligned: int = 0) -> None:
        """Write (n, size) bytes at `addresses` (n,); of equal addresses the last one counts."""
        size = values.shape[1]
        for region, chosen, numbers, unit in self._places(addresses, size, aligned or size):
            if region.check(region.writer, region.writers, numbers, unit, program):
                raise MemoryFault(f"program {program - 1} writes global memory that another program wrote")
            if region.check(region.reader, region.readers, numbers, unit, program):
                raise MemoryFault(f"program {program - 1} writes global memory that another program read")
            region.writer.reshape(-1, unit)[numbers] = program
            region.writers.add(program)
            found = region.data.reshape(-1, unit)[numbers]
            region.data.reshape(-1, unit)[numbers] = values[chosen].reshape(found.shape)

    def _places(
        self, addresses: Words, size: int, aligned: int
    ) -> Iterable[tuple[_Region, NDArray[np.intp] | slice, Numbers, int]]:
        """Return for each region touched: which of `addresses`, the numbers of their pieces, and the bytes of one."""
        if not len(addresses):
            return
        if aligned & (aligned - 1) == 0 and (addresses & np.uint64(aligned - 1)).any():
            raise MemoryFault(f"an access of {size} bytes to global memory is misaligned (by {aligned})")
        low, high = int(addresses.min()), int(addresses.max())
        first = bisect.bisect_right(self._bases, low) - 1
        if first >= 0 and high + size <= self._regions[first].end:
            yield self._pieces(self._regions[first], slice(None), addresses, size, aligned)
            return
        which = np.searchsorted(np.array(self._bases, np.uint64), addresses, "right") - 1
        for index in np.unique(which):
            chosen = np.nonzero(which == index)[0]
            region = self._regions[max(index, 0)]
            offsets = addresses[chosen].astype(np.int64) - region.base
            if index < 0 or (offsets + size > region.end - region.base).any():
                num_bytes = region.end - region.base
                raise MemoryFault(
                    f"{size} bytes at {int(offsets.max()):+d} of the {num_bytes} bytes of a global tensor"
                )
            yield self._pieces(region, chosen, addresses[chosen], size, aligned)

    @staticmethod
    def _pieces(
        region: _Region, chosen: NDArray[np.intp] | slice, addresses: Words, size: int, aligned: int
    ) -> tuple[_Region, NDArray[np.intp] | slice, Numbers, int]:
        pieces = Pieces.of(addresses.astype(np.int64) - region.origin, size, aligned)
        first = pieces.numbers
        numbers: Numbers = first
        if first.ndim == 1 and len(first) > 1 and (first[1:] - first[:-1] == 1).all():
            numbers = slice(int(first[0]), int(first[-1]) + 1)  # neighbours
        if region.of_view is not None and not region.of_view.reshape(-1, pieces.unit)[numbers].all():
            raise MemoryFault(f"{size} bytes between the elements of a view of a global tensor")
        return region, chosen, numbers, pieces.unit
