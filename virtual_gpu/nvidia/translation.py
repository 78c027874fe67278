"""Translate PTX to Python: each block becomes a function that computes all threads of a program at once, with NumPy."""

from dataclasses import dataclass, field
from typing import Any

from virtual_gpu import arithmetic
from virtual_gpu.control_flow import BlockOrder, order_blocks
from virtual_gpu.nvidia.code_writer import CodeWriter
from virtual_gpu.nvidia.parser import Instruction, Kernel
from virtual_gpu.programs import BlockCode, compile_blocks

__all__ = ["Translation", "translate"]


@dataclass(frozen=True)
class Translation:
    """A kernel's blocks as functions (registers, machine, mask or None for all threads).

    `registers` gives the number of a register.
    """

    kernel: Kernel
    blocks: tuple[BlockCode[Instruction], ...]
    order: BlockOrder
    registers: dict[str, int]
    constants: list[Any] = field(repr=False)


def translate(kernel: Kernel) -> Translation:
    """Translate all blocks of `kernel`.

    Raises:
        NotImplementedError: for an instruction that the machine doesn't know, with its line.
    """
    registers: dict[str, int] = {}
    constants: list[Any] = []
    sources, branches = [], []
    for number, block in enumerate(kernel.blocks):
        writer = CodeWriter(registers, constants, kernel)
        branch = None
        for instruction in block:
            if instruction.parts[0] in ("bra", "ret"):
                branch = instruction
                if instruction.guard:
                    writer.register(instruction.guard)
            else:
                writer.add(instruction)
        sources.append(f"def block_{number}(R, m, M):\n    " + "\n    ".join(writer.lines or ["pass"]))
        branches.append(branch)
    blocks = compile_blocks(kernel.name, sources, branches, constants, arithmetic)
    return Translation(kernel, blocks, order_blocks(_following(kernel)), registers, constants)


def _following(kernel: Kernel) -> list[list[int]]:
    """Give for each block those that may come next; one past the last is the end."""
    following = []
    for index, block in enumerate(kernel.blocks):
        last = block[-1] if block else None
        branches = last is not None and last.parts[0] in ("bra", "ret")
        following.append([index + 1] if last is None or not branches or last.guard else [])
        if last is not None and last.parts[0] == "bra":
            following[index].append(kernel.labels[str(last.operands[0])])
    return following
