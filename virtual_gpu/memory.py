"""The memories of the machine: addresses are checked, uninitialised bytes are NaN, and conflicting accesses raise.

Global memory is that of the arguments' tensors. Two programs of one launch have no order: one may not read or write
what another wrote. Shared memory is a program's own; its warps have no order but by barriers. A byte that an
asynchronous copy is on its way to may not be touched, nor may one that a matrix instruction still reads be written.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.faults import MemoryFault

__all__ = ["GlobalMemory", "SharedMemory"]

Words = NDArray[np.unsignedinteger]
"""Unsigned integers: the bits of a register in every thread, or a column of such."""
Flags = NDArray[np.bool_]

SEVERAL = 63
"""Stands for more than one warp where a byte's last reader is kept."""
ATOMIC = 62
"""Stands for any warps where a byte's last writer is kept: their atomic operations have no order, and need none."""


@dataclass
class _Region:
    base: int
    data: NDArray[np.uint8]
    writer: NDArray[np.int32]
    """For each byte: the program that wrote it in this launch, from 1; 0 for none."""
    reader: NDArray[np.int32]
    """The last program that read it; -1 once there are several."""


class GlobalMemory:
    """The bytes of tensors, by address."""

    def __init__(self, spans: Iterable[tuple[int, int]]):
        """Open `spans` of this process's memory: (address, number of bytes) each; the same span may come twice."""
        self._regions = []
        for base, size in sorted(set(spans)):
            if size:
                data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
                self._regions.append(_Region(base, data, np.zeros(size, np.int32), np.zeros(size, np.int32)))
        self._bases = np.array([region.base for region in self._regions], np.uint64)

    def read(self, addresses: Words, size: int, program: int, aligned: int = 0) -> NDArray[np.uint8]:
        """Give (n, size) bytes at `addresses` (n,), which are multiples of `aligned`, or of `size` (0)."""
        out = np.empty((len(addresses), size), np.uint8)
        for region, chosen, offsets in self._places(addresses, size, aligned or size):
            writers = region.writer[offsets]
            if ((writers != 0) & (writers != program)).any():
                raise MemoryFault(f"program {program - 1} reads global memory that program {writers.max() - 1} wrote")
            readers = region.reader[offsets]
            region.reader[offsets] = np.where((readers == 0) | (readers == program), program, -1)
            out[chosen] = region.data[offsets]
        return out

    def write(self, addresses: Words, values: NDArray[np.uint8], program: int, aligned: int = 0) -> None:
        """Write (n, size) bytes at `addresses` (n,); of equal addresses the last one counts."""
        for region, chosen, offsets in self._places(addresses, values.shape[1], aligned or values.shape[1]):
            for owners, did in ((region.writer, "wrote"), (region.reader, "read")):
                others = owners[offsets]
                if ((others != 0) & (others != program)).any():
                    raise MemoryFault(f"program {program - 1} writes global memory that another program {did}")
            region.writer[offsets] = program
            region.data[offsets] = values[chosen]

    def _places(
        self, addresses: Words, size: int, aligned: int
    ) -> Iterable[tuple[_Region, NDArray[np.intp], NDArray[np.intp]]]:
        """Give for each region touched: which of `addresses`, and the (n, size) places of their bytes."""
        if not len(addresses):
            return
        if aligned & (aligned - 1) == 0 and (addresses % np.uint64(aligned)).any():
            raise MemoryFault(f"an access of {size} bytes to global memory is misaligned (by {aligned})")
        which = np.searchsorted(self._bases, addresses, "right") - 1
        for index in np.unique(which):
            chosen = np.nonzero(which == index)[0]
            region = self._regions[max(index, 0)]
            offsets = addresses[chosen].astype(np.int64) - region.base
            if index < 0 or (offsets + size > len(region.data)).any():
                raise MemoryFault(
                    f"{size} bytes at {int(offsets.max()):+d} of the {len(region.data)} bytes of a global tensor"
                )
            yield region, chosen, offsets[:, None] + np.arange(size)


