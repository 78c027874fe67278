"""Read the PTX that Triton writes: one kernel, its parameters, and its instructions in basic blocks."""

import functools
import re
from dataclasses import dataclass

__all__ = ["Address", "Instruction", "Kernel", "Operand", "Parameter", "parse"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the kernel: its name, and its size in bytes."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Address:
    """An operand in brackets: [base + offset], or [base, {coordinates}]."""

    base: str
    offset: int = 0
    coordinates: tuple[str, ...] = ()


Operand = str | tuple[str, ...] | Address
"""A register, a number or a name; registers in braces; an address in brackets."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: the parts of its name, its operands, and the predicate that guards it."""

    parts: tuple[str, ...]
    operands: tuple[Operand, ...] = ()
    guard: str = ""
    guard_negated: bool = False
    line: int = 0
    """Its line in the text, from 1."""


@dataclass(frozen=True)
class Kernel:
    """One kernel. A block's instructions run one after another, and only the last one branches."""

    name: str
    parameters: tuple[Parameter, ...]
    num_threads: int
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]
    """The block that a label stands before."""


def parse(ptx: str) -> Kernel:
    """Parse the text of one kernel.

    Raises:
        ValueError: where the text has no kernel, or an instruction that is not understood.
    """
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    entry = next((i for i, line in enumerate(lines) if ".entry" in line), None)
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    if entry is None or threads is None:
        raise ValueError("this PTX has no .entry with its number of threads (.reqntid)")
    name = re.sub(r".*\.entry\s+([\w$.]+).*", r"\1", lines[entry])
    begin = lines.index("{", entry)
    parameters = tuple(
        Parameter(found[2], int(found[1]) // 8 * int(found[3] or 1))
        for line in lines[entry:begin]
        if (found := re.match(r"\.param.*?\.[bsuf](\d+)\s.*?(\w+_param_\d+)(?:\[(\d+)\])?", line))
    )
    blocks, labels = _blocks(lines, begin + 1)
    return Kernel(name, parameters, int(threads[1]), blocks, labels)


def _blocks(lines: list[str], begin: int) -> tuple[tuple[tuple[Instruction, ...], ...], dict[str, int]]:
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    scope = ""
    """Of inner braces (inline assembly), whose labels and registers are known there alone."""
    registers: dict[str, str] = {}
    """The registers of inner braces by their names there; predicates keep theirs."""
    for index in range(begin, len(lines)):
        line = lines[index]
        if line == "{":
            scope, registers = f"@{index}", {}
        elif line == "}":
            if not scope:
                break
            scope, registers = "", {}
        elif label := re.fullmatch(r"([\w$]+):", line):
            if blocks[-1]:
                blocks.append([])
            labels[label[1] + ("" if label[1].startswith("$") else scope)] = len(blocks) - 1
        elif scope and (declared := re.fullmatch(r"\.reg\s+\.[bsuf](\d+)\s+(\w+)(?:<(\d+)>)?\s*;", line)):
            prefix = {"16": "%rs", "32": "%r", "64": "%rd"}[declared[1]] + scope.replace("@", "_")
            names = [f"{declared[2]}{number}" for number in range(int(declared[3]))] if declared[3] else [declared[2]]
            registers |= {name: f"{prefix}_{name}" for name in names}
        elif line and not line.startswith("."):
            for name, register in registers.items():
                line = re.sub(rf"(?<![\w.%$]){name}(?![\w.:])", register, line)
            instruction = _instruction(line, index + 1, scope)
            blocks[-1].append(instruction)
            if instruction.parts[0] in ("bra", "ret"):
                blocks.append([])
    return tuple(map(tuple, blocks)), labels


@functools.lru_cache(1 << 17)
def _instruction(text: str, line: int, scope: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*?)\s*;", text)
    if found is None:
        raise ValueError(f"line {line} of the PTX is not understood: {text}")
    negated, guard, name, rest = found.groups()
    operands = tuple(_operand(part) for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+", rest))
    if name.startswith("bra") and not rest.startswith("$"):
        operands = (f"{operands[0]}{scope}",)
    return Instruction(tuple(name.split(".")), operands, guard or "", negated == "!", line)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if not text.startswith("["):
        return text
    base, _, coordinates = text[1:-1].partition(",")
    base, _, offset = base.partition("+")
    inner = coordinates.strip().strip("{}")
    return Address(
        base.strip(), int(offset, 0) if offset else 0, tuple(part.strip() for part in inner.split(",") if part.strip())
    )
