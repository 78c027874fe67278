"""What the machines of all makers share: blocks as Python code, the programs of a launch, and where a fault is."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from virtual_gpu.faults import Deadlock, MemoryFault

__all__ = ["MAX_STEPS", "BlockCode", "compile_blocks", "faults_in", "program_number", "programs_of"]

MAX_STEPS = 1_000_000
"""Blocks that one program may run: more is taken for a loop that never ends."""
Branch = TypeVar("Branch")


@dataclass(frozen=True)
class BlockCode(Generic[Branch]):
    """A block's function, and the instruction that ends it; None where the next block follows."""

    run: Callable[..., None]
    branch: Branch | None


def compile_blocks(
    kernel: str, sources: Sequence[str], branches: Sequence[Branch | None], constants: list[Any], functions: ModuleType
) -> tuple[BlockCode[Branch], ...]:
    """Compile functions block_0, block_1, ..., which may call what `functions` exports; K are the constants."""
    exported = {name: getattr(functions, name) for name in functions.__all__}
    names: dict[str, Any] = {"np": np, "copyto": np.copyto, "K": constants, **exported}
    exec(compile("\n".join(sources), f"<{kernel}>", "exec"), names)
    return tuple(BlockCode(names[f"block_{number}"], branch) for number, branch in enumerate(branches))


def programs_of(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Give the programs (x, y, z) of a launch in their order."""
    for z, y, x in itertools.product(range(grid[2]), range(grid[1]), range(grid[0])):
        yield x, y, z


def program_number(program: tuple[int, int, int], grid: tuple[int, int, int]) -> int:
    """Give the place of a program in that order, from 1."""
    return 1 + program[0] + grid[0] * (program[1] + grid[1] * program[2])


class HasLine(Protocol):
    """What knows the line of the assembly that it runs."""

    line: int


@contextlib.contextmanager
def faults_in(kernel: str, machine: HasLine, language: str) -> Iterator[None]:
    """Name the kernel and the line in every fault; NumPy is silent about infinities and NaN."""
    try:
        with np.errstate(all="ignore"):
            yield
    except (MemoryFault, Deadlock, NotImplementedError) as error:
        raise type(error)(f"{kernel}, line {machine.line} of its {language}: {error}") from error
