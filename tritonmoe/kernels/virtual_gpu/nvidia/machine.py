"""Run one program of a kernel: registers of all threads, shared memory, barriers, copies and matrix products.

Threads go through the program together; where a branch separates them, those go first that can still come to where the
others are. What is asynchronous happens as late as the program's waits allow: a missing wait leaves NaN, or raises.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arithmetic import from_bfloat16
from ..faults import Deadlock, MemoryFault
from ..memory import GlobalMemory, SharedMemory
from . import fragments
from .tensor_map import TensorMap
from .tensor_memory import TensorMemory
from .translation import PARAMETER_SPACE, Translation

__all__ = ["Machine", "run_grid"]

MAX_STEPS = 1_000_000
"""Blocks that one program may run: more is taken for a loop that never ends."""


@dataclass
class _Barrier:
    """An mbarrier: its phase completes when all arrivals are there, and all bytes of copies."""

    count: int
    epoch: int
    pending: int = 0
    num_bytes: int = 0
    phase: int = 0
    copies: list[Callable[[], int]] = field(default_factory=list)
    """What lands the bytes of each copy that was started."""

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, num_bytes: int = 0) -> None:
        self.pending -= 1
        self.num_bytes += num_bytes
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.num_bytes == 0:
            self.phase ^= 1
            self.pending = self.count

    def wait(self, parity: int) -> None:
        if self.phase != parity:
            return
        for copy in self.copies:
            self.num_bytes -= copy()
        self.copies.clear()
        self.complete()
        if self.phase == parity:
            raise Deadlock(f"a barrier waits for {self.pending} arrivals and {self.num_bytes} bytes that never come")


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


class Machine:
    """The state of one program."""

    def __init__(
        self,
        translation: Translation,
        parameters: Sequence[Any],
        memory: GlobalMemory,
        shared_bytes: int,
        program: tuple[int, int, int],
        grid: tuple[int, int, int],
        checks_fences: bool,
    ):
        self.translation, self.parameters, self.memory = translation, parameters, memory
        self.num_threads = translation.kernel.num_threads
        self.shared = SharedMemory(shared_bytes, checks_fences)
        self.program_number = 1 + program[0] + grid[0] * (program[1] + grid[1] * program[2])
        self.line = 0
        threads = np.arange(self.num_threads)
        self.warps = threads // 32
        self.first_lane = threads % 32 == 0
        self._special = {"%tid.x": threads.astype("u4"), "%laneid": (threads % 32).astype("u4")}
        for axis in range(3):
            self._special[f"%ctaid.{'xyz'[axis]}"] = self.fill(np.uint32(program[axis]))
            self._special[f"%nctaid.{'xyz'[axis]}"] = self.fill(np.uint32(grid[axis]))
        self.registers: list[Any] = [None] * len(translation.registers)
        for name, number in translation.registers.items():
            kind = {"%rs": "u2", "%rd": "u8"}.get(name[:3], "u4" if name.startswith("%r") else "?")
            self.registers[number] = np.full(self.num_threads, np.iinfo(kind).max if kind != "?" else True, kind)
        self._copies: list[list[tuple[Any, Any, Any]]] = [[]]
        """Groups of cp.async: the last one is not committed yet."""
        self._barriers: dict[int, _Barrier] = {}
        self._products: list[list[_Product]] = [[]]
        """Groups of wgmma: the last one is not committed yet."""
        self._tensor_memory = TensorMemory(self.shared, _decode)

    # Running.

    def run(self) -> None:
        """Run the program to its end.

        Raises:
            MemoryFault, Deadlock, NotImplementedError: with the line of the PTX.
        """
        try:
            with np.errstate(all="ignore"):
                self._run()
        except (MemoryFault, Deadlock, NotImplementedError) as error:
            place = f"{self.translation.kernel.name}, line {self.line} of its PTX"
            raise type(error)(f"{place}: {error}") from error
        if any(self._copies) or any(self._products) or self._tensor_memory.in_use:
            raise MemoryFault(f"{self.translation.kernel.name} ends while copies or products are under way")

    def _run(self) -> None:
        blocks, labels = self.translation.blocks, self.translation.kernel.labels
        numbers = self.translation.registers
        waiting: dict[int, Any] = {0: None}
        for _ in range(MAX_STEPS):
            if not waiting:
                return
            number = next(iter(waiting)) if len(waiting) == 1 else self._first(waiting)
            mask = waiting.pop(number)
            if number == len(blocks):
                continue
            block = blocks[number]
            block.run(self.registers, self, mask)
            branch = block.branch
            if branch is None:
                self._go(waiting, number + 1, mask)
                continue
            target = len(blocks) if branch.parts[0] == "ret" else labels[branch.operands[0]]  # type: ignore[index]
            if not branch.guard:
                self._go(waiting, target, mask)
                continue
            taken = self.registers[numbers[branch.guard]]
            taken = ~taken if branch.guard_negated else taken
            stays = ~taken
            if mask is not None:
                taken, stays = taken & mask, stays & mask
            if not stays.any():
                self._go(waiting, target, mask)
            elif not taken.any():
                self._go(waiting, number + 1, mask)
            else:
                self._go(waiting, target, taken)
                self._go(waiting, number + 1, stays)
        raise Deadlock(f"{MAX_STEPS} blocks have run: the program doesn't end")

    def _first(self, waiting: Iterable[int]) -> int:
        """Give a block that the threads of no other one can still come to, so that they meet there."""
        reachable = self.translation.reachable

        def comes_later(block: int) -> bool:
            return any(block in reachable[other] and other not in reachable[block] for other in waiting)

        return min(block for block in waiting if not comes_later(block))

    @staticmethod
    def _go(waiting: dict[int, Any], number: int, mask: Any) -> None:
        if number in waiting:
            mask = waiting[number] | mask
            mask = None if mask.all() else mask
        waiting[number] = mask

    # What the translated code asks for.

    def fill(self, value: Any) -> NDArray[Any]:
        """Give every thread `value`."""
        return np.full(self.num_threads, value)

    def special(self, name: str) -> NDArray[np.uint32]:
        """Give %tid.x, %ctaid.x, ..."""
        return self._special[name]

    def parameter(self, number: int, offset: int, kind: str) -> NDArray[Any]:
        """Give a parameter of the kernel in the bits of `kind`."""
        value = self.parameters[number]
        if isinstance(value, TensorMap) or offset:
            raise NotImplementedError("reading inside a parameter")
        return self.fill(
            np.array(value).astype(f"i{int(kind[1:]) // 8}" if kind[0] == "s" else f"u{int(kind[1:]) // 8}")
        )

    def load(self, space: str, addresses: NDArray[Any], size: int, count: int, mask: Any) -> list[NDArray[Any]]:
        """Give `count` words of `size` bytes to every thread of `mask`."""
        active = slice(None) if mask is None else mask
        out = np.full((self.num_threads, size * count), 0xFF, np.uint8)
        if space == "global":
            out[active] = self.memory.read(addresses[active], size * count, self.program_number)
        else:
            out[active] = self.shared.read(addresses[active], size * count, self.warps[active])
        return list(np.ascontiguousarray(out.view(f"u{size}").T))

    def store(self, space: str, addresses: NDArray[Any], size: int, values: Sequence[Any], mask: Any) -> None:
        """Store every thread's `values`, words of `size` bytes."""
        active = slice(None) if mask is None else mask
        words = np.stack(np.broadcast_arrays(self._special["%tid.x"], *values)[1:], 1).astype(f"u{size}")
        words = np.ascontiguousarray(words[active]).view(np.uint8)
        if space == "global":
            self.memory.write(addresses[active], words, self.program_number)
        else:
            self.shared.write(addresses[active], words, self.warps[active])

    def barrier(self, mask: Any) -> None:
        """Wait for all threads of the program."""
        if mask is not None and not mask.all():
            raise Deadlock("only some threads come to a barrier")
        self.shared.barrier()

    def call(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: Any) -> None:
        """Run an instruction that is more than arithmetic."""
        everyone = np.ones(self.num_threads, bool) if mask is None else np.broadcast_to(mask, self.num_threads)
        name = ".".join(parts)
        for prefix, method in _METHODS.items():
            if name.startswith(prefix):
                method(self, parts, operands, everyone)
                return
        raise NotImplementedError(name)

    def _everyone(self, mask: NDArray[np.bool_]) -> None:
        if not mask.all():
            raise NotImplementedError("an instruction of whole warps under a mask")

    # Copies from global to shared memory.

    def _copy(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        target, source, size = operands[0][mask], operands[1][mask], operands[2]
        wanted = np.broadcast_to(operands[3] if len(operands) > 3 else size, self.num_threads)[mask]
        values = np.zeros((len(target), size), np.uint8)
        for length in np.unique(wanted):
            if length:
                chosen = wanted == length
                values[chosen, :length] = self.memory.read(source[chosen], int(length), self.program_number)
        if (target % size).any():
            raise MemoryFault(f"an asynchronous copy of {size} bytes is misaligned")
        places = target.astype(np.int64)[:, None] + np.arange(size)
        warps = self.warps[mask][:, None]
        self.shared.begin_copy(places, warps)
        self._copies[-1].append((places, values, warps))

    def _copy_commit(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        self._everyone(mask)
        self._copies.append([])

    def _copy_wait(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        self._everyone(mask)
        groups = self._copies[:-1]
        landing = groups[: len(groups) - operands[0]] if operands[0] else groups
        del self._copies[: len(landing)]
        for group in landing:
            for places, values, warps in group:
                self.shared.land_copy(places, values, warps)

    def _tensor_copy(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        (targets, (maps, coordinates), barriers) = operands
        for thread in np.nonzero(mask)[0]:
            tensor_map = self.parameters[int(maps[thread]) - PARAMETER_SPACE]
            assert isinstance(tensor_map, TensorMap)
            start = [int(np.broadcast_to(item, self.num_threads)[thread]) for item in coordinates]
            gathers = "tile::gather4" in parts
            places, values = tensor_map.read(self.memory, self.program_number, int(targets[thread]), start, gathers)
            warp = np.array(self.warps[thread])
            self.shared.begin_copy(places, warp)
            barrier = self._barrier(int(barriers[thread]), int(warp))

            def land(places: Any = places, values: Any = values) -> int:
                self.shared.land_copy(places, values, None)
                return int(places.size)

            barrier.copies.append(land)

    # Barriers in shared memory.

    def _barrier(self, address: int, warp: int | None = None) -> _Barrier:
        if address not in self._barriers:
            raise MemoryFault(f"there is no initialised mbarrier at {address}")
        return self._barriers[address]

    def _mbarrier(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        addresses = operands[0] if parts[1] in ("init", "inval") else operands[1]
        for thread in np.nonzero(mask)[0]:
            address = int(addresses[thread])
            if parts[1] == "init":
                self._barriers[address] = _Barrier(operands[1], self.shared.epoch)
            elif parts[1] == "inval":
                barrier = self._barrier(address)
                if barrier.copies:
                    raise MemoryFault("an mbarrier ends while copies that it counts are under way")
                del self._barriers[address]
            elif parts[1] == "arrive":
                self._barrier(address).arrive(operands[2] if "expect_tx" in parts else 0)
            elif parts[1] == "try_wait":
                self._barrier(address).wait(int(np.broadcast_to(operands[2], self.num_threads)[thread]) & 1)
            else:
                raise NotImplementedError(".".join(parts))
        if parts[1] == "try_wait":
            self.registers[operands[0]] = np.ones(self.num_threads, bool)

    # Matrices.

    def _atomic(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        if parts[-2:] != ("add", "u32") or "shared" not in parts:
            raise NotImplementedError(".".join(parts))
        result, addresses, amount = operands
        amounts = np.broadcast_to(amount, self.num_threads).astype("u4")
        old = self.registers[result].copy() if result is not None else None
        words = self.shared.data.view("u4")
        for thread in np.nonzero(mask)[0]:
            place = int(addresses[thread]) // 4
            if old is not None:
                old[thread] = words[place]
            words[place] += amounts[thread]
        if old is not None:
            self.registers[result] = old

    def _load_matrix(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        self._everyone(mask)
        results, addresses = operands
        addressed = 8 * len(results)
        words = []
        for warp in range(self.num_threads // 32):
            lanes = addresses[32 * warp : 32 * warp + addressed]
            rows = self.shared.read(lanes, 16, np.full(addressed, warp))
            words.append(fragments.load_matrices(rows, "trans" in parts))
        for index, result in enumerate(results):
            self.registers[result] = np.concatenate([one[index] for one in words])

    def _store_matrix(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        self._everyone(mask)
        addresses, sources = operands
        addressed = 8 * len(sources)
        for warp in range(self.num_threads // 32):
            lanes = slice(32 * warp, 32 * warp + 32)
            rows = fragments.store_matrices([self.registers[source][lanes] for source in sources], "trans" in parts)
            self.shared.write(addresses[lanes][:addressed], rows, np.full(addressed, warp))

    def _words(self, registers: Sequence[int]) -> NDArray[np.uint32]:
        """Give registers as (warps, registers, 32)."""
        return np.stack([self.registers[register].reshape(-1, 32) for register in registers], 1)

    def _mma(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        self._everyone(mask)
        if parts[3] != "m16n8k16" or parts[4:6] != ("row", "col"):
            raise NotImplementedError(".".join(parts))
        results, a, b, c = operands
        left, right = (_decode(parts[7])(bits) for bits in fragments.mma_operands(self._words(a), self._words(b)))
        rows, columns = fragments.accumulator_rows_and_columns(4)
        sums = fragments.product(left, right)[:, rows, columns] + self._words(c).view(np.float32)
        for index, result in enumerate(results):
            self.registers[result] = sums[:, index].reshape(-1).view(np.uint32)

    def _wgmma(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        self._everyone(mask)
        results, a, b, scale, *immediates = operands
        columns = 2 * len(results)
        if parts[4] != f"m64n{columns}k16" or immediates[:2] != [1, 1]:
            raise NotImplementedError(".".join(parts))
        from_registers = isinstance(a, tuple)
        transposed = immediates[2:] if not from_registers else [0, *immediates[2:]]
        for group in range(self.num_threads // 128):
            thread = 128 * group
            if from_registers:
                words = self._words(a)[4 * group : 4 * group + 4]
                left: Any = fragments.mma_operands(words, words[:, :2])[0].reshape(64, 16)
            else:
                left = fragments.descriptor_places(int(a[thread]), 64, 16, not transposed[0], tcgen05=False)
                self.shared.begin_matrix_read(left)
            right = fragments.descriptor_places(int(b[thread]), columns, 16, not transposed[1], tcgen05=False)
            self.shared.begin_matrix_read(right)
            scales = bool(np.broadcast_to(scale, self.num_threads)[thread])
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
            left = self.shared.end_matrix_read(left).view(np.uint16).reshape(64, 16)
        right = self.shared.end_matrix_read(product.right).view(np.uint16).reshape(product.columns, 16)
        result = fragments.product(product.convert(left), product.convert(right).T)
        rows, columns = fragments.accumulator_rows_and_columns(len(product.registers))
        parts = result.reshape(4, 16, product.columns)[:, rows, columns]  # (warps, registers, 32)
        threads = slice(128 * product.warpgroup, 128 * product.warpgroup + 128)
        for index, register in enumerate(product.registers):
            values = self.registers[register].copy()
            new = parts[:, index].reshape(-1)
            if product.scale:
                new = new + values[threads].view(np.float32)
            values[threads] = new.view(np.uint32)
            self.registers[register] = values

    def _tcgen05_memory(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        loads = parts[1] == "ld"
        registers = operands[0] if loads else operands[-1]
        addresses = operands[1] if loads else operands[0]
        split = [operand for operand in operands if isinstance(operand, int)]
        threads = mask.reshape(-1, 32)
        if (threads.any(1) != threads.all(1)).any():
            raise NotImplementedError("a tcgen05 load or store by part of a warp")
        words = np.stack([self.registers[register] for register in registers])
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
                self.registers[register] = values

    def _tcgen05_wait(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        self._everyone(mask)
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
        self.shared.write(address[thread : thread + 1], words.view(np.uint8), self.warps[thread : thread + 1])

    def _tcgen05_product(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        if parts[2:] != ("cta_group::1", "kind::f16"):
            raise NotImplementedError(".".join(parts))
        for thread in np.nonzero(mask)[0]:
            values = [int(np.broadcast_to(operand, self.num_threads)[thread]) for operand in operands]
            self._tensor_memory.start(*values)

    def _tcgen05_commit(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        for thread in np.nonzero(mask)[0]:
            barrier, count = self._barrier(int(operands[0][thread])), self._tensor_memory.num_started

            def land(barrier: _Barrier = barrier, count: int = count) -> int:
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


_METHODS: dict[str, Callable[[Machine, tuple[str, ...], tuple[Any, ...], NDArray[np.bool_]], None]] = {
    "cp.async.bulk.tensor": Machine._tensor_copy,
    "cp.async.commit_group": Machine._copy_commit,
    "cp.async.wait_group": Machine._copy_wait,
    "cp.async.c": Machine._copy,
    "mbarrier": Machine._mbarrier,
    "atom": Machine._atomic,
    "ldmatrix": Machine._load_matrix,
    "stmatrix": Machine._store_matrix,
    "mma.sync": Machine._mma,
    "wgmma.mma_async": Machine._wgmma,
    "wgmma.commit_group": Machine._wgmma_commit,
    "wgmma.wait_group": Machine._wgmma_wait,
    "tcgen05.ld": Machine._tcgen05_memory,
    "tcgen05.st": Machine._tcgen05_memory,
    "tcgen05.wait": Machine._tcgen05_wait,
    "tcgen05.alloc": Machine._tcgen05_allocate,
    "tcgen05.dealloc": Machine._tcgen05_allocate,
    "tcgen05.mma": Machine._tcgen05_product,
    "tcgen05.commit": Machine._tcgen05_commit,
}


def run_grid(
    translation: Translation,
    parameters: Sequence[Any],
    memory: GlobalMemory,
    shared_bytes: int,
    grid: tuple[int, int, int],
    checks_fences: bool,
) -> None:
    """Run all programs of a launch, one after another.

    checks_fences: whether matrix instructions may not read what threads wrote with no proxy fence between.
    """
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                Machine(translation, parameters, memory, shared_bytes, (x, y, z), grid, checks_fences).run()
