"""Run one program of a kernel: registers of all threads, shared memory, barriers and copies.

Threads go through the program together; where a branch separates them, those go first that can still come to where the
others are. What is asynchronous happens as late as the program's waits allow: a missing wait leaves NaN, or raises.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.faults import Deadlock, MemoryFault
from virtual_gpu.memory import GlobalMemory
from virtual_gpu.nvidia.barrier import Barrier
from virtual_gpu.nvidia.bulk_stores import BulkStores
from virtual_gpu.nvidia.matrix_unit import MatrixUnit, require_everyone
from virtual_gpu.nvidia.operands import PARAMETER_SPACE, type_of, width_of
from virtual_gpu.nvidia.tensor_map import TensorMap
from virtual_gpu.nvidia.translation import Translation
from virtual_gpu.programs import MAX_STEPS, faults_in, program_number, programs_of
from virtual_gpu.shared_memory import SEVERAL, Pieces, SharedMemory

__all__ = ["Machine", "run_grid"]

BARRIER_BYTES = 8


class Registers(dict[str, NDArray[Any]]):
    """Registers by name, an array with an entry for each thread; those that nobody has written have all bits set."""

    def __init__(self, num_threads: int):
        super().__init__()
        self._num_threads = num_threads

    def __missing__(self, name: str) -> NDArray[Any]:
        kind = type_of(name)
        if kind == "pred":
            self[name] = np.ones(self._num_threads, np.bool_)
        else:
            self[name] = np.full(self._num_threads, (1 << width_of(kind)) - 1, f"u{width_of(kind) // 8}")
        return self[name]


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
        self.program_number = program_number(program, grid)
        self.line = 0
        threads = np.arange(self.num_threads)
        self.warps = threads // 32
        self._all_threads = np.ones(self.num_threads, bool)
        self.first_lane = threads % 32 == 0
        self._special = {"%tid.x": threads.astype("u4"), "%laneid": (threads % 32).astype("u4")}
        for axis in range(3):
            self._special[f"%ctaid.{'xyz'[axis]}"] = self.fill(np.uint32(program[axis]))
            self._special[f"%nctaid.{'xyz'[axis]}"] = self.fill(np.uint32(grid[axis]))
        self.registers = Registers(self.num_threads)
        self._copies: list[list[tuple[Any, Any, Any]]] = [[]]
        """Groups of cp.async: the last one is not committed yet."""
        self._barriers: dict[int, Barrier] = {}
        self._stores = BulkStores(self)
        self._matrices = MatrixUnit(self)
        self.fence_registers = self._matrices.fence_registers

        self.methods: dict[str, Callable[[tuple[str, ...], tuple[Any, ...], NDArray[np.bool_]], None]] = {
            "tensor_copy": self._tensor_copy,
            "copy": self._copy,
            "copy_commit": self._copy_commit,
            "copy_wait": self._copy_wait,
            "mbarrier_init": self._mbarrier_init,
            "mbarrier_inval": self._mbarrier_inval,
            "mbarrier_arrive": self._mbarrier_arrive,
            "mbarrier_wait": self._mbarrier_wait,
            "atomic_add": self._atomic_add,
            **self._stores.methods,
            **self._matrices.methods,
        }
        """By the names that `instruction_set.CALLS` gives them."""

    # Running.

    def run(self) -> None:
        """Run the program to its end.

        Raises:
            MemoryFault, Deadlock, NotImplementedError: with the line of the PTX.
        """
        with faults_in(self.translation.kernel.name, self, "PTX"):
            self._run()
            if any(self._copies) or self._matrices.busy:
                raise MemoryFault("the program ends while copies or products are under way")
            self._stores.end()

    def _run(self) -> None:
        blocks, labels = self.translation.blocks, self.translation.kernel.labels
        waiting: dict[int, Any] = {0: None}
        for _ in range(MAX_STEPS):
            if not waiting:
                return
            number = self.translation.order.first(waiting)
            mask = waiting.pop(number)
            if number == len(blocks):
                continue
            block = blocks[number]
            block.run(self.registers, self, mask)
            branch = block.branch
            if branch is None:
                self._go(waiting, number + 1, mask)
                continue
            target = len(blocks) if branch.parts[0] == "ret" else labels[str(branch.operands[0])]
            if not branch.guard:
                self._go(waiting, target, mask)
                continue
            taken = self.registers[branch.guard]
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

    @staticmethod
    def _go(waiting: dict[int, Any], number: int, mask: Any) -> None:
        if number in waiting:
            mask = waiting[number] | mask
            mask = None if mask.all() else mask
        waiting[number] = mask

    # What the translated code asks for.

    def fill(self, value: Any) -> NDArray[Any]:
        """Return every thread `value`."""
        return np.full(self.num_threads, value)

    def special(self, name: str) -> NDArray[np.uint32]:
        """Return %tid.x, %ctaid.x, ..."""
        return self._special[name]

    def parameter(self, number: int, offset: int, kind: str) -> NDArray[Any]:
        """Return a parameter of the kernel in the bits of `kind`."""
        value = self.parameters[number]
        if isinstance(value, TensorMap) or offset:
            raise NotImplementedError("reading inside a parameter")
        return self.fill(
            np.array(value).astype(f"i{int(kind[1:]) // 8}" if kind[0] == "s" else f"u{int(kind[1:]) // 8}")
        )

    def load(self, space: str, addresses: NDArray[Any], size: int, count: int, mask: Any) -> list[NDArray[Any]]:
        """Return `count` words of `size` bytes to every thread of `mask`."""
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

    def threads(self, mask: Any) -> NDArray[np.bool_]:
        """Write a mask, or None for all threads, out."""
        return self._all_threads if mask is None else np.broadcast_to(mask, self.num_threads)

    def require_warps(self, mask: Any, members: NDArray[np.uint32] | None = None) -> None:
        """Raise unless whole warps run an instruction by which their threads see each other's registers."""
        warps = None if mask is None else mask.reshape(-1, 32)
        if warps is not None and (warps.any(1) != warps.all(1)).any():
            raise NotImplementedError("an exchange between some threads of a warp")
        if members is not None and (members != 0xFFFFFFFF).any():
            raise NotImplementedError("some members of a warp")

    # Copies from global to shared memory.

    def _copy(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        target, source, size, *wanted_size = operands
        if size not in ((16,) if parts[2] == "cg" else (4, 8, 16)) or len(wanted_size) > 1:
            raise NotImplementedError(f"{'.'.join(parts)} of {size} bytes")
        target, source = target[mask], source[mask]
        wanted = np.broadcast_to(wanted_size[0] if wanted_size else size, self.num_threads)[mask]
        values = np.zeros((len(target), size), np.uint8)
        for length in np.unique(wanted):
            if length:
                chosen = wanted == length
                values[chosen, :length] = self.memory.read(source[chosen], int(length), self.program_number)
        places = Pieces.of(target, size, size)
        warps = self.warps[mask]
        self.shared.begin_copy(places, warps)
        self._copies[-1].append((places, values, warps))

    def _copy_commit(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        self._copies.append([])

    def _copy_wait(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        require_everyone(mask)
        groups = self._copies[:-1]
        landing = groups[: len(groups) - operands[0]] if operands[0] else groups
        del self._copies[: len(landing)]
        for group in landing:
            for places, values, warps in group:
                self.shared.land_copy(places, values, warps)
                self.shared.end_copy()

    def _tensor_copy(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        (targets, (maps, coordinates), barriers) = operands
        gathers = "tile::gather4" in parts
        if len(coordinates) != (5 if gathers else int(parts[4][0])):
            raise NotImplementedError(f"{'.'.join(parts)} at {len(coordinates)} coordinates")
        for thread in map(int, np.nonzero(mask)[0]):
            tensor_map, start = self.box_of(maps, coordinates, thread)
            places = tensor_map.places(int(targets[thread]), 4 if gathers else 1)
            values = tensor_map.read(self.memory, self.program_number, start, gathers)
            warp = np.array(self.warps[thread])
            self.shared.begin_bulk_copy(places, warp)
            barrier = self.mbarrier(int(barriers[thread]), thread)

            def land(waiter: int | None, places: Any = places, values: Any = values) -> int:
                self.shared.land_bulk_copy(places, values, waiter)
                return int(values.size)

            barrier.copies.append(land)

    def box_of(self, maps: Any, coordinates: Any, thread: int) -> tuple[TensorMap, list[int]]:
        """Return the descriptor that a thread names, and its box's coordinates."""
        tensor_map = self.parameters[int(maps[thread]) - PARAMETER_SPACE]
        assert isinstance(tensor_map, TensorMap)
        return tensor_map, [int(np.broadcast_to(item, self.num_threads)[thread]) for item in coordinates]

    # Barriers in shared memory.

    def mbarrier(self, address: int, thread: int) -> Barrier:
        """Return the mbarrier that `thread` uses: to its warp this is a read of the barrier's eight bytes."""
        if address not in self._barriers:
            raise MemoryFault(f"there is no initialised mbarrier at {address}")
        self.shared.read(np.array([address]), BARRIER_BYTES, self.warps[thread : thread + 1])
        return self._barriers[address]

    def _write_barrier(self, address: int, thread: int, byte: int) -> None:
        values = np.full((1, BARRIER_BYTES), byte, np.uint8)
        self.shared.write(np.array([address]), values, self.warps[thread : thread + 1])

    def _mbarrier_init(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        addresses, count = operands
        for thread in map(int, np.nonzero(mask)[0]):
            self._write_barrier(int(addresses[thread]), thread, 0)
            self._barriers[int(addresses[thread])] = Barrier(count)

    def _mbarrier_inval(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        (addresses,) = operands
        for thread in map(int, np.nonzero(mask)[0]):
            address = int(addresses[thread])
            if self.mbarrier(address, thread).copies:
                raise MemoryFault("an mbarrier ends while copies that it counts are under way")
            self._write_barrier(address, thread, 0xFF)
            del self._barriers[address]

    def _mbarrier_arrive(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        _, addresses, num_bytes = operands
        for thread in map(int, np.nonzero(mask)[0]):
            self.mbarrier(int(addresses[thread]), thread).arrive(num_bytes)

    def _mbarrier_wait(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        result, addresses, parity = operands
        threads = np.nonzero(mask)[0]
        parities = np.broadcast_to(parity, self.num_threads)
        warps, first = np.unique(self.warps[threads], return_index=True)
        waiter = None if len(threads) == self.num_threads else int(warps[0]) if len(warps) == 1 else SEVERAL
        if (addresses[threads] == addresses[threads[0]]).all() and (parities[threads] == parities[threads[0]]).all():
            threads = threads[first]  # the others of a warp wait for the same
        for thread in map(int, threads):
            self.mbarrier(int(addresses[thread]), thread).wait(int(parities[thread]) & 1, waiter)
        self.registers[result] = np.ones(self.num_threads, bool)

    def _atomic_add(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        result, addresses, amount = operands
        amounts = np.broadcast_to(amount, self.num_threads).astype("u4")[mask]
        words = self.shared.data.view(np.uint32)
        old = np.empty(len(amounts), np.uint32)
        for thread, word in enumerate(self.shared.begin_atomic(addresses[mask], self.warps[mask])):
            old[thread] = words[word]
            words[word] += amounts[thread]
        if result is not None:
            self.registers[result] = self.registers[result].copy()
            self.registers[result][mask] = old


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
    for program in programs_of(grid):
        Machine(translation, parameters, memory, shared_bytes, program, grid, checks_fences).run()
