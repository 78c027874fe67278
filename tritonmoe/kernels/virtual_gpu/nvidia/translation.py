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
    later: tuple[frozenset[int], ...]
    """For each block, and last the end, those that come after it, loops left aside."""
    depths: tuple[int, ...]
    """How many loops a block is in."""
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
    return Translation(kernel, blocks, *_order(kernel), registers, constants)


def _order(kernel: Kernel) -> tuple[tuple[frozenset[int], ...], tuple[int, ...]]:
    """Give for each block, and last for the end, those that come after it, loops left aside; and how many it is in."""
    after: list[list[int]] = []
    for index, block in enumerate(kernel.blocks):
        last = block[-1] if block else None
        branches = last is not None and last.parts[0] in ("bra", "ret")
        after.append([index + 1] if last is None or not branches or last.guard else [])
        if last is not None and last.parts[0] == "bra":
            after[index].append(kernel.labels[str(last.operands[0])])
    after.append([])
    before: list[list[int]] = [[] for _ in after]
    for index, blocks in enumerate(after):
        for block_after in blocks:
            before[block_after].append(index)
    later: dict[int, frozenset[int]] = {}
    depths = [0] * len(after)
    path, entered = [0], {0}
    while path:
        index = path[-1]
        following = next((number for number in after[index] if number not in entered), None)
        if following is not None:
            entered.add(following)
            path.append(following)
            continue
        for head in after[index]:
            if head not in later:  # it is on the path: a loop goes from there to here
                for inside in _between(head, index, before):
                    depths[inside] += 1
        ahead = [number for number in after[index] if number in later]
        later[index] = frozenset(ahead).union(*(later[number] for number in ahead))
        path.pop()
    return tuple(later.get(index, frozenset()) for index in range(len(after))), tuple(depths)


def _between(head: int, tail: int, before: list[list[int]]) -> set[int]:
    """Give the blocks of the loop that begins with `head`, where `tail` branches back to."""
    found, open_ends = {head}, [tail]
    while open_ends:
        block = open_ends.pop()
        if block not in found:
            found.add(block)
            open_ends += before[block]
    return found
