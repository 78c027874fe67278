"""What the machines of all makers share: blocks as Python code, the programs of a launch, and where a fault is."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from virtual_gpu.faults import Deadlock, MemoryFault

__all__ = [
    "MAX_STEPS",
    "BlockCode",
    "faults_in",
    "program_number",
    "programs_of",
    "unknown_instructions",
]

MAX_STEPS = 1_000_000
"""Blocks that one program may run: more is taken for a loop that never ends."""
Branch = TypeVar("Branch")


@dataclass(frozen=True)
class BlockCode(Generic[Branch]):
    """A block as the text of a Python function "block", which may call what `functions` exports; K: its constants."""

    source: str
    constants: Sequence[Any]
    functions: ModuleType
    branch: Branch | None
    """The instruction that ends it; None where the next block follows."""

    @functools.cached_property
    def run(self) -> Callable[..., None]:
        """The function, compiled where a program first comes to the block."""
        exported = {name: getattr(self.functions, name) for name in self.functions.__all__}
        names: dict[str, Any] = {"np": np, "copyto": np.copyto, "K": self.constants, **exported}
        exec(compile(self.source, "<block>", "exec"), names)
        run: Callable[..., None] = names["block"]
        return run


def programs_of(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Return the programs (x, y, z) of a launch in their order."""
    for z, y, x in itertools.product(range(grid[2]), range(grid[1]), range(grid[0])):
        yield x, y, z


def program_number(program: tuple[int, int, int], grid: tuple[int, int, int]) -> int:
    """Return the place of a program in that order, from 1."""
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
    except Exception as error:
        text = f"{kernel}, line {machine.line} of its {language}: the machine can't run this: {error!r}"
        raise NotImplementedError(text) from error


@contextlib.contextmanager
def unknown_instructions(line: int, instruction: str) -> Iterator[None]:
    """Name the line and the instruction where a translation fails: operands of another shape are unknown ones too."""
    try:
        yield
    except Exception as error:
        raise NotImplementedError(f"line {line}: the machine doesn't know {instruction} ({error!r})") from error
