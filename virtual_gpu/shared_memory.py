"""A program's shared memory: bytes that nobody wrote are NaN, and accesses that have no order raise.

Its warps have no order but by barriers. A byte that an asynchronous copy is on its way to may not be touched, nor may
one that a matrix instruction still reads be written.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.faults import MemoryFault

__all__ = ["LARGEST_PIECE", "SEVERAL", "Pieces", "SharedMemory"]

SEVERAL = 63
"""Stands for more than one warp where a byte's last reader is kept, or who waited for an instruction."""
ATOMIC = 62
"""Stands for any warps where a byte's last writer is kept: their atomic operations have no order, and need none."""
UNTOUCHED, READ, WRITTEN, ALLOCATED = range(4)
"""What was done to a byte since a proxy fence; each hides those before it. ALLOCATED: tcgen05.alloc wrote there."""
LARGEST_PIECE = 16


@dataclass(frozen=True)
class Pieces:
    """Places in memory: numbers of pieces of `unit` bytes, which is a power of two up to 16."""

    numbers: NDArray[np.intp]
    unit: int

    @classmethod
    def of(cls, addresses: NDArray[Any], size: int, aligned: int) -> "Pieces":
        """Return `size` bytes at each of `addresses` (n,), which are multiples of `aligned`."""
        unit = min(aligned, LARGEST_PIECE)
        if unit & (unit - 1) or size % unit:
            raise NotImplementedError(f"an access of {size} bytes aligned to {aligned}")
        start = np.asarray(addresses).astype(np.int64)
        if (start & (aligned - 1)).any():
            raise MemoryFault(f"an access of {size} bytes is misaligned (by {aligned})")
        first = start // unit
        return cls(first if size == unit else first[:, None] + np.arange(size // unit), unit)

    def __getitem__(self, chosen: NDArray[np.bool_]) -> "Pieces":
        """Return those of some threads."""
        return Pieces(self.numbers[chosen], self.unit)

    def beside(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return an array (n,) the axes of the bytes of these pieces."""
        return values.reshape(-1, *(1,) * self.numbers.ndim) if values.ndim else values


class SharedMemory:
    """A program's shared memory, with the order between its warps."""

    def __init__(self, size: int, checks_fences: bool = True):
        self.checks_fences, self.size = checks_fences, size
        length = -(-size // LARGEST_PIECE) * LARGEST_PIECE
        self.data = np.full(length, 0xFF, np.uint8)  # NaN in every floating-point type
        self.epoch = 1
        """Barriers passed so far."""
        self._written = np.zeros(length, np.int32)
        """For each byte: epoch * 64 + the warp that wrote it last."""
        self._read = np.zeros(length, np.int32)
        self._in_flight = np.zeros(length, bool)
        """Whether an asynchronous copy will write the byte."""
        self._busy = np.zeros(length, np.int16)
        """Matrix instructions and bulk stores that still read the byte."""
        self._since_fence = np.full(length, UNTOUCHED, np.uint8)
        """What threads did with the byte since the last fence to the asynchronous proxy."""
        self._num_copies = self._num_products = 0
        """How many are under way."""

    def barrier(self) -> None:
        """Order all accesses of all warps before those after."""
        self.epoch += 1

    def leave_unordered(self, pieces: Pieces, warps: NDArray[np.intp], writes: bool) -> None:
        """Take the last barrier back for accesses of warps (n,) that may still be under way."""
        if writes:
            _rows(self._written, pieces)[pieces.numbers] = self.epoch * 64 + pieces.beside(warps)
        else:
            self._mark_read(pieces, warps)

    def fence(self) -> None:
        """Order what threads did before what matrix instructions and bulk copies do from now on."""
        self._since_fence[:] = UNTOUCHED

    def read(self, addresses: NDArray[Any], size: int, warps: NDArray[np.intp], aligned: int = 0) -> NDArray[np.uint8]:
        """Return (n, size) bytes at `addresses` (n,), multiples of `aligned` or `size` (0), read by the warps (n,)."""
        pieces = self._pieces(addresses, size, aligned)
        self._check_no_copy(pieces, "a thread reads shared memory that an asynchronous copy still writes")
        written, now = _rows(self._written, pieces)[pieces.numbers], self.epoch * 64
        if ((written >= now) & (written != now + pieces.beside(warps))).any():
            raise MemoryFault("a warp reads shared memory that another wrote, with no barrier between")
        self._mark_read(pieces, warps)
        return _rows(self.data, pieces)[pieces.numbers].reshape(len(addresses), size)

    def write(
        self,
        addresses: NDArray[Any],
        values: NDArray[np.uint8],
        warps: NDArray[np.intp],
        aligned: int = 0,
        needs_fence: bool = True,
    ) -> None:
        """Write (n, size) bytes at `addresses` (n,); needs_fence: before the asynchronous proxy may touch them."""
        pieces = self._pieces(addresses, values.shape[1], aligned)
        values = np.ascontiguousarray(values).reshape(*pieces.numbers.shape, pieces.unit)
        self._check_write(pieces, warps, values)
        _rows(self._written, pieces)[pieces.numbers] = self.epoch * 64 + pieces.beside(warps)
        _rows(self._since_fence, pieces)[pieces.numbers] = WRITTEN if needs_fence else ALLOCATED
        _rows(self.data, pieces)[pieces.numbers] = values

    def begin_atomic(self, addresses: NDArray[Any], warps: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return which words of 4 bytes (n,) are updated atomically: in any order, but not beside other accesses."""
        pieces = self._pieces(addresses, 4, 4)
        written, read = (_rows(tags, pieces)[pieces.numbers] for tags in (self._written, self._read))
        own = pieces.beside(warps)
        conflicts = (written >> 6 == self.epoch) & (written & 63 != own) & (written & 63 != ATOMIC)
        conflicts |= (read >> 6 == self.epoch) & (read & 63 != own)
        message = "an atomic operation on shared memory that another warp touched, with no barrier between"
        self._check_no_copy(pieces, message)
        if conflicts.any():
            raise MemoryFault(message)
        _rows(self._written, pieces)[pieces.numbers] = self.epoch * 64 + ATOMIC
        return pieces.numbers

    def begin_bulk_copy(self, pieces: Pieces, warp: NDArray[np.intp]) -> None:
        """Make a copy of the asynchronous proxy, started by a thread of a warp, own these pieces until it lands."""
        self._inside(pieces)
        for did, what in ((WRITTEN, "wrote"), (READ, "read")):
            if self.checks_fences and (_rows(self._since_fence, pieces)[pieces.numbers] == did).any():
                raise MemoryFault(f"a bulk copy writes shared memory that threads {what} without a proxy fence since")
        self.begin_copy(pieces, warp)

    def begin_copy(self, pieces: Pieces, warps: NDArray[np.intp]) -> None:
        """Make an asynchronous copy, started by threads of `warps`, own these pieces until it lands."""
        self._inside(pieces)
        self._check_write(pieces, warps)
        _rows(self._in_flight, pieces)[pieces.numbers] = True
        _rows(self.data, pieces)[pieces.numbers] = 0xFF
        self._num_copies += 1

    def land_copy(self, pieces: Pieces, values: NDArray[np.uint8], warps: NDArray[np.intp]) -> None:
        """Land bytes of a copy: for the warps that started it they are there. `end_copy` ends it."""
        self._land(pieces, values, self.epoch * 64 + pieces.beside(warps), WRITTEN)

    def land_bulk_copy(self, pieces: Pieces, values: NDArray[np.uint8], waiter: int | None) -> None:
        """End a copy of the asynchronous proxy: for the warp that waited (None: for every warp) the bytes are there."""
        self._land(pieces, values, np.array(0 if waiter is None else self.epoch * 64 + waiter), UNTOUCHED)
        self.end_copy()

    def _land(self, pieces: Pieces, values: NDArray[np.uint8], tags: NDArray[Any], did: int) -> None:
        _rows(self._in_flight, pieces)[pieces.numbers] = False
        _rows(self._written, pieces)[pieces.numbers] = tags
        _rows(self._since_fence, pieces)[pieces.numbers] = did
        _rows(self.data, pieces)[pieces.numbers] = values.reshape(*pieces.numbers.shape, pieces.unit)

    def end_copy(self) -> None:
        """Count a copy out that has landed all its bytes."""
        self._num_copies -= 1

    def begin_matrix_read(self, pieces: Pieces) -> None:
        """Begin a matrix instruction's reading of pieces, all different, until `end_matrix_read`."""
        self._inside(pieces)
        self._check_no_copy(pieces, "a matrix instruction reads shared memory that an asynchronous copy still writes")
        if (_rows(self._written, pieces)[pieces.numbers] >= self.epoch * 64).any():
            raise MemoryFault("a matrix instruction reads shared memory written since the last barrier")
        if self.checks_fences and (_rows(self._since_fence, pieces)[pieces.numbers] == WRITTEN).any():
            raise MemoryFault("a matrix instruction reads shared memory written without a proxy fence since")
        _rows(self._busy, pieces)[pieces.numbers] += 1
        self._num_products += 1

    def begin_bulk_read(self, pieces: Pieces, warp: int) -> None:
        """Begin the reading of pieces, all different, by a thread's bulk store, until `end_matrix_read`."""
        self._inside(pieces)
        self._check_no_copy(pieces, "a bulk store reads shared memory that an asynchronous copy still writes")
        written, now = _rows(self._written, pieces)[pieces.numbers], self.epoch * 64
        if ((written >= now) & (written != now + warp)).any():
            raise MemoryFault("a bulk store reads shared memory that another warp wrote, with no barrier between")
        if (_rows(self._since_fence, pieces)[pieces.numbers] == WRITTEN).any():
            raise MemoryFault("a bulk store reads shared memory written without a proxy fence since")
        _rows(self._busy, pieces)[pieces.numbers] += 1
        self._num_products += 1

    def end_matrix_read(self, pieces: Pieces, waiter: int | None) -> NDArray[np.uint8]:
        """Return the bytes that the instruction read; the warp that waited (None: all) knows that it has ended."""
        _rows(self._busy, pieces)[pieces.numbers] -= 1
        self._num_products -= 1
        if waiter is not None:
            _rows(self._read, pieces)[pieces.numbers] = self.epoch * 64 + waiter
        return _rows(self.data, pieces)[pieces.numbers]

    def _mark_read(self, pieces: Pieces, warps: NDArray[np.intp]) -> None:
        touched = _rows(self._since_fence, pieces)
        touched[pieces.numbers] = np.maximum(touched[pieces.numbers], READ)
        rows, tag = _rows(self._read, pieces), self.epoch * 64 + pieces.beside(warps)
        before = rows[pieces.numbers]
        now = self.epoch * 64
        new = np.where((before < now) | (before == tag), tag, now + SEVERAL).astype(np.int32)
        rows[pieces.numbers] = new
        # Threads of one access that read the same byte: the tag left is one of theirs.
        mixed = rows[pieces.numbers] != new
        if mixed.any():
            numbers = np.broadcast_to(pieces.numbers[..., None] * pieces.unit + np.arange(pieces.unit), mixed.shape)
            self._read[numbers[mixed]] = now + SEVERAL

    def _pieces(self, addresses: NDArray[Any], size: int, aligned: int) -> Pieces:
        pieces = Pieces.of(addresses, size, aligned or size)
        self._inside(pieces)
        return pieces

    def _inside(self, pieces: Pieces) -> None:
        numbers = pieces.numbers
        if numbers.size and (numbers.min() < 0 or (numbers.max() + 1) * pieces.unit > self.size):
            last = (int(numbers.max()) + 1) * pieces.unit - 1
            raise MemoryFault(f"byte {last} of {self.size} bytes of shared memory")

    def _check_no_copy(self, pieces: Pieces, message: str) -> None:
        if self._num_copies and _rows(self._in_flight, pieces)[pieces.numbers].any():
            raise MemoryFault(message)

    def _check_write(self, pieces: Pieces, warps: NDArray[np.intp], values: NDArray[np.uint8] | None = None) -> None:
        """Raise where a write conflicts; warps that hold the same values may both write them."""
        self._check_no_copy(pieces, "shared memory is written that an asynchronous copy still writes")
        if self._num_products and _rows(self._busy, pieces)[pieces.numbers].any():
            raise MemoryFault("shared memory is written that a matrix instruction or a bulk store still reads")
        for tags, did in ((self._written, "wrote"), (self._read, "read")):
            found, now = _rows(tags, pieces)[pieces.numbers], self.epoch * 64
            conflicts = (found >= now) & (found != now + pieces.beside(warps))
            if did == "wrote" and values is not None and conflicts.any():
                conflicts &= _rows(self.data, pieces)[pieces.numbers] != values
            if conflicts.any():
                raise MemoryFault(f"a warp writes shared memory that another {did}, with no barrier between")


def _rows(array: NDArray[Any], pieces: Pieces) -> NDArray[Any]:
    """Return the bytes of each piece side by side: whole rows are found and changed faster than bytes one by one."""
    return array.reshape(-1, pieces.unit)
