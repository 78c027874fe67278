"""The GPUs that kernels are compiled for: what a program may use of them, and how many programs fit side by side.

NVIDIA's limits are those of the CUDA programming guide's table of compute capabilities, AMD's those of the CDNA 3 and
CDNA 4 instruction set manuals. Rates of products are the data sheets' dense peaks, divided by multiprocessors and boost
clock: A100 312 TFLOP/s, H100 989, B200 2250, RTX PRO 6000 504, MI300X 1307, MI355X 2517, A40 150, L40S 362, MI250X 383.
"""

import re
from dataclasses import dataclass, replace

from triton.backends.compiler import GPUTarget

__all__ = ["ARCHITECTURES", "OTHER_ARCHITECTURES", "SCHEDULERS", "Architecture", "architecture_named"]

KB = 1024
SCHEDULERS = 4
"""Schedulers of a multiprocessor: each issues one instruction of one of its warps in a cycle."""


@dataclass(frozen=True)
class Architecture:
    """What one multiprocessor (NVIDIA) or compute unit (AMD) has."""

    target: GPUTarget
    matrix_instruction: str
    """The instruction that multiplies tiles of at least 64 rows."""
    shared_bytes_per_program: int
    shared_bytes: int
    reserved_shared_bytes: int
    """Bytes that every program takes from shared_bytes, beside what it asks for."""
    registers: int
    """32-bit registers that one of the four schedulers has for each lane, all its warps together."""
    register_granule: int
    matrix_flops: int
    """Operations of a multiprocessor in a cycle, in products of fp16 or bf16 with sums in fp32."""
    warps: int
    """Warps that can be resident, in all four schedulers together."""
    programs: int
    tensor_memory_columns: int = 0

    def occupancy(self, registers: int, shared_bytes: int, num_warps: int, tensor_memory_columns: int = 0) -> int:
        """Return how many programs fit side by side.

        Args:
            registers: of one thread. shared_bytes, num_warps: of one program.
            tensor_memory_columns: of one program (sm_100).

        Example:
            sm_90, 168 registers, 100 KB, 8 warps: registers allow 3 warps in each of four schedulers, so one program.
        """
        granules = -(-max(registers, 1) // self.register_granule) * self.register_granule
        warps = min(SCHEDULERS * (self.registers // granules), self.warps)
        programs = min(warps // num_warps, self.programs)
        if shared_bytes:
            programs = min(programs, self.shared_bytes // (shared_bytes + self.reserved_shared_bytes))
        if tensor_memory_columns:
            programs = min(programs, self.tensor_memory_columns // tensor_memory_columns)
        return programs


def _nvidia(
    capability: int, matrix_instruction: str, *, shared_kb: int, matrix_flops: int, warps: int, programs: int, **more
) -> Architecture:
    # A scheduler's 16384 registers are given out to warps of 32 threads, 256 at a time.
    return Architecture(
        GPUTarget("cuda", capability, 32),
        matrix_instruction,
        shared_bytes_per_program=(shared_kb - 1) * KB,
        shared_bytes=shared_kb * KB,
        reserved_shared_bytes=KB,
        registers=16384 // 32,
        register_granule=8,
        matrix_flops=matrix_flops,
        warps=warps,
        programs=programs,
        **more,
    )


def _amd(
    name: str, shared_kb: int, matrix_flops: int, matrix_instruction: str = "mfma", warp_size: int = 64
) -> Architecture:
    return Architecture(
        GPUTarget("hip", name, warp_size),
        matrix_instruction,
        shared_bytes_per_program=shared_kb * KB,
        shared_bytes=shared_kb * KB,
        reserved_shared_bytes=0,
        registers=512,
        register_granule=8,
        matrix_flops=matrix_flops,
        warps=32,
        programs=32,
    )


ARCHITECTURES = {
    "sm_80": _nvidia(80, "mma.sync", shared_kb=164, matrix_flops=2048, warps=64, programs=32),
    "sm_90": _nvidia(90, "wgmma", shared_kb=228, matrix_flops=4096, warps=64, programs=32),
    "sm_100": _nvidia(
        100, "tcgen05", shared_kb=228, matrix_flops=8192, warps=64, programs=32, tensor_memory_columns=512
    ),
    "sm_120": _nvidia(120, "mma.sync", shared_kb=100, matrix_flops=1024, warps=48, programs=24),
    "gfx942": _amd("gfx942", shared_kb=64, matrix_flops=2048),
    "gfx950": _amd("gfx950", shared_kb=160, matrix_flops=4096),
}
"""The targets for which every variant of every kernel is compiled."""

OTHER_ARCHITECTURES = {
    "sm_86": _nvidia(86, "mma.sync", shared_kb=100, matrix_flops=1024, warps=48, programs=16),
    "sm_89": _nvidia(89, "mma.sync", shared_kb=100, matrix_flops=1024, warps=48, programs=24),
    "gfx90a": _amd("gfx90a", shared_kb=64, matrix_flops=1024),
}
"""The targets for which the variants are compiled that are compiled by default."""

_FAMILIES = {
    r"sm_8\d": OTHER_ARCHITECTURES["sm_86"],
    r"sm_10\d": ARCHITECTURES["sm_100"],
    r"sm_12\d": ARCHITECTURES["sm_120"],
    r"gfx9\w+": OTHER_ARCHITECTURES["gfx90a"],
    r"gfx1[12]\w+": _amd("gfx1100", shared_kb=64, matrix_flops=512, matrix_instruction="wmma", warp_size=32),
}
"""What stands for a card that is not listed: its family's, or the one of its family that has least."""


def architecture_named(name: str) -> Architecture:
    """Return what a GPU has, named as a tile's key names it: "sm_87", "gfx942".

    Raises:
        ValueError: no such GPU is known.
    """
    listed = {**ARCHITECTURES, **OTHER_ARCHITECTURES}
    if name in listed:
        return listed[name]
    for pattern, relative in _FAMILIES.items():
        if re.fullmatch(pattern, name):
            target = relative.target
            arch = int(name.removeprefix("sm_")) if target.backend == "cuda" else name
            return replace(relative, target=GPUTarget(target.backend, arch, target.warp_size))
    raise ValueError(
        f"a target must be one of {', '.join(listed)}, or be named like them and have compute capability 8, 10 or 12, "
        f"gfx9, gfx11 or gfx12, got {name!r}"
    )
