"""Matrix instructions: ldmatrix and stmatrix, mma.sync, wgmma and tcgen05."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.arithmetic import from_bfloat16
from virtual_gpu.faults import MemoryFault
from virtual_gpu.floats import from_e2m1, from_e8m0, from_fp8
from virtual_gpu.nvidia import fragments
from virtual_gpu.nvidia.tensor_memory import TensorMemory
from virtual_gpu.shared_memory import SEVERAL, Pieces

if TYPE_CHECKING:
    from virtual_gpu.nvidia.machine import Barrier, Machine

__all__ = ["MatrixUnit", "require_everyone"]

SHORT_SUMS: int | None = None
"""The bits that wgmma keeps of a sum of e4m3's products, in which Hopper may have 14; None for exact ones."""


def require_everyone(mask: NDArray[np.bool_]) -> None:
    """Raise unless all threads run an instruction of whole warps."""
    if not mask.all():
        raise NotImplementedError("an instruction of whole warps under a mask")


@dataclass
class _Product:
    """A wgmma that was started: it reads its operands, and writes its accumulators, when it is waited for."""

    registers: tuple[str, ...]
    left: Any
    """Where A is in shared memory, for each warpgroup; or its registers, by name, with what they hold."""
    right: list[Pieces]
    """Where B is, for each warpgroup."""
    transposed: tuple[int, int]
    """Whether A and B are MN-major."""
    scale: bool
    convert: Callable[[NDArray[np.uint16]], NDArray[np.float32]]


