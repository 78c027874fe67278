"""Loads and stores of a program's wavefronts: what they bring is there once an s_waitcnt has made sure of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.amd import fragments
from virtual_gpu.amd.fragments import LANES
from virtual_gpu.amd.operands import M0
from virtual_gpu.amd.registers import Flags, Registers, Words
from virtual_gpu.memory import GlobalMemory
from virtual_gpu.shared_memory import Pieces, SharedMemory

__all__ = ["MemoryUnit"]

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
    shared: tuple[Pieces, NDArray[np.intp], bool] | None = None
    """Pieces of shared memory, the wave of each lane, and whether they are written."""
    copied: NDArray[np.uint8] | None = None
    """What a copy to shared memory brings there."""


class MemoryUnit:
    """Global and shared memory as the wavefronts of one program (numbered from 1) reach them."""

    def __init__(self, registers: Registers, memory: GlobalMemory, shared_bytes: int, program_number: int):
        self._registers, self._memory, self._program_number = registers, memory, program_number
        self.shared = SharedMemory(shared_bytes)
        self._waves = np.repeat(np.arange(registers.num_waves)[:, None], LANES, 1)
        self._vector_memory: list[_Pending] = []
        """What vmcnt counts."""
        self._local_memory: list[_Pending] = []
        """What lgkmcnt counts: shared memory in order, scalar loads in none."""

    def pass_barrier(self) -> None:
        """Order what has been waited for; what is still under way stays unordered."""
        self.shared.barrier()
        for pending in self._local_memory:
            if pending.shared is not None:
                places, waves, writes = pending.shared
                left = pending.waves[waves, 0]
                self.shared.leave_unordered(places[left], waves[left], writes)

    def _expect(
        self, queue: list[_Pending], active: Any, lanes: Any = True, number: int = 0, values: Any = None, **more: Any
    ) -> None:
        """Begin a memory instruction; `values` (registers, waves, 64) come to its registers later."""
        waves = np.broadcast_to(active, (self._registers.num_waves, 1)).copy()
        registers = None if values is None else list(self._registers.vectors[number : number + len(values)])
        for register in registers or ():
            np.copyto(register, np.uint32(0xFFFFFFFF), where=lanes)
        queue.append(_Pending(waves, registers, values, lanes, **more))

    def wait(self, vector_count: int, local_count: int, active: Any) -> None:
        """End memory instructions, the oldest first, until no more than these counts are left of either kind."""
        self._wait(self._vector_memory, vector_count, active)
        self._wait(self._local_memory, local_count, active)

    def _wait(self, queue: list[_Pending], allowed: int, active: Any) -> None:
        if len(queue) <= allowed:
            return
        newer = np.zeros((self._registers.num_waves, 1), np.int64)
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
            self.shared.land_copy(places[chosen], pending.copied[chosen], owners[chosen])
        if pending.registers is not None and pending.values is not None:
            where = waves if pending.lanes is True else pending.lanes & waves
            for register, values in zip(pending.registers, pending.values, strict=True):
                np.copyto(register, values, where=where)

    def scalar_load(self, number: int, count: int, addresses: NDArray[np.uint64], active: Any) -> None:
        """Load `count` words for each wave."""
        waves = np.broadcast_to(active, (self._registers.num_waves, 1))[:, 0]
        places = (addresses & ~np.uint64(3)) + np.arange(0, 4 * count, 4, dtype=np.uint64)
        values = np.zeros((self._registers.num_waves, count), np.uint32)
        found = self._memory.read(places[waves].reshape(-1), 4, self._program_number)
        values[waves] = found.view(np.uint32).reshape(-1, count)
        registers = [self._registers.scalars[number + index] for index in range(count)]
        for register in registers:
            np.copyto(register, np.uint32(0xFFFFFFFF), where=active)
        self._local_memory.append(
            _Pending(waves[:, None].copy(), registers, np.ascontiguousarray(values.T)[:, :, None], scalar=True)
        )

    def buffer(
        self, offsets: Any, resource: int, start: Any, offset: int, size: int, lanes: Any
    ) -> tuple[NDArray[np.uint64], Any]:
        """Return the addresses of a buffer's elements, and which lanes run and are inside it."""
        words = self._registers.scalars
        low, upper, num_bytes = words[resource], words[resource + 1], words[resource + 2]
        running = self._registers.everyone(lanes)
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
        inside, lanes = self._registers.everyone(inside), self._registers.everyone(lanes)
        found = np.zeros((self._registers.num_waves, LANES, max(size, 4)), np.uint8)
        found[inside, :size] = self._memory.read(addresses[inside], size, self._program_number, min(size, 4))
        if number is not None:
            values = np.ascontiguousarray(found.view(np.uint32).transpose(2, 0, 1))
            self._expect(self._vector_memory, active, lanes, number, values)
            return
        base = self._registers.scalars[M0].astype(np.int64)
        lanes = lanes & (base != NOWHERE)
        starts = (base + offset + size * np.arange(LANES))[lanes]
        places = Pieces.of(starts, size, 4)
        owners = self._waves[lanes]
        self.shared.begin_copy(places, owners)
        self._expect(self._vector_memory, active, shared=(places, owners, True), copied=found[lanes][:, :size])

    def store(
        self, number: int, size: int, addresses: NDArray[np.uint64], inside: Any, active: Any, shift: int
    ) -> None:
        """Store `size` bytes of each lane inside, from byte `shift` of the registers on."""
        inside = self._registers.everyone(inside)
        words = self._registers.vectors[number : number + (size + 3) // 4]
        values = np.ascontiguousarray(words.transpose(1, 2, 0)[inside]).view(np.uint8)[:, shift : shift + size]
        self._memory.write(addresses[inside], values, self._program_number, min(size, 4))
        self._expect(self._vector_memory, active)

    def shared_read(
        self,
        number: int,
        size: int,
        addresses: Words,
        offsets: tuple[int, ...],
        transposes: bool,
        is_signed: bool,
        lanes: Any,
        active: Any,
    ) -> None:
        """Load `size` bytes at each offset from shared memory; transposes: as DS_READ_B64_TR_B16.

        is_signed: fill a register with the sign of what is smaller.
        """
        running = self._registers.everyone(lanes)
        owners = self._waves[running]
        registers = max(size // 4, 1)
        values = np.zeros((registers * len(offsets), self._registers.num_waves, LANES), np.uint32)
        all_places = []
        for index, offset in enumerate(offsets):
            starts = np.broadcast_to(addresses, running.shape)[running].astype(np.uint64) + np.uint64(offset)
            found = np.zeros((self._registers.num_waves, LANES, max(size, 4)), np.uint8)
            found[running, :size] = self.shared.read(starts, size, owners, min(size, 4))
            if is_signed:
                found = np.ascontiguousarray(found[:, :, :size]).view(f"i{size}").astype(np.int32).view(np.uint8)
            if transposes:
                if not (running == self._registers.everyone(active)).all():
                    raise NotImplementedError("a transposition of some lanes of a wave")
                found = np.ascontiguousarray(fragments.transposed(found.view(np.uint16))).view(np.uint8)
            values[registers * index : registers * (index + 1)] = found.view(np.uint32).transpose(2, 0, 1)
            all_places.append(Pieces.of(starts, size, min(size, 4)))
        shared = _joined(all_places), owners, False
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
        running = self._registers.everyone(lanes)
        owners = self._waves[running]
        all_places = []
        for number, offset in zip(numbers, offsets, strict=True):
            starts = np.broadcast_to(addresses, running.shape)[running].astype(np.uint64) + np.uint64(offset)
            words = self._registers.vectors[number : number + (size + 3) // 4].transpose(1, 2, 0)[running]
            values = np.ascontiguousarray(words).view(np.uint8)[:, shift : shift + size]
            self.shared.write(starts, values, owners, min(size, 4))
            all_places.append(Pieces.of(starts, size, min(size, 4)))
        shared = _joined(all_places), owners, True
        self._expect(self._local_memory, active, shared=shared)

    def shared_atomic(
        self, function: np.ufunc, addresses: Words, offset: int, values: Any, lanes: Any, active: Any
    ) -> None:
        """Update words of shared memory by each lane's value; atomic ones have no order to keep among themselves."""
        running = self._registers.everyone(lanes)
        starts = np.broadcast_to(addresses, running.shape)[running].astype(np.int64) + offset
        words = self.shared.begin_atomic(starts.astype(np.uint64), self._waves[running])
        function.at(self.shared.data.view(np.uint32), words, np.broadcast_to(values, running.shape)[running])
        self._expect(self._local_memory, active)

    def permute(self, number: int, addresses: Words, values: Words, offset: int, lanes: Any, active: Any) -> None:
        """Return each lane the value of the lane at a byte address; 0 where that one doesn't run."""
        sources = (
            (np.broadcast_to(addresses, (self._registers.num_waves, LANES)).astype(np.int64) + offset) // 4 % LANES
        )
        values = np.where(lanes, values, np.uint32(0))
        self._expect(self._local_memory, active, lanes, number, np.take_along_axis(values, sources, 1)[None])


def _joined(pieces: Sequence[Pieces]) -> Pieces:
    """Return all pieces of each lane in one row."""
    return Pieces(np.concatenate([one.numbers.reshape(len(one.numbers), -1) for one in pieces], 1), pieces[0].unit)
