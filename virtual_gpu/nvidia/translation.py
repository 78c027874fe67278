"""Translate PTX to Python: each block becomes a function that computes all threads of a program at once, with NumPy."""

import functools
from dataclasses import dataclass

from virtual_gpu import arithmetic
from virtual_gpu.control_flow import BlockOrder, order_blocks
from virtual_gpu.nvidia.code_writer import CodeWriter
from virtual_gpu.nvidia.parser import Instruction, Kernel, Parameter
from virtual_gpu.programs import BlockCode

__all__ = ["Translation", "translate"]

BRANCHES = ("bra", "bra.uni", "ret")


@dataclass(frozen=True)
class Translation:
    """A kernel's blocks as functions (registers, machine, mask or None for all threads)."""

    kernel: Kernel
    blocks: tuple[BlockCode[Instruction], ...]
    order: BlockOrder


def translate(kernel: Kernel) -> Translation:
    """Translate all blocks of `kernel`.

    Raises:
        NotImplementedError: for an instruction that the machine doesn't know, with its line.
    """
    blocks = tuple(_translated(block, kernel.parameters, kernel.num_threads) for block in kernel.blocks)
    return Translation(kernel, blocks, order_blocks(_following(kernel)))


@functools.lru_cache(1 << 14)
def _translated(
    block: tuple[Instruction, ...], parameters: tuple[Parameter, ...], num_threads: int
) -> BlockCode[Instruction]:
    writer = CodeWriter(parameters, num_threads)
    branch = None
    for instruction in block:
        if ".".join(instruction.parts) in BRANCHES:
            branch = instruction
        else:
            writer.add(instruction)
    source = "def block(R, m, M):\n    " + "\n    ".join(writer.lines or ["pass"])
    return BlockCode(source, writer.constants, arithmetic, branch)


def _following(kernel: Kernel) -> list[list[int]]:
    """Return for each block those that may come next; one past the last is the end."""
    following = []
    for index, block in enumerate(kernel.blocks):
        last = block[-1] if block else None
        branches = last is not None and last.parts[0] in ("bra", "ret")
        following.append([index + 1] if last is None or not branches or last.guard else [])
        if last is not None and last.parts[0] == "bra":
            following[index].append(kernel.labels[str(last.operands[0])])
    return following
