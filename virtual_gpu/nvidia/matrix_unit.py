"""Matrix instructions: ldmatrix and stmatrix, mma.sync, wgmma and tcgen05."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.arithmetic import from_bfloat16
from virtual_gpu.faults import MemoryFault
from virtual_gpu.nvidia import fragments
from virtual_gpu.nvidia.tensor_memory import TensorMemory

if TYPE_CHECKING:
    from virtual_gpu.nvidia.machine import Barrier, Machine

__all__ = ["MatrixUnit", "require_everyone"]


def require_everyone(mask: NDArray[np.bool_]) -> None:
    """Raise unless all threads run an instruction of whole warps."""
    if not mask.all():
        raise NotImplementedError("an instruction of whole warps under a mask")


@dataclass
class _Product:
    """A wgmma that was started: it reads its operands, and writes its accumulators, when it is waited for."""

    warpgroup: int
    registers: tuple[int, ...]
    columns: int
    left: Any
    right: NDArray[np.intp]
    scale: bool
    convert: Callable[[NDArray[np.uint16]], NDArray[np.float32]]


class MatrixUnit:
    """The matrix instructions of one program, and those that are under way."""

    def __init__(self, machine: Machine):
        self._machine = machine
        self._products: list[list[_Product]] = [[]]
        """Groups of wgmma: the last one is not committed yet."""
        self._tensor_memory = TensorMemory(machine.shared, _decode)
        self.methods: dict[str, Callable[[tuple[str, ...], tuple[Any, ...], NDArray[np.bool_]], None]] = {
            "ldmatrix": self._load_matrix,
            "stmatrix": self._store_matrix,
            "mma.sync": self._mma,
            "wgmma.mma_async": self._wgmma,
            "wgmma.commit_group": self._wgmma_commit,
            "wgmma.wait_group": self._wgmma_wait,
            "tcgen05.ld": self._tcgen05_memory,
            "tcgen05.st": self._tcgen05_memory,
            "tcgen05.wait": self._tcgen05_wait,
            "tcgen05.alloc": self._tcgen05_allocate,
            "tcgen05.dealloc": self._tcgen05_allocate,
            "tcgen05.mma": self._tcgen05_product,
            "tcgen05.commit": self._tcgen05_commit,
        }
        """By the beginning of an instruction's name."""

    @property
    def busy(self) -> bool:
        """Whether products are under way, or tensor memory is still held."""
        return any(self._products) or self._tensor_memory.in_use

    def _load_matrix(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        results, addresses = operands
        addressed = 8 * len(results)
        words = []
        for warp in range(self._machine.num_threads // 32):
            lanes = addresses[32 * warp : 32 * warp + addressed]
            rows = self._machine.shared.read(lanes, 16, np.full(addressed, warp))
            words.append(fragments.load_matrices(rows, "trans" in parts))
        for index, result in enumerate(results):
            self._machine.registers[result] = np.concatenate([one[index] for one in words])

    def _store_matrix(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        addresses, sources = operands
        addressed = 8 * len(sources)
        for warp in range(self._machine.num_threads // 32):
            lanes = slice(32 * warp, 32 * warp + 32)
            rows = fragments.store_matrices(
                [self._machine.registers[source][lanes] for source in sources], "trans" in parts
            )
            self._machine.shared.write(addresses[lanes][:addressed], rows, np.full(addressed, warp))

    def _words(self, registers: Sequence[int]) -> NDArray[np.uint32]:
        """Give registers as (warps, registers, 32)."""
        return np.stack([self._machine.registers[register].reshape(-1, 32) for register in registers], 1)

    def _mma(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        if parts[3] != "m16n8k16" or parts[4:6] != ("row", "col"):
            raise NotImplementedError(".".join(parts))
        results, a, b, c = operands
        left, right = (_decode(parts[7])(bits) for bits in fragments.mma_operands(self._words(a), self._words(b)))
        rows, columns = fragments.accumulator_rows_and_columns(4)
        sums = fragments.product(left, right)[:, rows, columns] + self._words(c).view(np.float32)
        for index, result in enumerate(results):
            self._machine.registers[result] = sums[:, index].reshape(-1).view(np.uint32)

    def _wgmma(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        results, a, b, scale, *immediates = operands
        columns = 2 * len(results)
        if parts[4] != f"m64n{columns}k16" or immediates[:2] != [1, 1]:
            raise NotImplementedError(".".join(parts))
        from_registers = isinstance(a, tuple)
        transposed = immediates[2:] if not from_registers else [0, *immediates[2:]]
        for group in range(self._machine.num_threads // 128):
            thread = 128 * group
            if from_registers:
                words = self._words(a)[4 * group : 4 * group + 4]
                left: Any = fragments.mma_operands(words, words[:, :2])[0].reshape(64, 16)
            else:
                left = fragments.descriptor_places(int(a[thread]), 64, 16, not transposed[0], tcgen05=False)
                self._machine.shared.begin_matrix_read(left)
            right = fragments.descriptor_places(int(b[thread]), columns, 16, not transposed[1], tcgen05=False)
            self._machine.shared.begin_matrix_read(right)
            scales = bool(np.broadcast_to(scale, self._machine.num_threads)[thread])
            self._products[-1].append(
                _Product(group, results, columns, (from_registers, left), right, scales, _decode(parts[6]))
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
        from_registers, left = product.left
        if not from_registers:
            left = self._machine.shared.end_matrix_read(left).view(np.uint16).reshape(64, 16)
        right = self._machine.shared.end_matrix_read(product.right).view(np.uint16).reshape(product.columns, 16)
        result = fragments.product(product.convert(left), product.convert(right).T)
        rows, columns = fragments.accumulator_rows_and_columns(len(product.registers))
        parts = result.reshape(4, 16, product.columns)[:, rows, columns]  # (warps, registers, 32)
        threads = slice(128 * product.warpgroup, 128 * product.warpgroup + 128)
        for index, register in enumerate(product.registers):
            values = self._machine.registers[register].copy()
            new = parts[:, index].reshape(-1)
            if product.scale:
                new = new + values[threads].view(np.float32)
            values[threads] = new.view(np.uint32)
            self._machine.registers[register] = values

    def _tcgen05_memory(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        loads = parts[1] == "ld"
        registers = operands[0] if loads else operands[-1]
        addresses = operands[1] if loads else operands[0]
        split = [operand for operand in operands if isinstance(operand, int)]
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
                words[:, lanes] = self._tensor_memory.read(places)
            else:
                self._tensor_memory.write(places, words[:, lanes])
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
            self._tensor_memory.free(int(address[thread]), num_columns)
            return
        words = np.full((1, 1), self._tensor_memory.allocate(num_columns), np.uint32)
        self._machine.shared.write(
            address[thread : thread + 1], words.view(np.uint8), self._machine.warps[thread : thread + 1]
        )

    def _tcgen05_product(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        if parts[2:] != ("cta_group::1", "kind::f16"):
            raise NotImplementedError(".".join(parts))
        for thread in map(int, np.nonzero(mask)[0]):
            values = [int(np.broadcast_to(operand, self._machine.num_threads)[thread]) for operand in operands]
            self._tensor_memory.start(*values)

    def _tcgen05_commit(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        for thread in map(int, np.nonzero(mask)[0]):
            barrier, count = self._machine.mbarrier(int(operands[0][thread]), thread), self._tensor_memory.num_started

            def land(barrier: Barrier = barrier, count: int = count) -> int:
                self._tensor_memory.finish(count)
                barrier.pending -= 1
                return 0

            barrier.copies.append(land)


def _decode(kind: str) -> Callable[[NDArray[np.uint16]], NDArray[np.float32]]:
    if kind == "bf16":
        return from_bfloat16
    if kind == "f16":
        return lambda bits: np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
    raise NotImplementedError(f"matrix products of {kind}")