class SharedMemory:
    """A program's shared memory, with the order between its warps."""

    def __init__(self, size: int, checks_fences: bool = True):
        self.checks_fences = checks_fences
        self.data = np.full(size, 0xFF, np.uint8)  # NaN in every floating-point type
        self.epoch = 1
        """Barriers passed so far."""
        self._written = np.zeros(size, np.int32)
        """For each byte: epoch * 64 + the warp that wrote it last."""
        self._read = np.zeros(size, np.int32)
        self._in_flight = np.zeros(size, bool)
        """Whether an asynchronous copy will write the byte."""
        self._busy = np.zeros(size, np.int16)
        """Matrix instructions that still read the byte."""
        self._unfenced = np.zeros(size, bool)
        """Whether the byte was written as threads write, with no fence to the asynchronous proxy since."""

    def barrier(self) -> None:
        """Order all accesses of all warps before those after."""
        self.epoch += 1

    def leave_unordered(self, places: NDArray[np.intp], warps: NDArray[np.intp], writes: bool) -> None:
        """Take the last barrier back for accesses (n, bytes) of warps (n,) that may still be under way."""
        if writes:
            self._written[places] = self.epoch * 64 + warps[:, None]
        else:
            self._mark_read(places, warps[:, None])

    def fence(self) -> None:
        """Let matrix instructions and bulk copies see what threads wrote."""
        self._unfenced[:] = False

    def read(self, addresses: Words, size: int, warps: NDArray[np.intp], aligned: int = 0) -> NDArray[np.uint8]:
        """Give (n, size) bytes at `addresses` (n,), read by the warps (n,)."""
        places = self._places(addresses, size, aligned or size)
        self._check_read(places, warps[:, None])
        self._mark_read(places, warps[:, None])
        return self.data[places]

    def write(self, addresses: Words, values: NDArray[np.uint8], warps: NDArray[np.intp], aligned: int = 0) -> None:
        """Write (n, size) bytes at `addresses` (n,)."""
        places = self._places(addresses, values.shape[1], aligned or values.shape[1])
        self._check_write(places, warps[:, None], values)
        self._written[places] = self.epoch * 64 + warps[:, None]
        self._unfenced[places] = True
        self.data[places] = values

    def begin_atomic(self, addresses: Words, warps: NDArray[np.intp]) -> NDArray[np.intp]:
        """Give which words of 4 bytes (n,) are updated atomically: in any order, but not beside other accesses."""
        places = self._places(addresses, 4, 4)
        written, read, own = self._written[places], self._read[places], warps[:, None]
        conflicts = (written >> 6 == self.epoch) & (written & 63 != own) & (written & 63 != ATOMIC)
        conflicts |= (read >> 6 == self.epoch) & (read & 63 != own)
        if conflicts.any() or self._in_flight[places].any():
            raise MemoryFault("an atomic operation on shared memory that another warp touched, with no barrier between")
        self._written[places] = self.epoch * 64 + ATOMIC
        return places[:, 0] // 4

    def begin_copy(self, places: NDArray[np.intp], warps: NDArray[np.intp]) -> None:
        """Let an asynchronous copy that a thread of `warps` started own the bytes at `places` until it lands."""
        self._check_write(places, warps)
        self._in_flight[places] = True
        self.data[places] = 0xFF

    def land_copy(self, places: NDArray[np.intp], values: NDArray[np.uint8], warps: NDArray[np.intp] | None) -> None:
        """End a copy: for the warp that started it (None: for every warp) the bytes are there."""
        self._in_flight[places] = False
        self._written[places] = 0 if warps is None else self.epoch * 64 + warps
        self._unfenced[places] = warps is not None  # bulk copies are of the asynchronous proxy themselves
        self.data[places] = values

    def begin_matrix_read(self, places: NDArray[np.intp]) -> None:
        """Let a matrix instruction read the bytes at `places`, all different, until `end_matrix_read`."""
        self._inside(places)
        if self._in_flight[places].any():
            raise MemoryFault("a matrix instruction reads shared memory that an asynchronous copy still writes")
        if (self._written[places] >> 6 == self.epoch).any():
            raise MemoryFault("a matrix instruction reads shared memory written since the last barrier")
        if self.checks_fences and self._unfenced[places].any():
            raise MemoryFault("a matrix instruction reads shared memory written without a proxy fence since")
        self._busy[places] += 1

    def end_matrix_read(self, places: NDArray[np.intp]) -> NDArray[np.uint8]:
        """Give the bytes that the instruction read."""
        self._busy[places] -= 1
        return self.data[places]

    def _mark_read(self, places: NDArray[np.intp], warps: NDArray[np.intp]) -> None:
        before = self._read[places]
        tag = self.epoch * 64 + warps
        other = (before >> 6 == self.epoch) & (before != tag)
        self._read[places] = np.where(other, self.epoch * 64 + SEVERAL, tag)
        # Threads of one access that read the same byte: the tag left is one of theirs.
        mixed = self._read[places] != np.where(other, self.epoch * 64 + SEVERAL, tag)
        if mixed.any():
            self._read[places[mixed]] = self.epoch * 64 + SEVERAL

    def _places(self, addresses: Words, size: int, aligned: int) -> NDArray[np.intp]:
        start = addresses.astype(np.int64)
        if (start % aligned).any():
            raise MemoryFault(f"an access of {size} bytes to shared memory is not aligned to {aligned}")
        places = start[:, None] + np.arange(size)
        self._inside(places)
        return places

    def _inside(self, places: NDArray[np.intp]) -> None:
        if places.size and (places.min() < 0 or places.max() >= len(self.data)):
            raise MemoryFault(f"byte {places.max()} of {len(self.data)} bytes of shared memory")

    def _check_read(self, places: NDArray[np.intp], warps: NDArray[np.intp]) -> None:
        if self._in_flight[places].any():
            raise MemoryFault("a thread reads shared memory that an asynchronous copy still writes")
        written = self._written[places]
        if ((written >> 6 == self.epoch) & (written & 63 != warps)).any():
            raise MemoryFault("a warp reads shared memory that another wrote, with no barrier between")

    def _check_write(
        self, places: NDArray[np.intp], warps: NDArray[np.intp], values: NDArray[np.uint8] | None = None
    ) -> None:
        """Raise where a write conflicts; warps that hold the same values may both write them."""
        self._inside(places)
        if self._in_flight[places].any():
            raise MemoryFault("shared memory is written that an asynchronous copy still writes")
        if self._busy[places].any():
            raise MemoryFault("shared memory is written that a matrix instruction still reads")
        for tags, did in ((self._written[places], "wrote"), (self._read[places], "read")):
            conflicts = (tags >> 6 == self.epoch) & (tags & 63 != warps)
            if did == "wrote" and values is not None:
                conflicts &= self.data[places] != values
            if conflicts.any():
                raise MemoryFault(f"a warp writes shared memory that another {did}, with no barrier between")
