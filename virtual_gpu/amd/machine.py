"""Run one program of an AMD kernel: its wavefronts take turns, and wait for each other at barriers.

Wavefronts at the same block run it together; of several blocks one that the others don't lead to goes first.
"""

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.amd.memory_unit import MemoryUnit
from virtual_gpu.amd.operands import EXEC, VCC
from virtual_gpu.amd.registers import Flags, Registers
from virtual_gpu.amd.translation import Translation
from virtual_gpu.faults import Deadlock
from virtual_gpu.memory import GlobalMemory
from virtual_gpu.programs import MAX_STEPS, faults_in, program_number, programs_of

__all__ = ["Machine", "run_grid"]


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
        self.translation = translation
        self.line = 0
        self.registers = Registers(translation.kernel, arguments, program)
        self.memory_unit = MemoryUnit(self.registers, memory, shared_bytes, program_number(program, grid))

    def run(self) -> None:
        """Run the program to its end.

        Raises:
            MemoryFault, Deadlock, NotImplementedError: with the line of the assembly.
        """
        with faults_in(self.translation.kernel.name, self, "assembly"):
            self._run()

    def _run(self) -> None:
        blocks, labels = self.translation.blocks, self.translation.kernel.labels
        position = np.full(self.registers.num_waves, self.translation.kernel.entry)
        waiting = np.zeros(self.registers.num_waves, np.bool_)
        for _ in range(MAX_STEPS):
            running = (position < len(blocks)) & ~waiting
            if not running.any():
                if not waiting.any():
                    return
                self.memory_unit.pass_barrier()
                waiting[:] = False
                continue
            number = self.translation.order.first(set(position[running].tolist()))
            active = running & (position == number)
            block = blocks[number]
            block.run(self, True if active.all() else active[:, None])
            branch = block.branch
            name = branch.name if branch else ""
            position[active] = number + 1
            if name == "s_barrier":
                waiting |= active
            elif name == "s_endpgm":
                position[active] = len(blocks)
            elif branch is not None:
                position[active & self._taken(name)] = labels[branch.operands[0]]
        raise Deadlock(f"{MAX_STEPS} blocks have run: the program doesn't end")

    def _taken(self, name: str) -> Flags:
        """Return the waves for which the condition of a branch holds."""
        if name == "s_branch":
            return np.ones(self.registers.num_waves, np.bool_)
        condition = name.removeprefix("s_cbranch_")
        if condition in ("scc0", "scc1"):
            return self.registers.condition[:, 0] == (condition == "scc1")
        register = {"vcc": VCC, "exec": EXEC}[condition.rstrip("nz")]
        return (self.registers.pairs[register][:, 0] == 0) ^ condition.endswith("nz")


def run_grid(
    translation: Translation,
    arguments: NDArray[np.uint8],
    memory: GlobalMemory,
    shared_bytes: int,
    grid: tuple[int, int, int],
) -> None:
    """Run all programs of a launch, one after another, with the bytes of the argument segment."""
    for program in programs_of(grid):
        Machine(translation, arguments, memory, shared_bytes, program, grid).run()
