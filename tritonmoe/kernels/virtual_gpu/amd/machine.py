"""Run one program of an AMD kernel: the registers of all wavefronts, its shared memory (LDS), barriers and waits.

Wavefronts at the same block run it together; of several blocks the one that comes before the others goes first. What
a load brings is in its registers only once an s_waitcnt has made sure of it: a missing wait leaves NaN.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arithmetic import from_bfloat16
from ..faults import Deadlock, MemoryFault
from ..memory import GlobalMemory, SharedMemory
from . import fragments
from .fragments import LANES
from .operations import bits_of_mask, mask_of_bits
from .translation import ACCUMULATORS, EXEC, M0, VCC, Translation

__all__ = ["Machine", "run_grid"]

MAX_STEPS = 1_000_000
"""Blocks that one program may run: more is taken for a loop that never ends."""
Flags = NDArray[np.bool_]
Words = NDArray[np.uint32]
_WAITS = "s_barrier"
NOWHERE = 0x7FFFFFFF
"""Where Triton lets waves copy to that have nothing to copy: the hardware drops what is outside shared memory."""


@dataclass
class _Pending:
    """A memory instruction that waves (waves, 1) have started and not waited for."""

    waves: Flags
    registers: list[Words] | None = None
    """Views of the registers to fill."""
    values: Words | None = None
    lanes: Any = True
    scalar: bool = False
    shared: tuple[NDArray[np.intp], NDArray[np.intp], bool] | None = None
    """Bytes of shared memory, the wave of each, and whether they are written."""
    copied: NDArray[np.uint8] | None = None
    """What a copy to shared memory brings there."""


class Machine:
    """The state of one program."""

    def __init__(
        self,
        translation: Translation,
        arguments: NDArray[np.uint8],
        memory: GlobalMemory,
        shared_bytes: int,
        program: tuple[int, int, int],
        grid: tuple[int, int, int],
    ):
        kernel = translation.kernel
        self.translation, self.memory = translation, memory
        self.num_waves = kernel.num_threads // LANES
        self.shared = SharedMemory(shared_bytes)
        self.program_number = 1 + program[0] + grid[0] * (program[1] + grid[1] * program[2])
        self.line = 0
        self._waves = np.repeat(np.arange(self.num_waves)[:, None], LANES, 1)
        vectors = np.full((2 * ACCUMULATORS, self.num_waves, LANES), 0xFFFFFFFF, np.uint32)  # NaN
        scalars = np.full((self.num_waves, EXEC + 2), 0xFFFFFFFF, np.uint32)
        self._vectors, self._scalars = vectors, scalars
        columns = range(EXEC + 1)
        self._scc = np.zeros((self.num_waves, 1), np.bool_)
        self.views = (
            list(vectors),
            list(vectors.view("i4")),
            list(vectors.view("f4")),
            [scalars[:, i : i + 1] for i in range(EXEC + 2)],
            [scalars[:, i : i + 1].view("i4") for i in range(EXEC + 2)],
            [scalars[:, i : i + 1].view("f4") for i in range(EXEC + 2)],
            [scalars[:, i : i + 2].view("u8") for i in columns],
            [scalars[:, i : i + 2].view("u1") for i in columns],
            self._scc,
        )
        self._start(arguments, program)
        self._vector_memory: list[_Pending] = []
        """What vmcnt counts."""
        self._local_memory: list[_Pending] = []
        """What lgkmcnt counts: shared memory in order, scalar loads in none."""

    def _start(self, arguments: NDArray[np.uint8], program: tuple[int, int, int]) -> None:
        """Set the registers that hold something at the start."""
        directives, scalars = self.translation.kernel.directives, self._scalars
        if directives["user_sgpr_kernarg_segment_ptr"] != 1 or directives["private_segment_fixed_size"]:
            raise NotImplementedError("a kernel without arguments, or with memory of each thread's own")
        number = 2 * (directives["user_sgpr_dispatch_ptr"] + directives["user_sgpr_queue_ptr"])
        scalars[:, number : number + 2] = np.array([arguments.ctypes.data], np.uint64).view(np.uint32)
        number += 2 + 2 * directives["user_sgpr_dispatch_id"]
        words = arguments.view(np.uint32)[directives["user_sgpr_kernarg_preload_offset"] :]
        length = directives["user_sgpr_kernarg_preload_length"]
        scalars[:, number : number + length] = words[:length]
        number += length
        if number > directives["user_sgpr_count"]:
            raise NotImplementedError("more user registers than are counted")
        number = directives["user_sgpr_count"]
        for axis in range(3):
            if directives[f"system_sgpr_workgroup_id_{'xyz'[axis]}"]:
                scalars[:, number] = program[axis]
                number += 1
        self._vectors[0] = np.arange(self.num_waves * LANES).reshape(-1, LANES)

    # Running.

    def run(self) -> None:
        """Run the program to its end.

        Raises:
            MemoryFault, Deadlock, NotImplementedError: with the line of the assembly.
        """
        try:
            with np.errstate(all="ignore"):
                self._run()
        except (MemoryFault, Deadlock, NotImplementedError) as error:
            place = f"{self.translation.kernel.name}, line {self.line} of its assembly"
            raise type(error)(f"{place}: {error}") from error

    def _run(self) -> None:
        blocks, labels = self.translation.blocks, self.translation.kernel.labels
        order = np.array([*self.translation.order, len(blocks)])
        position = np.full(self.num_waves, self.translation.kernel.entry)
        waiting = np.zeros(self.num_waves, np.bool_)
        for _ in range(MAX_STEPS):
            running = (position < len(blocks)) & ~waiting
            if not running.any():
                if not waiting.any():
                    return
                self._pass_barrier()
                waiting[:] = False
                continue
            number = int(position[running][np.argmin(order[position[running]])])
            active = running & (position == number)
            block = blocks[number]
            block.run(self, True if active.all() else active[:, None])
            branch = block.branch
            name = branch.name if branch else ""
            position[active] = number + 1
            if name == _WAITS:
                waiting |= active
            elif name == "s_endpgm":
                position[active] = len(blocks)
            elif branch is not None:
                position[active & self._taken(name)] = labels[branch.operands[0]]
        raise Deadlock(f"{MAX_STEPS} blocks have run: the program doesn't end")

    def _taken(self, name: str) -> Flags:
        """Give the waves for which the condition of a branch holds."""
        if name == "s_branch":
            return np.ones(self.num_waves, np.bool_)
        condition = name.removeprefix("s_cbranch_")
        if condition in ("scc0", "scc1"):
            return self._scc[:, 0] == (condition == "scc1")
        register = {"vcc": VCC, "exec": EXEC}[condition.rstrip("nz")]
        return (self.views[6][register][:, 0] == 0) ^ condition.endswith("nz")

    def _pass_barrier(self) -> None:
        self.shared.barrier()
        for pending in self._local_memory:
            if pending.shared is not None:
                places, waves, writes = pending.shared
                left = pending.waves[waves, 0]
                self.shared.leave_unordered(places[left], waves[left], writes)

    # What the translated code asks for: lanes, masks and registers.

    def lanes(self, active: Any) -> Any:
        """Give the lanes (waves, 64) that instructions run on; True where all do."""
        mask = mask_of_bits(self.views[7][EXEC])
        if active is not True:
            mask &= active
        return True if mask.all() else mask

    def _everyone(self, lanes: Any) -> Flags:
        return np.broadcast_to(lanes, (self.num_waves, LANES))

    def put_mask(self, number: int, mask: Flags, lanes: Any, active: Any) -> None:
        """Store lanes as the bits of a pair of scalar registers; 0 for lanes that don't run."""
        if number >= EXEC - 1:
            raise NotImplementedError("a comparison into exec")
        mask = np.broadcast_to(mask & lanes, (self.num_waves, LANES))
        np.copyto(self.views[7][number], bits_of_mask(mask), where=active)

    def put_pair(self, number: int, values: NDArray[np.uint64], lanes: Any) -> None:
        """Store 64-bit words in two vector registers."""
        np.copyto(self._vectors[number], values.astype(np.uint32), where=lanes)
        np.copyto(self._vectors[number + 1], (values >> np.uint64(32)).astype(np.uint32), where=lanes)

    def first_lane(self, values: Words, lanes: Any) -> Words:
        """Give the value of each wave's first lane that runs; of lane 0 if none does."""
        first = self._everyone(lanes).argmax(1)
        return values[np.arange(self.num_waves), first][:, None]

    def dpp(self, values: Words, control: str, lanes: Any) -> Words:
        """Give each lane the value of another one; 0 where there is none or it doesn't run."""
        sources, exist = fragments.dpp_sources(control)
        taken = values[:, sources]
        return np.where(exist & (True if lanes is True else lanes[:, sources]), taken, np.uint32(0))

    def swap_lanes(self, left: int, right: int, width: int, lanes: Any, active: Any) -> None:
        """Exchange the odd groups of `width` lanes in one register with the even groups in another."""
        if not (self._everyone(lanes) == self._everyone(active)).all():
            raise NotImplementedError("an exchange between some lanes of a wave")
        a, b = (self._vectors[number].reshape(self.num_waves, -1, 2, width) for number in (left, right))
        odd, even = a[:, :, 1].copy(), b[:, :, 0].copy()
        where = active if active is True else active[:, None]
        np.copyto(a[:, :, 1], even, where=where)
        np.copyto(b[:, :, 0], odd, where=where)

    def permute(self, number: int, addresses: Words, values: Words, offset: int, lanes: Any, active: Any) -> None:
        """Give each lane the value of the lane at a byte address; 0 where that one doesn't run."""
        sources = (np.broadcast_to(addresses, (self.num_waves, LANES)).astype(np.int64) + offset) // 4 % LANES
        values = np.where(lanes, values, np.uint32(0))
        self._expect(self._local_memory, active, lanes, number, np.take_along_axis(values, sources, 1)[None])

    # Memory.

    def _expect(
        self, queue: list[_Pending], active: Any, lanes: Any = True, number: int = 0, values: Any = None, **more: Any
    ) -> None:
        """Begin a memory instruction; `values` (registers, waves, 64) come to its registers later."""
        waves = np.broadcast_to(active, (self.num_waves, 1)).copy()
        registers = None if values is None else list(self._vectors[number : number + len(values)])
        for register in registers or ():
            np.copyto(register, np.uint32(0xFFFFFFFF), where=lanes)
        queue.append(_Pending(waves, registers, values, lanes, **more))

    def wait(self, vector_count: int, local_count: int, active: Any) -> None:
        """Let memory instructions end, the oldest first, until no more than these counts are left of either kind."""
        self._wait(self._vector_memory, vector_count, active)
        self._wait(self._local_memory, local_count, active)

    def _wait(self, queue: list[_Pending], allowed: int, active: Any) -> None:
        if len(queue) <= allowed:
            return
        newer = np.zeros((self.num_waves, 1), np.int64)
        ending = []
        for pending in reversed(queue):
            if pending.scalar and allowed:
                continue  # in any order: it may be the last
            waves = pending.waves & active & (newer >= allowed)
            newer += pending.waves
            if waves.any():
                ending.append((pending, waves))
        for pending, waves in reversed(ending):
            self._end(pending, waves)
            pending.waves = pending.waves & ~waves
        queue[:] = [pending for pending in queue if pending.waves.any()]

    def _end(self, pending: _Pending, waves: Flags) -> None:
        if pending.copied is not None and pending.shared is not None:
            places, owners, _ = pending.shared
            chosen = waves[owners, 0]
            self.shared.land_copy(places[chosen], pending.copied[chosen], owners[chosen, None])
        if pending.registers is not None and pending.values is not None:
            where = waves if pending.lanes is True else pending.lanes & waves
            for register, values in zip(pending.registers, pending.values, strict=True):
                np.copyto(register, values, where=where)

    def scalar_load(self, number: int, count: int, addresses: NDArray[np.uint64], active: Any) -> None:
        """Load `count` words for each wave."""
        waves = np.broadcast_to(active, (self.num_waves, 1))[:, 0]
        places = (addresses & ~np.uint64(3)) + np.arange(0, 4 * count, 4, dtype=np.uint64)
        values = np.zeros((self.num_waves, count), np.uint32)
        found = self.memory.read(places[waves].reshape(-1), 4, self.program_number)
        values[waves] = found.view(np.uint32).reshape(-1, count)
        registers = [self.views[3][number + index] for index in range(count)]
        for register in registers:
            np.copyto(register, np.uint32(0xFFFFFFFF), where=active)
        self._local_memory.append(
            _Pending(waves[:, None].copy(), registers, np.ascontiguousarray(values.T)[:, :, None], scalar=True)
        )

    def buffer(
        self, offsets: Any, resource: int, start: Any, offset: int, size: int, lanes: Any
    ) -> tuple[NDArray[np.uint64], Any]:
        """Give the addresses of a buffer's elements, and which lanes run and are inside it."""
        words = self.views[3]
        low, upper, num_bytes = words[resource], words[resource + 1], words[resource + 2]
        running = self._everyone(lanes)
        if (upper[running.any(1)] >> 16).any():
            raise NotImplementedError("a buffer of records")
        base = low.astype(np.uint64) | ((upper & np.uint32(0xFFFF)).astype(np.uint64) << np.uint64(32))
        places = np.broadcast_to(np.asarray(offsets).astype(np.uint64) + offset, running.shape)
        limit = num_bytes.astype(np.int64) - start
        inside = running & (places.astype(np.int64) + size <= limit)
        if (running & ~inside & (places.astype(np.int64) < limit)).any():
            raise NotImplementedError("an access partly outside a buffer")
        return base + start + places, inside

    def load(
        self,
        number: int | None,
        size: int,
        addresses: NDArray[np.uint64],
        inside: Any,
        lanes: Any,
        active: Any,
        offset: int,
    ) -> None:
        """Load `size` bytes a lane, 0 for those not inside, to registers or (number None) to shared memory at M0."""
        inside, lanes = self._everyone(inside), self._everyone(lanes)
        found = np.zeros((self.num_waves, LANES, max(size, 4)), np.uint8)
        found[inside, :size] = self.memory.read(addresses[inside], size, self.program_number, min(size, 4))
        if number is not None:
            values = np.ascontiguousarray(found.view(np.uint32).transpose(2, 0, 1))
            self._expect(self._vector_memory, active, lanes, number, values)
            return
        base = self.views[3][M0].astype(np.int64)
        lanes = lanes & (base != NOWHERE)
        starts = (base + offset + size * np.arange(LANES))[lanes]
        if (starts % 4).any():
            raise MemoryFault("a copy to shared memory is not aligned to 4 bytes")
        places = starts[:, None] + np.arange(size)
        owners = self._waves[lanes]
        self.shared.begin_copy(places, owners[:, None])
        self._expect(self._vector_memory, active, shared=(places, owners, True), copied=found[lanes][:, :size])

    def store(
        self, number: int, size: int, addresses: NDArray[np.uint64], inside: Any, active: Any, shift: int
    ) -> None:
        """Store `size` bytes of each lane inside, from byte `shift` of the registers on."""
        inside = self._everyone(inside)
        words = self._vectors[number : number + (size + 3) // 4]
        values = np.ascontiguousarray(words.transpose(1, 2, 0)[inside]).view(np.uint8)[:, shift : shift + size]
        self.memory.write(addresses[inside], values, self.program_number, min(size, 4))
        self._expect(self._vector_memory, active)

    def shared_read(
        self,
        number: int,
        size: int,
        addresses: Words,
        offsets: tuple[int, ...],
        transposes: bool,
        lanes: Any,
        active: Any,
    ) -> None:
        """Load `size` bytes at each offset from shared memory; transposes: as DS_READ_B64_TR_B16."""
        running = self._everyone(lanes)
        owners = self._waves[running]
        registers = max(size // 4, 1)
        values = np.zeros((registers * len(offsets), self.num_waves, LANES), np.uint32)
        all_places = []
        for index, offset in enumerate(offsets):
            starts = np.broadcast_to(addresses, running.shape)[running].astype(np.int64) + offset
            found = np.zeros((self.num_waves, LANES, max(size, 4)), np.uint8)
            found[running, :size] = self.shared.read(starts, size, owners, min(size, 4))
            if transposes:
                if not (running == self._everyone(active)).all():
                    raise NotImplementedError("a transposition of some lanes of a wave")
                found = np.ascontiguousarray(fragments.transposed(found.view(np.uint16))).view(np.uint8)
            values[registers * index : registers * (index + 1)] = found.view(np.uint32).transpose(2, 0, 1)
            all_places.append(starts[:, None] + np.arange(size))
        shared = np.concatenate(all_places, 1), owners, False
        self._expect(self._local_memory, active, lanes, number, values, shared=shared)

    def shared_write(
        self,
        numbers: Sequence[int],
        size: int,
        addresses: Words,
        offsets: tuple[int, ...],
        shift: int,
        lanes: Any,
        active: Any,
    ) -> None:
        """Store `size` bytes of each register (or the first of several) to shared memory at its offset."""
        running = self._everyone(lanes)
        owners = self._waves[running]
        all_places = []
        for number, offset in zip(numbers, offsets, strict=True):
            starts = np.broadcast_to(addresses, running.shape)[running].astype(np.int64) + offset
            words = self._vectors[number : number + (size + 3) // 4].transpose(1, 2, 0)[running]
            values = np.ascontiguousarray(words).view(np.uint8)[:, shift : shift + size]
            self.shared.write(starts, values, owners, min(size, 4))
            all_places.append(starts[:, None] + np.arange(size))
        shared = np.concatenate(all_places, 1), owners, True
        self._expect(self._local_memory, active, shared=shared)

    def shared_atomic(
        self, function: np.ufunc, addresses: Words, offset: int, values: Any, lanes: Any, active: Any
    ) -> None:
        """Update words of shared memory by each lane's value; atomic ones have no order to keep among themselves."""
        running = self._everyone(lanes)
        starts = np.broadcast_to(addresses, running.shape)[running].astype(np.int64) + offset
        if (starts % 4).any() or (starts < 0).any() or (starts >= len(self.shared.data)).any():
            raise MemoryFault("an atomic operation outside shared memory, or not aligned to 4 bytes")
        function.at(self.shared.data.view(np.uint32), starts // 4, np.broadcast_to(values, running.shape)[running])
        self._expect(self._local_memory, active)

    # Matrices.

    def matrix_product(
        self,
        operands: tuple[int, tuple[int, int], tuple[int, int], int | None],
        size: int,
        depth: int,
        kind: str,
        active: Any,
    ) -> None:
        """Run V_MFMA: all lanes take part, whatever EXEC says."""
        result, a, b, start = operands
        decode, element = _ELEMENTS[kind]
        left, right = (
            decode(fragments.operand_matrix(self._vectors[first : first + count], element, size))
            for first, count in (a, b)
        )
        if left.shape[2] != depth:
            raise NotImplementedError(f"operands of {a[1]} registers")
        values = fragments.accumulator_registers(left @ right.transpose(0, 2, 1))
        floats = self._vectors.view(np.float32)
        if start is not None:
            values = values + floats[start : start + len(values)]
        np.copyto(floats[result : result + len(values)], values, where=active)


_ELEMENTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bf16": (from_bfloat16, "u2"),
    "f16": (lambda values: values.astype(np.float32), "f2"),
    "f32": (lambda values: values, "f4"),
}


def run_grid(
    translation: Translation,
    arguments: NDArray[np.uint8],
    memory: GlobalMemory,
    shared_bytes: int,
    grid: tuple[int, int, int],
) -> None:
    """Run all programs of a launch, one after another, with the bytes of the argument segment."""
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                Machine(translation, arguments, memory, shared_bytes, (x, y, z), grid).run()
