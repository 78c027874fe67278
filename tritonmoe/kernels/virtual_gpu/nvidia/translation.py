"""Translate PTX to Python: each block becomes a function that computes all threads of a program at once, with NumPy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import arithmetic
from .code_writer import CodeWriter
from .parser import Instruction, Kernel

__all__ = ["BlockCode", "Translation", "translate"]


@dataclass(frozen=True)
class BlockCode:
    """A block's function (registers, machine, mask or None for all threads) and how it ends."""

    run: Callable[[list[Any], Any, Any], None]
    branch: Instruction | None


@dataclass(frozen=True)
class Translation:
    """A kernel's blocks as code; `registers` gives the number of a register."""

    kernel: Kernel
    blocks: tuple[BlockCode, ...]
    reachable: tuple[frozenset[int], ...]
    """For each block, and last the end, those that may run after it."""
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
    names: dict[str, Any] = {
        "np": np,
        "K": constants,
        **{name: getattr(arithmetic, name) for name in arithmetic.__all__},
    }
    exec(compile("\n".join(sources), f"<{kernel.name}>", "exec"), names)
    blocks = tuple(BlockCode(names[f"block_{number}"], branch) for number, branch in enumerate(branches))
    return Translation(kernel, blocks, _reachable(kernel), registers, constants)


def _reachable(kernel: Kernel) -> tuple[frozenset[int], ...]:
    """Give for each block those that may run after it."""
    number = len(kernel.blocks)
    after: list[set[int]] = []
    for index, block in enumerate(kernel.blocks):
        last = block[-1] if block else None
        branches = last is not None and last.parts[0] in ("bra", "ret")
        after.append({index + 1} if last is None or not branches or last.guard else set())
        if last is not None and last.parts[0] == "bra":
            after[index].add(kernel.labels[str(last.operands[0])])
    after.append(set())  # the end
    grows = True
    while grows:
        grows = False
        for index in reversed(range(number)):
            more = after[index].union(*(after[block] for block in after[index]))
            grows |= len(more) > len(after[index])
            after[index] = more
    return tuple(map(frozenset, after))
