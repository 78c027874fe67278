"""Read what the compiler made: registers and spills of a kernel, and the instructions of its innermost matrix loop."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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
    "load": r"(global|buffer|flat)_load\w*",
    "store": r"(global|buffer|flat)_store\w*",
    "shared": r"ds_\w+",
    "barrier": r"s_barrier\w*|s_waitcnt\w*",
}
MATRIX_KINDS = ("wgmma", "tcgen05", "mma.sync", "mfma")


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel uses."""

    registers: int
    """A thread's registers (AMD: vector registers)."""
    spills: int
    """Bytes of stack a thread uses on NVIDIA, spilled vector registers on AMD."""
    num_warps: int
    """The warps of a program; a warp-specialised kernel has more than it was launched with."""
    matrix: str
    """The matrix instruction in the loop; empty where there is none."""
    loop: dict[str, int]
    """Instructions by kind in the innermost loop with a matrix instruction (in the whole kernel where none loops)."""


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def read_nvidia(cubin: bytes, ptx: str) -> MachineCode:
    """Read a cubin with the tools inside the triton package."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "--print-code", file.name)
    registers, stack, local = (_number(rf"\b{key}:(\d+)", usage) for key in ("REG", "STACK", "LOCAL"))
    code = list(_nvidia_instructions(assembly))
    matrix, loop = _matrix_loop(code, NVIDIA_KINDS)
    return MachineCode(registers, stack + local, _number(r"\.reqntid (\d+)", ptx) // 32, matrix, loop)


def read_amd(assembly: str) -> MachineCode:
    """Read the assembly that LLVM wrote, whose last part says what it uses."""
    registers, spills, threads, width = (
        _number(rf"\.{key}:\s+(\d+)", assembly)
        for key in ("vgpr_count", "vgpr_spill_count", "max_flat_workgroup_size", "wavefront_size")
    )
    matrix, loop = _matrix_loop(list(_amd_instructions(assembly)), AMD_KINDS)
    return MachineCode(registers, spills, threads // width, matrix, loop)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is nowhere in {text[:500]!r}"
    return int(match[1])


_Instruction = tuple[str, str]
"""(mnemonic, the label it branches to); a label itself is ("", label)."""


def _nvidia_instructions(assembly: str) -> Iterator[_Instruction]:
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            yield "", label[1]
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", line):
            branch = re.search(r"`\((\.L_\w+)\)", line) if found[1] == "BRA" else None
            yield found[1], branch[1] if branch else ""


def _amd_instructions(assembly: str) -> Iterator[_Instruction]:
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            yield "", label[1]
        elif found := re.match(r"\s+([a-z]\w+)(?:\s+(\.LBB\w+))?", line):
            yield found[1], found[2] or "" if "branch" in found[1] else ""


def _matrix_loop(code: list[_Instruction], kinds: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """Give the matrix instruction and the instruction counts of the innermost loop that has one.

    A loop is what lies between a label and a later branch back to it.
    """
    labels = {label: place for place, (name, label) in enumerate(code) if not name}
    loops = sorted(
        (place - labels[label], labels[label])
        for place, (name, label) in enumerate(code)
        if name and label and labels.get(label, place) < place
    )
    for length, first in loops:  # the shortest first: no loop comes before one inside it
        counts = _count(code[first : first + length + 1], kinds)
        if any(kind in counts for kind in MATRIX_KINDS):
            break
    else:
        counts = _count(code, kinds)
    return " + ".join(kind for kind in MATRIX_KINDS if kind in counts), counts


def _count(code: list[_Instruction], kinds: Mapping[str, str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, _ in code:
        if name:
            counts["all"] += 1
            for kind, pattern in kinds.items():
                if re.fullmatch(pattern, name):
                    counts[kind] += 1
                    break
    return {kind: counts[kind] for kind in ("all", *kinds) if kind in counts}
