"""Blackwell's tensor memory: 128 lanes by 512 columns of 32 bits, which tcgen05 multiplies into."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.faults import MemoryFault
from virtual_gpu.floats import from_e8m0
from virtual_gpu.nvidia import fragments
from virtual_gpu.shared_memory import Pieces, SharedMemory

__all__ = ["TensorMemory"]

KINDS = {"kind::f16": {0: "f16", 1: "bf16"}, "kind::f8f6f4": {0: "e4m3"}}
KINDS["kind::mxf8f6f4"] = KINDS["kind::f8f6f4"]
"""The types of A and B by their numbers in the instruction's descriptor."""

LANES, COLUMNS = 128, 512


@dataclass
class _Product:
    """A product that was started; it reads and writes when a barrier that counts it is waited for."""

    address: int
    rows: NDArray[np.intp]
    """The lane of each row of the result."""
    num_columns: int
    left: Pieces
    right: Pieces
    depth_contiguous: tuple[bool, bool]
    accumulates: bool
    decode: tuple[str, str]
    element_bytes: int
    scales: list[tuple[int, int, int]]
    """Of A and of B, where there are some: how many, their first column, and which byte of its words is meant."""


class TensorMemory:
    """The tensor memory of one program."""

    def __init__(
        self, shared: SharedMemory, decode: Callable[[str], Callable[[NDArray[np.uint16]], NDArray[np.float32]]]
    ):
        self._shared, self._decode = shared, decode
        self._words = np.full((LANES, COLUMNS), 0xFFFFFFFF, np.uint32)
        self._busy = np.zeros((LANES, COLUMNS), np.int16)
        self._unread = np.zeros((LANES, COLUMNS), bool)
        """Words that a load, not waited for yet, may still read: its registers are ordered, its accesses are not."""
        self._unwritten = np.zeros((LANES, COLUMNS), bool)
        """Words that a store, not waited for yet, may still write."""
        self._accessed = np.zeros((LANES, COLUMNS), np.int32)
        """For each word: barriers passed * 64 + the warp that loaded or stored it last; it alone knows of that."""
        self._allocated = np.zeros(COLUMNS, bool)
        self._products: list[_Product] = []
        self._num_done = 0

    @property
    def num_started(self) -> int:
        """Products started so far."""
        return self._num_done + len(self._products)

    @property
    def in_use(self) -> bool:
        """Whether columns are allocated, or products under way."""
        return bool(self._allocated.any() or self._products)

    def allocate(self, num_columns: int) -> int:
        """Return the address of free columns."""
        if num_columns not in (32, 64, 128, 256, 512):
            raise MemoryFault(f"{num_columns} columns of tensor memory: not a power of two from 32 to 512")
        for first in range(0, COLUMNS, num_columns):
            if not self._allocated[first : first + num_columns].any():
                self._allocated[first : first + num_columns] = True
                return first
        raise MemoryFault(f"{num_columns} columns of tensor memory are not free")

    def free(self, address: int, num_columns: int, warp: int) -> None:
        """Return columns back."""
        columns = (slice(None), slice(address, address + num_columns))
        for waiting in (self._busy, self._unread, self._unwritten):
            if waiting[columns].any():
                raise MemoryFault("tensor memory is freed while it is accessed")
        self._require_order(columns, warp)
        self._allocated[address : address + num_columns] = False

    def places(self, address: int, shape: str, count: int, split: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return the lane and column of each register (count, 32) of a warp's load or store."""
        lane, column = address >> 16, address & 0xFFFF
        register, thread = np.arange(count)[:, None], np.arange(32)[None, :]
        if shape == "32x32b":
            lanes, columns = lane + thread + 0 * register, column + register + 0 * thread
        elif shape == "16x32bx2":
            lanes, columns = lane + thread % 16 + 0 * register, column + register + thread // 16 * split
        else:
            raise NotImplementedError(f"tcgen05 loads and stores of {shape}")
        if lanes.max() >= LANES or columns.max() >= COLUMNS or not self._allocated[columns].all():
            raise MemoryFault(f"columns {columns.min()} to {columns.max()} of tensor memory are not allocated")
        if self._busy[lanes, columns].any():
            raise MemoryFault("tensor memory is accessed while a product still writes it")
        return lanes, columns

    def _require_order(self, places: Any, warp: int) -> None:
        """Raise where another warp has loaded or stored words since the last barrier."""
        found, now = self._accessed[places], self._shared.epoch * 64
        if ((found >= now) & (found != now + warp)).any():
            raise MemoryFault("tensor memory that another warp loads or stores is used, with no barrier between")

    def read(self, places: tuple[NDArray[np.intp], NDArray[np.intp]], warp: int) -> NDArray[np.uint32]:
        """Return the words at `places`."""
        self._require_order(places, warp)
        self._accessed[places] = self._shared.epoch * 64 + warp
        self._unread[places] = True
        return self._words[places]

    def write(self, places: tuple[NDArray[np.intp], NDArray[np.intp]], words: NDArray[np.uint32], warp: int) -> None:
        """Write words to `places`."""
        self._require_order(places, warp)
        self._accessed[places] = self._shared.epoch * 64 + warp
        self._unwritten[places] = True
        self._words[places] = words

    def wait_for_loads(self) -> None:
        """End all loads."""
        self._unread[:] = False

    def wait_for_stores(self) -> None:
        """End all stores."""
        self._unwritten[:] = False

    def start(
        self,
        address: int,
        left: int,
        right: int,
        instruction: int,
        accumulates: int,
        warp: int,
        kind: str = "kind::f16",
        scales: Sequence[int] = (),
    ) -> None:
        """Start a product, by a thread of `warp`, of matrices in shared memory, from tcgen05.mma's descriptors.

        scales: the addresses of A's and B's in this memory, of kind::mxf8f6f4.
        """
        fixed = (0x80806040, 0x00800000) if scales else (0x00006030, 0x00000010)
        if instruction & fixed[0] != fixed[1] or instruction & 0xF:
            raise NotImplementedError(f"tcgen05.mma with the descriptor {instruction:#x}")
        kinds = KINDS[kind]
        element_bytes = 2 if kind == "kind::f16" else 1
        num_columns, num_rows = (instruction >> 17 & 63) * 8, (instruction >> 24 & 31) * 16
        majors = (not instruction >> 15 & 1, not instruction >> 16 & 1)
        row = np.arange(num_rows)
        lanes = row if num_rows == 128 else row // 16 * 32 + row % 16
        product = _Product(
            address & 0xFFFF,
            lanes + (address >> 16),
            num_columns,
            fragments.descriptor_places(left, num_rows, majors[0], tcgen05=True, element_bytes=element_bytes),
            fragments.descriptor_places(right, num_columns, majors[1], tcgen05=True, element_bytes=element_bytes),
            majors,
            bool(accumulates),
            (kinds[instruction >> 7 & 7], kinds[instruction >> 10 & 7]),
            element_bytes,
            [
                (size, first, instruction >> place & 3)
                for size, first, place in zip((num_rows, num_columns), scales, (29, 4), strict=False)
            ],
        )
        if scales and (num_rows != LANES or any(first >> 16 for first in scales)):
            raise NotImplementedError("a product with scales of other than 128 rows")
        for places in (product.left, product.right):
            self._shared.begin_matrix_read(places)
        for words in self._scale_places(product):
            if not self._allocated[words[1]].all():
                raise MemoryFault("a product with scales in tensor memory that is not allocated")
            if self._unwritten[words].any():
                raise MemoryFault("a product with scales that stores, not waited for, still write")
            self._require_order(words, warp)
            self._busy[words] += 1
        columns = slice(product.address, product.address + num_columns)
        if not self._allocated[columns].all() or product.address + num_columns > COLUMNS:
            raise MemoryFault(f"a product into columns {columns} of tensor memory, which are not allocated")
        if (self._unread | self._unwritten)[product.rows, columns].any():
            raise MemoryFault("a product into tensor memory that loads or stores, not waited for, still access")
        self._require_order((product.rows, columns), warp)
        self._busy[product.rows, columns] += 1
        self._products.append(product)

    @staticmethod
    def _scale_places(product: _Product) -> list[tuple[slice, slice]]:
        """Return the words that hold the scales of a product: 32 rows (or columns) in a column, in all four warps'."""
        return [(slice(None), slice(first, first + -(-size // 32))) for size, first, _ in product.scales]

    def _scales_at(self, size: int, first: int, byte: int) -> NDArray[np.uint32]:
        """Return the codes of scales (size,), of which each quarter of the lanes has a copy."""
        words = self._words[:, first : first + -(-size // 32)].reshape(4, 32, -1)
        copies = words.transpose(0, 2, 1).reshape(4, -1)[:, :size] >> np.uint32(8 * byte) & 0xFF
        if (copies != copies[0]).any():
            raise MemoryFault("a product with scales that are not the same in all four quarters of tensor memory")
        return copies[0]

    def finish(self, count: int, waiter: int | None) -> None:
        """End the first `count` products of all started so far; `waiter` is as for `end_matrix_read`."""
        if waiter is not None and self._num_done < count:
            raise NotImplementedError("some warps alone wait for a product into tensor memory")
        while self._num_done < count:
            product = self._products.pop(0)
            self._num_done += 1
            left, right = (
                self._decode(kind)(
                    fragments.matrix_of(
                        self._shared.end_matrix_read(places, waiter), size, contiguous, product.element_bytes
                    )
                )
                for kind, places, size, contiguous in zip(
                    product.decode,
                    (product.left, product.right),
                    (len(product.rows), product.num_columns),
                    product.depth_contiguous,
                    strict=True,
                )
            )
            if product.scales:
                left, right = (
                    matrix * from_e8m0(self._scales_at(*scale))[:, None]
                    for matrix, scale in zip((left, right), product.scales, strict=True)
                )
            for words in self._scale_places(product):
                self._busy[words] -= 1
            columns = slice(product.address, product.address + product.num_columns)
            result = fragments.product(left, right.T)
            if product.accumulates:
                result = result + self._words[product.rows, columns].view(np.float32)
            self._words[product.rows, columns] = result.view(np.uint32)
            self._busy[product.rows, columns] -= 1