class MatrixUnit:
    """The matrix instructions of one program, and those that are under way."""

    def __init__(self, machine: Machine):
        self._machine = machine
        self._products: list[list[_Product]] = [[]]
        """Groups of wgmma: the last one is not committed yet."""
        self._fenced: dict[str, Any] = {}
        """What each register held at the last wgmma.fence, or since wgmma itself wrote it."""
        self._tensor_memory = TensorMemory(machine.shared, _decode)
        self.methods: dict[str, Callable[[tuple[str, ...], tuple[Any, ...], NDArray[np.bool_]], None]] = {
            "load_matrix": self._load_matrix,
            "store_matrix": self._store_matrix,
            "mma": self._mma,
            "wgmma": self._wgmma,
            "wgmma_commit": self._wgmma_commit,
            "wgmma_wait": self._wgmma_wait,
            "tcgen05_memory": self._tcgen05_memory,
            "tcgen05_wait": self._tcgen05_wait,
            "tcgen05_allocate": self._tcgen05_allocate,
            "tcgen05_product": self._tcgen05_product,
            "tcgen05_commit": self._tcgen05_commit,
        }
        """By the names that `instruction_set.CALLS` gives them."""

    @property
    def busy(self) -> bool:
        """Whether products are under way, or tensor memory is still held."""
        return any(self._products) or self._tensor_memory.in_use

    def fence_registers(self) -> None:
        """Allow wgmma to use what threads wrote to registers."""
        self._fenced = dict(self._machine.registers)

    def _require_fenced(self, registers: Sequence[str]) -> None:
        written = self._machine.registers.get  # None of what nobody wrote, as of sums that begin without a value
        if any(written(register) is not self._fenced.get(register) for register in registers):
            raise MemoryFault("wgmma uses registers that threads wrote, with no wgmma.fence since")

    def _load_matrix(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        results, addresses = operands
        if parts[4] != f"x{len(results)}":
            raise NotImplementedError(".".join(parts))
        rows = self._machine.shared.read(*self._addressed(addresses, len(results), 16))
        for index, words in enumerate(fragments.load_matrices(rows, len(results), "trans" in parts)):
            self._machine.registers[results[index]] = words

    def _addressed(self, addresses: NDArray[Any], num_matrices: int, size: int) -> tuple[Any, int, NDArray[np.intp]]:
        """Return the addresses that the first lanes of each warp hold, a row of a matrix each, and those warps."""
        num_warps, addressed = self._machine.num_threads // 32, 8 * num_matrices
        return (
            addresses.reshape(num_warps, 32)[:, :addressed].reshape(-1),
            size,
            np.repeat(np.arange(num_warps), addressed),
        )

    def _store_matrix(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        addresses, sources = operands
        if parts[4] != f"x{len(sources)}":
            raise NotImplementedError(".".join(parts))
        places, _, warps = self._addressed(addresses, len(sources), 16)
        words = [self._machine.registers[source] for source in sources]
        self._machine.shared.write(places, fragments.store_matrices(words, "trans" in parts), warps)

    def _words(self, registers: Sequence[str]) -> NDArray[np.uint32]:
        """Return registers as (warps, registers, 32)."""
        return np.stack([self._machine.registers[register].reshape(-1, 32) for register in registers], 1)

    def _mma(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        results, a, b, c, *scaling = operands
        left, right = (
            _decode(parts[-4 if scaling else -3])(bits)
            for bits in fragments.mma_operands(self._words(a), self._words(b))
        )
        if scaling:  # one or two bytes of one thread for each row of A, and for each column of B
            scaled = []
            bytes_of_scales = np.arange(1 + ("scale_vec::2X" in parts))
            a_words, (a_byte, a_pair), b_words, (b_byte, b_member) = scaling
            row, column = np.arange(16), np.arange(8)
            for matrix, words, lanes, byte in (
                (left, a_words, row % 8 * 4 + 2 * int(a_pair) + row // 8, a_byte),
                (right, b_words, column * 4 + int(b_member), b_byte),
            ):
                codes = words.reshape(-1, 32)[:, lanes, None] >> 8 * (int(byte) + bytes_of_scales) & 0xFF
                scaled.append(matrix * from_e8m0(codes).repeat(matrix.shape[2] // codes.shape[2], 2))
            left, right = scaled
        rows, columns = fragments.accumulator_rows_and_columns(4)
        sums = fragments.product(left, right.transpose(0, 2, 1))[:, rows, columns] + self._words(c).view(np.float32)
        for index, result in enumerate(results):
            self._machine.registers[result] = sums[:, index].reshape(-1).view(np.uint32)

    def _wgmma(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        results, a, b, scale, *immediates = operands
        columns = 2 * len(results)
        depth, *majors = (32, 0, 0) if parts[6] == "e4m3" else (16,)
        from_registers = isinstance(a, tuple)
        if parts[4] != f"m64n{columns}k{depth}" or immediates[:2] != [1, 1] or (majors and immediates[2:]):
            raise NotImplementedError(".".join(parts))
        self._require_fenced([*results, *(a if from_registers else ())])
        transposed = majors or (immediates[2:] if not from_registers else [0, *immediates[2:]])
        shared = self._machine.shared
        first = range(0, self._machine.num_threads, 128)
        if from_registers:
            left: Any = {register: self._machine.registers[register] for register in a}
        else:
            left = [fragments.descriptor_places(int(a[one]), 64, not transposed[0], tcgen05=False) for one in first]
        right = [fragments.descriptor_places(int(b[one]), columns, not transposed[1], tcgen05=False) for one in first]
        for places in right if from_registers else [*left, *right]:
            shared.begin_matrix_read(places)
        scales = np.broadcast_to(scale, self._machine.num_threads)
        if (scales != scales[0]).any():
            raise NotImplementedError("warpgroups that add and warpgroups that don't")
        self._products[-1].append(
            _Product(results, left, right, (transposed[0], transposed[1]), bool(scales[0]), _decode(parts[6]))
        )

    def _wgmma_commit(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        self._products.append([])

    def _wgmma_wait(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        groups = self._products[:-1]
        done = groups[: len(groups) - operands[0]] if operands[0] else groups
        del self._products[: len(done)]
        for group in done:
            for product in group:
                self._finish(product)

    def _finish(self, product: _Product) -> None:
        """End a product. Each warp has waited for its own part of it: of the others' it knows nothing."""
        registers = self._machine.registers
        left, right = (
            self._matrices_of(places, outer, not transposed) if isinstance(places, list) else self._still_held(places)
            for places, outer, transposed in zip(
                (product.left, product.right), (64, 2 * len(product.registers)), product.transposed, strict=True
            )
        )
        a, b = product.convert(left), product.convert(right).transpose(0, 2, 1)
        rows, columns = fragments.accumulator_rows_and_columns(len(product.registers))
        sums = np.zeros((len(rows), self._machine.num_threads), np.float32)
        if product.scale:
            sums = np.stack([registers[register] for register in product.registers]).view(np.float32)
        if SHORT_SUMS is None or a.shape[2] != 32:
            sums = sums + self._spread(fragments.product(a, b), rows, columns)
        else:
            before = np.empty((len(a), 4, 16, b.shape[2]), np.float32)
            before[:, :, rows, columns] = sums.reshape(len(rows), len(a), 4, 32).transpose(1, 2, 0, 3)
            before = before.reshape(len(a), 64, -1)
            sums = self._spread(fragments.product_of_short_sums(a, b, before, SHORT_SUMS), rows, columns)
        new = dict(zip(product.registers, sums.view(np.uint32), strict=True))
        registers.update(new)
        self._fenced.update(new)

    @staticmethod
    def _spread(
        matrices: NDArray[np.float32], rows: NDArray[np.intp], columns: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Return (registers, threads) of the result (groups, 64, columns) of each warpgroup."""
        parts = matrices.reshape(4 * len(matrices), 16, -1)[:, rows, columns]  # (warps, registers, 32)
        return np.ascontiguousarray(parts.transpose(1, 0, 2)).reshape(len(rows), -1)

    def _still_held(self, operand: dict[str, Any]) -> NDArray[np.uint16]:
        """Return A of registers that no thread has written since the product was started: (groups, 64, 16)."""
        if any(self._machine.registers[register] is not held for register, held in operand.items()):
            raise MemoryFault("wgmma reads registers that threads wrote before they waited for it")
        words = self._words(tuple(operand))
        return fragments.mma_operands(words, words[:, :2])[0].reshape(-1, 64, 16)

    def _matrices_of(self, places: list[Pieces], outer: int, depth_contiguous: bool) -> NDArray[np.uint16]:
        """Return the matrix of each warpgroup, whose reading ends: (groups, outer, 16)."""
        read = [self._machine.shared.end_matrix_read(one, SEVERAL) for one in places]
        return np.stack([fragments.matrix_of(one, outer, depth_contiguous) for one in read])

    def _tcgen05_memory(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        loads = parts[1] == "ld"
        registers = operands[0] if loads else operands[-1]
        addresses = operands[1] if loads else operands[0]
        split = [operand for operand in operands if isinstance(operand, int)]
        if parts[5] != f"x{len(registers)}" or len(split) != (parts[4] == "16x32bx2"):
            raise NotImplementedError(".".join(parts))
        threads = mask.reshape(-1, 32)
        if (threads.any(1) != threads.all(1)).any():
            raise NotImplementedError("a tcgen05 load or store by part of a warp")
        words = np.stack([self._machine.registers[register] for register in registers])
        for warp in np.nonzero(threads.all(1))[0]:
            lanes = slice(32 * warp, 32 * warp + 32)
            address = int(addresses[lanes][0])
            if (address >> 16) // 32 != warp % 4:
                raise MemoryFault(f"warp {warp} accesses lane {address >> 16} of tensor memory")
            places = self._tensor_memory.places(address, parts[4], len(registers), *(split or [0]))
            if loads:
                words[:, lanes] = self._tensor_memory.read(places, int(warp))
            else:
                self._tensor_memory.write(places, words[:, lanes], int(warp))
        if loads:
            for register, values in zip(registers, words, strict=True):
                self._machine.registers[register] = values

    def _tcgen05_wait(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        if parts[1] == "wait::ld":
            self._tensor_memory.wait_for_loads()
        else:
            self._tensor_memory.wait_for_stores()

    def _tcgen05_allocate(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        address, num_columns = operands
        thread = int(np.nonzero(mask)[0][0])
        if parts[1] == "dealloc":
            self._tensor_memory.free(int(address[thread]), num_columns, int(self._machine.warps[thread]))
            return
        words = np.full((1, 1), self._tensor_memory.allocate(num_columns), np.uint32)
        # Through which proxy this word is written is not known here: Triton copies over it in bulk with no fence.
        warp = self._machine.warps[thread : thread + 1]
        self._machine.shared.write(address[thread : thread + 1], words.view(np.uint8), warp, needs_fence=False)

    def _tcgen05_product(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        for thread in map(int, np.nonzero(mask)[0]):
            address, left, right, instruction, *scales, accumulates = (
                int(np.broadcast_to(operand, self._machine.num_threads)[thread]) for operand in operands
            )
            warp = int(self._machine.warps[thread])
            self._tensor_memory.start(address, left, right, instruction, accumulates, warp, parts[3], scales)

    def _tcgen05_commit(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        for thread in map(int, np.nonzero(mask)[0]):
            barrier, count = self._machine.mbarrier(int(operands[0][thread]), thread), self._tensor_memory.num_started

            def land(waiter: int | None, barrier: Barrier = barrier, count: int = count) -> int:
                self._tensor_memory.finish(count, waiter)
                barrier.pending -= 1
                return 0

            barrier.copies.append(land)


def _decode(kind: str) -> Callable[[NDArray[np.uint16]], NDArray[np.float32]]:
    if kind == "bf16":
        return from_bfloat16
    if kind == "f16":
        return lambda bits: np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
    if kind == "e4m3":  # two elements in 16 bits, where the depth is last
        return lambda bits: from_fp8(np.ascontiguousarray(bits).view(np.uint8), kind)
    if kind == "e2m1":
        return lambda bits: from_e2m1(np.ascontiguousarray(bits).view(np.uint8))
    raise NotImplementedError(f"matrix products of {kind}")
