"""Read the AMDGCN assembly that Triton writes: one kernel, how it starts, and its instructions in basic blocks."""

import functools
import re
from dataclasses import dataclass, field

__all__ = ["Argument", "Instruction", "Kernel", "parse"]

ENDS_BLOCK = ("s_branch", "s_cbranch", "s_endpgm", "s_barrier")


@dataclass(frozen=True)
class Argument:
    """One entry of the kernel's argument segment, in bytes; kinds that begin with "hidden" are the launcher's own."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name without the encoding's suffix, its operands, and what follows those ("offset": "4")."""

    name: str
    operands: tuple[str, ...] = ()
    modifiers: dict[str, str] = field(default_factory=dict, hash=False)
    line: int = 0
    """Its line in the text, from 1."""


@dataclass(frozen=True)
class Kernel:
    """One kernel. A block's instructions run one after another, and only the last one branches or waits."""

    name: str
    target: str
    arguments: tuple[Argument, ...]
    directives: dict[str, int]
    """What the loader is told (.amdhsa_ left out): which registers hold what at the start."""
    num_threads: int
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]
    """The block that a label stands before."""
    entry: int
    """The block that runs first: with preloaded arguments the one 256 bytes on, past the code that loads them."""


def parse(assembly: str) -> Kernel:
    """Parse the text of one kernel.

    Raises:
        ValueError: where the text has no kernel, or an instruction that is not understood.
    """
    name = re.search(r"^\s*\.amdhsa_kernel (\S+)", assembly, re.MULTILINE)
    target = re.search(r"^\s*\.amdgcn_target \S*(gfx\w+)", assembly, re.MULTILINE)
    threads = re.search(r"\.max_flat_workgroup_size:\s*(\d+)", assembly)
    if name is None or target is None or threads is None:
        raise ValueError("this assembly has no kernel (.amdhsa_kernel) with its target and its number of threads")
    directives = {key: int(value) for key, value in re.findall(r"\.amdhsa_(\w+) (\d+)$", assembly, re.MULTILINE)}
    arguments = re.findall(r"\.offset:\s*(\d+)\s+\.size:\s*(\d+)\s+\.value_kind:\s*(\w+)", assembly)
    blocks, labels, second_entry = _blocks(assembly.splitlines(), name[1])
    preloads = directives.get("user_sgpr_kernarg_preload_length", 0) > 0
    return Kernel(
        name[1],
        target[1],
        tuple(Argument(int(offset), int(size), kind) for offset, size, kind in arguments),
        directives,
        int(threads[1]),
        blocks,
        labels,
        second_entry if preloads else 0,
    )


def _blocks(lines: list[str], name: str) -> tuple[tuple[tuple[Instruction, ...], ...], dict[str, int], int]:
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    second_entry = 0
    begin = next(index for index, line in enumerate(lines) if line.startswith(f"{name}:"))
    for index in range(begin + 1, len(lines)):
        line = lines[index].split(";")[0].strip()
        if line.startswith(".section") and ".rodata" in line:
            break
        if label := re.fullmatch(r"(\.LBB\w+):", line):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif line.startswith(".p2align"):
            if blocks[-1]:
                blocks.append([])
            second_entry = second_entry or len(blocks) - 1
        elif line and not line.startswith(".") and not line.endswith(":"):
            blocks[-1].append(_instruction(line, index + 1))
            if line.startswith(ENDS_BLOCK):
                blocks.append([])
    return tuple(map(tuple, blocks)), labels, second_entry


@functools.lru_cache(1 << 17)
def _instruction(text: str, line: int) -> Instruction:
    found = re.fullmatch(r"([a-z]\w*)(?:\s+(.*))?", text)
    if found is None:
        raise ValueError(f"line {line} of the assembly is not understood: {text}")
    name = re.sub(r"_(e32|e64|dpp|sdwa)$", "", found[1])
    if name == "s_waitcnt":
        counts = re.findall(r"(\w+)\((\d+)\)", found[2] or "")
        if not counts:
            raise ValueError(f"line {line} of the assembly is not understood: {text}")
        return Instruction(name, (), dict(counts), line)
    parts = re.findall(r"(?:[^,\[(]|\[[^\]]*\]|\([^)]*\))+", found[2] or "")
    operands, modifiers = [part.strip() for part in parts], {}
    if operands:
        operands[-1], *words = re.findall(r"(?:[^\s\[]|\[[^\]]*\])+", operands[-1])
        modifiers = {word.split(":", 1)[0]: word.partition(":")[2] for word in words}
    if found[1].endswith("_dpp"):
        modifiers["dpp"] = ""
    return Instruction(name, tuple(operands), modifiers, line)
