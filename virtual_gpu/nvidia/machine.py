"""Run one program of a kernel: registers of all threads, shared memory, barriers and copies.

Threads go through the program together; where a branch separates them, those go first that can still come to where the
others are. What is asynchronous happens as late as the program's waits allow: a missing wait leaves NaN, or raises.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.faults import Deadlock, MemoryFault
from virtual_gpu.memory import GlobalMemory, SharedMemory
from virtual_gpu.nvidia.barrier import Barrier
from virtual_gpu.nvidia.matrix_unit import MatrixUnit, require_everyone
from virtual_gpu.nvidia.operands import PARAMETER_SPACE
from virtual_gpu.nvidia.tensor_map import TensorMap
from virtual_gpu.nvidia.translation import Translation
from virtual_gpu.programs import MAX_STEPS, faults_in, program_number, programs_of

__all__ = ["Machine", "run_grid"]


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
        self._barriers: dict[int, Barrier] = {}
        self._matrices = MatrixUnit(self)

        self._methods: dict[str, Callable[[tuple[str, ...], tuple[Any, ...], NDArray[np.bool_]], None]] = {
            "cp.async.bulk.tensor": self._tensor_copy,
            "cp.async.commit_group": self._copy_commit,
            "cp.async.wait_group": self._copy_wait,
            "cp.async.c": self._copy,
            "mbarrier": self._mbarrier,
            "atom": self._atomic,
            **self._matrices.methods,
        }
        """By the beginning of an instruction's name."""

    # Running.

    def run(self) -> None:
        """Run the program to its end.

        Raises:
            MemoryFault, Deadlock, NotImplementedError: with the line of the PTX.
        """
        with faults_in(self.translation.kernel.name, self, "PTX"):
            self._run()
        if any(self._copies) or self._matrices.busy:
            raise MemoryFault(f"{self.translation.kernel.name} ends while copies or products are under way")

    def _run(self) -> None:
        blocks, labels = self.translation.blocks, self.translation.kernel.labels
        numbers = self.translation.registers
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
        for prefix, method in self._methods.items():
            if name.startswith(prefix):
                method(parts, operands, everyone)
                return
        raise NotImplementedError(name)

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

    def _tensor_copy(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        (targets, (maps, coordinates), barriers) = operands
        for thread in map(int, np.nonzero(mask)[0]):
            tensor_map = self.parameters[int(maps[thread]) - PARAMETER_SPACE]
            assert isinstance(tensor_map, TensorMap)
            start = [int(np.broadcast_to(item, self.num_threads)[thread]) for item in coordinates]
            gathers = "tile::gather4" in parts
            places, values = tensor_map.read(self.memory, self.program_number, int(targets[thread]), start, gathers)
            warp = np.array(self.warps[thread])
            self.shared.begin_copy(places, warp)
            barrier = self.mbarrier(int(barriers[thread]), thread)

            def land(places: Any = places, values: Any = values) -> int:
                self.shared.land_copy(places, values, None)
                return int(places.size)

            barrier.copies.append(land)

    # Barriers in shared memory.

    def mbarrier(self, address: int, thread: int) -> Barrier:
        """Give the mbarrier that `thread` uses."""
        if address not in self._barriers:
            raise MemoryFault(f"there is no initialised mbarrier at {address}")
        barrier = self._barriers[address]
        if barrier.made[1] == self.shared.epoch and barrier.made[0] != self.warps[thread]:
            raise MemoryFault("an mbarrier is used by another warp than initialised it, with no barrier between")
        return barrier

    def _mbarrier(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        addresses = operands[0] if parts[1] in ("init", "inval") else operands[1]
        for thread in map(int, np.nonzero(mask)[0]):
            address = int(addresses[thread])
            if parts[1] == "init":
                self._barriers[address] = Barrier(operands[1], (int(self.warps[thread]), self.shared.epoch))
            elif parts[1] == "inval":
                barrier = self.mbarrier(address, thread)
                if barrier.copies:
                    raise MemoryFault("an mbarrier ends while copies that it counts are under way")
                del self._barriers[address]
            elif parts[1] == "arrive":
                self.mbarrier(address, thread).arrive(operands[2] if "expect_tx" in parts else 0)
            elif parts[1] == "try_wait":
                self.mbarrier(address, thread).wait(int(np.broadcast_to(operands[2], self.num_threads)[thread]) & 1)
            else:
                raise NotImplementedError(".".join(parts))
        if parts[1] == "try_wait":
            self.registers[operands[0]] = np.ones(self.num_threads, bool)

    def _atomic(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        if parts[-2:] != ("add", "u32") or "shared" not in parts:
            raise NotImplementedError(".".join(parts))
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
