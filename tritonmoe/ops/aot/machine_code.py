"""Read what the compiler made: registers and spills of a kernel, its innermost matrix loop, and a step of that.

A persistent program has one loop over the steps of all of its tiles, so a tile's beginning and end are in that loop. A
step is the shortest way through the loop that passes its matrix instructions: neither the first nor the last of a tile.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

__all__ = ["MachineCode", "read_amd", "read_nvidia"]

NVIDIA_KINDS = {
    "wgmma": r"[A-Z]GMMA",
    "tcgen05": r"UTC\w*MMA",
    "mma.sync": r"[A-Z]MMA",
    "TMA": r"UTMALDG",
    "cp.async": r"LDGSTS",
    "load": r"LDG|LD|UBLKCP",
    "store": r"STG|ST|UTMASTG|UTMAREDG|RED\w*",
    "shared": r"LDS|LDSM|STS|STSM|LDT|STT|LDTM|STTM",
    "barrier": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|UTCBAR|UTMACMDFLUSH",
}
AMD_KINDS = {
    "mfma": r"v_s?mfma\w*",
    "wmma": r"v_s?wmma\w*",
    "load": r"(global|buffer|flat)_load\w*",
    "store": r"(global|buffer|flat)_store\w*",
    "shared": r"ds_\w+",
    "barrier": r"s_barrier\w*|s_waitcnt\w*",
}
MATRIX_KINDS = ("wgmma", "tcgen05", "mma.sync", "mfma", "wmma")
WAITS = {"copies_in_flight": "DEPBAR", "products_in_flight": "WARPGROUP"}
"""The waits of a step that say what they leave under way: groups of cp.async, and of wgmma."""


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel uses."""

    registers: int
    """A thread's registers (AMD: vector registers)."""
    spills: int
    """Bytes of stack a thread uses on NVIDIA, spilled vector registers on AMD."""
    looped_spills: int
    """Loads and stores of that stack in innermost loops, on NVIDIA; 0 on AMD."""
    num_warps: int
    """The warps of a program; a warp-specialised kernel has more than it was launched with."""
    matrix: str
    """The matrix instruction in the loop; empty where there is none."""
    loop: dict[str, int]
    """Instructions by kind in the innermost loop with a matrix instruction (in the whole kernel where none loops)."""
    step: dict[str, int]
    """Of a step: its "instructions", its "barriers" of the whole program, and where it waits for groups of asynchronous
    copies or products, how many it leaves under way (see WAITS). Empty where no matrix instruction loops."""


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def read_nvidia(cubin: bytes, ptx: str) -> MachineCode:
    """Read a cubin with the tools inside the triton package."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "--no-dataflow", "--print-code", file.name)
    registers, stack, local = (_number(rf"\b{key}:(\d+)", usage) for key in ("REG", "STACK", "LOCAL"))
    code = list(_nvidia_instructions(assembly))
    loop = _matrix_loop(code, NVIDIA_KINDS)
    num_warps = _number(r"\.reqntid (\d+)", ptx) // 32
    spills = stack + local
    inner_loops = _innermost_loops(code) if spills else ()  # few kernels spill, and finding all loops takes a while
    looped = sum(item.name in ("LDL", "STL") for inner in inner_loops for item in inner)
    return MachineCode(registers, spills, looped, num_warps, *_counts(code, loop, NVIDIA_KINDS))


def read_amd(assembly: str) -> MachineCode:
    """Read the assembly that LLVM wrote, whose last part says what it uses."""
    registers, spills, threads, width = (
        _number(rf"\.{key}:\s+(\d+)", assembly)
        for key in ("vgpr_count", "vgpr_spill_count", "max_flat_workgroup_size", "wavefront_size")
    )
    code = list(_amd_instructions(assembly))
    loop = _matrix_loop(code, AMD_KINDS)
    return MachineCode(registers, spills, 0, threads // width, *_counts(code, loop, AMD_KINDS))


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is nowhere in {text[:500]!r}"
    return int(match[1])


class _Instruction(NamedTuple):
    name: str
    """The mnemonic; empty for a label."""
    label: str = ""
    """The label itself, or the one it branches to."""
    always: bool = False
    """Whether it branches, or ends, whatever happened."""
    left: int = -1
    """Of a wait for groups: how many may be under way after it."""


def _nvidia_instructions(assembly: str) -> Iterator[_Instruction]:
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            yield _Instruction("", label[1])
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?\w+\s+)?([A-Z]\w*)(\S*)(.*)", line):
            predicate, name, modifiers, operands = found.groups()
            branch = re.search(r"`\((\.L_\w+)\)", operands) if name == "BRA" else None
            left = re.search(r"0x([0-9a-f]+)", operands) if ".LE" in modifiers else None
            yield _Instruction(
                name,
                branch[1] if branch else "",
                name in ("BRA", "EXIT") and predicate is None and ".U" not in modifiers,
                int(left[1], 16) if left else -1,
            )


def _amd_instructions(assembly: str) -> Iterator[_Instruction]:
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            yield _Instruction("", label[1])
        elif found := re.match(r"\s+([a-z]\w+)(?:\s+(\.LBB\w+))?", line):
            target = found[2] or "" if "branch" in found[1] else ""
            yield _Instruction(found[1], target, found[1] in ("s_branch", "s_endpgm"))


def _loops(code: list[_Instruction]) -> Iterator[tuple[int, int]]:
    """Return the loops, the shortest first: the place of a label, and that of a later branch back to it.

    A branch back from a wait that was moved behind the end of the kernel makes no loop: it is reached otherwise, too.
    """
    labels = {item.label: place for place, item in enumerate(code) if not item.name}
    branches = sorted(
        (place - labels[item.label], place)
        for place, item in enumerate(code)
        if item.name and item.label and labels.get(item.label, place) < place
    )
    for length, last in branches:
        first = last - length
        if not _reaches(code, labels, last, first) or _is_entered_inside(code, first, last):
            yield first, last


def _is_entered_inside(code: list[_Instruction], first: int, last: int) -> bool:
    """Return whether nothing but the loop itself comes to its first place: LLVM makes some begin in the middle."""
    label, before = code[first].label, code[first - 1]
    comes_from = [place for place, item in enumerate(code) if item.name and item.label == label]
    return before.always and all(first <= place <= last for place in comes_from)


def _innermost_loops(code: list[_Instruction]) -> Iterator[list[_Instruction]]:
    """Return the loops that have no loop inside them."""
    found: list[tuple[int, int]] = []
    for first, last in _loops(code):
        if not any(first <= inner_first and inner_last <= last for inner_first, inner_last in found):
            found.append((first, last))
            yield code[first : last + 1]


def _matrix_loop(code: list[_Instruction], kinds: Mapping[str, str]) -> list[_Instruction]:
    """Return the innermost loop that has a matrix instruction; empty where none has."""
    loops = (code[first : last + 1] for first, last in _loops(code))
    return next((loop for loop in loops if _matrix(_count(loop, kinds))), [])


def _next_places(item: _Instruction, place: int, labels: Mapping[str, int]) -> list[int]:
    """Return where a program may go on from `place`; a label that is not among `labels` is left out."""
    places = [] if item.always else [place + 1]
    if item.name and item.label in labels:
        places.append(labels[item.label])
    return places


def _reaches(code: list[_Instruction], labels: Mapping[str, int], last: int, around: int) -> bool:
    """Return whether a kernel can get from its beginning to `last` without passing `around`."""
    seen, waiting = {around, len(code)}, [0]
    while waiting:
        place = waiting.pop()
        if place not in seen:
            seen.add(place)
            waiting += _next_places(code[place], place, labels)
    return last in seen


def _matrix(counts: Mapping[str, int]) -> str:
    return " + ".join(kind for kind in MATRIX_KINDS if kind in counts)


def _counts(
    code: list[_Instruction], loop: list[_Instruction], kinds: Mapping[str, str]
) -> tuple[str, dict[str, int], dict[str, int]]:
    """Return the matrix instruction, the instructions by kind, and what a step has: as MachineCode does."""
    counts = _count(loop or code, kinds)
    if not loop:
        return _matrix(counts), counts, {}
    way = _shortest_way(loop, re.compile("|".join(kinds[kind] for kind in MATRIX_KINDS if kind in counts)))
    barriers = sum(item.name == "BAR" or item.name.startswith("s_barrier") for item in way)
    step = {"instructions": sum(bool(item.name) for item in way), "barriers": barriers}
    for name, wait in WAITS.items():
        left = [item.left for item in way if item.name == wait and item.left >= 0]
        step |= {name: min(left)} if left else {}
    return _matrix(counts), counts, step


def _shortest_way(loop: list[_Instruction], matrix: re.Pattern[str]) -> list[_Instruction]:
    """Return the shortest way through a loop, of those that pass the most matrix instructions."""
    labels = {item.label: place for place, item in enumerate(loop) if not item.name}
    # From each place to the end: (-matrix instructions, instructions, the next place).
    ways: list[tuple[float, float, int]] = [(0, 0, len(loop))] * len(loop)
    for place in range(len(loop) - 2, -1, -1):  # the last one is the branch back
        item = loop[place]
        later = [next_place for next_place in _next_places(item, place, labels) if next_place > place]
        ends = [(*ways[next_place][:2], next_place) for next_place in later]
        products, length, next_place = min(ends, default=(math.inf, math.inf, len(loop)))  # it leaves the loop
        ways[place] = products - bool(matrix.fullmatch(item.name)), length + bool(item.name), next_place
    way, place = [], 0
    while place < len(loop):
        way.append(loop[place])
        place = ways[place][2]
    return way


def _count(code: list[_Instruction], kinds: Mapping[str, str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for item in code:
        if item.name:
            counts["all"] += 1
            for kind, pattern in kinds.items():
                if re.fullmatch(pattern, item.name):
                    counts[kind] += 1
                    break
    return {kind: counts[kind] for kind in ("all", *kinds) if kind in counts}
