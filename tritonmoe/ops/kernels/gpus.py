"""The table of GPUs: every fact of a card that other files read. Reading the table needs no Triton.

Tiles, launches, ahead-of-time compilation, the choice of a backend and the planner's machines read it.

NVIDIA's limits are those of the CUDA programming guide's table of compute capabilities, AMD's those of the CDNA 3 and
CDNA 4 instruction set manuals. Rates of products are the data sheets' dense peaks, divided by multiprocessors and boost
clock: A100 312 TFLOP/s, H100 989, B200 2250, RTX PRO 6000 504, MI300X 1307, MI355X 2517, A40 150, L40S 362, MI250X 383.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

__all__ = [
    *("ARCHITECTURES", "CARDS", "OTHER_ARCHITECTURES", "SCHEDULERS", "Architecture", "Card"),
    *("architecture_like", "architecture_named"),
]

KB = 1024
BLOCK: tuple[str, ...] = ("fp8_block",)
BOTH = (*BLOCK, "mxfp8")
SCHEDULERS = 4
"""Schedulers of a multiprocessor: each issues one instruction of one of its warps in a cycle."""


@dataclass(frozen=True, eq=False)  # the rows are their own keys: every launch asks
class Architecture:
    """What one multiprocessor (NVIDIA) or compute unit (AMD) has, and what kernels may use there."""

    name: str
    """As a tile's key names it: "sm_90", "gfx942"."""
    tiles: str
    """Its family in the table of tiles, `tiles/table.py`."""
    matrix_instruction: str
    """The instruction that multiplies tiles of at least 64 rows."""
    shared_kb: int
    matrix_flops: int
    """Operations of a multiprocessor in a cycle, in products of fp16 or bf16 with sums in fp32."""
    warps: int
    """Warps that can be resident, in all four schedulers together."""
    programs: int
    registers: int = 512
    """32-bit registers that one of the four schedulers has for each lane, all its warps together."""
    warp_size: int = 32
    tensor_columns: int = 0
    """Of the memory that holds accumulators outside of the registers (sm_100)."""
    tma_since: tuple[int, ...] | None = None
    """The first Triton that always makes instructions of TMA's loads, () if each does; None: the card has no TMA."""
    gathers_by_tma: bool = True
    """Whether TMA, where there is one, gathers rows."""
    spills_boxes: bool = False
    """Whether `up` spills registers where TMA reads a copy of x as boxes."""
    fences_since: tuple[int, ...] = ()
    """The first Triton that puts fences and barriers (triton-lang/triton#9871) between asynchronous copies and the
    matrix instruction; () where none is known to be missing."""
    has_tf32: bool = True
    precisions: tuple[str, ...] = ()
    """The formats of an ExpertPrecision whose codes its matrix instructions multiply. gfx942's e4m3 is another one."""
    chiplets: int = 1
    """Chiplets, each with an L2 cache of its own, to which programs go in turn."""

    @property
    def backend(self) -> str:
        """Triton's name of the vendor."""
        return "cuda" if self.name.startswith("sm_") else "hip"

    @property
    def target(self) -> "GPUTarget":
        """What Triton compiles for."""
        from triton.backends.compiler import GPUTarget

        number = int(self.name.removeprefix("sm_")) if self.backend == "cuda" else self.name
        return GPUTarget(self.backend, number, self.warp_size)

    @property
    def multiplies_shared_memory(self) -> bool:
        """Whether matrix instructions read both operands in shared memory rather than in registers."""
        return self.matrix_instruction in ("wgmma", "tcgen05")

    @property
    def shared_bytes_per_program(self) -> int:
        """Bytes of shared memory that a program may ask for; on NVIDIA it takes 1 KB beside them."""
        return (self.shared_kb - (self.backend == "cuda")) * KB

    def occupancy(self, registers: int, shared_bytes: int, num_warps: int, tensor_memory_columns: int = 0) -> int:
        """Return how many programs fit side by side.

        Args:
            registers: of one thread. shared_bytes, num_warps: of one program.
            tensor_memory_columns: of one program (sm_100).

        Example:
            sm_90, 168 registers, 100 KB, 8 warps: registers allow 3 warps in each of four schedulers, so one program.
        """
        granules = -(-max(registers, 1) // 8) * 8  # given out eight at a time
        warps = min(SCHEDULERS * (self.registers // granules), self.warps)
        programs = min(warps // num_warps, self.programs)
        if shared_bytes:
            reserved = self.shared_kb * KB - self.shared_bytes_per_program
            programs = min(programs, self.shared_kb * KB // (shared_bytes + reserved))
        if tensor_memory_columns:
            programs = min(programs, self.tensor_columns // tensor_memory_columns)
        return programs


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("sm_80", "sm_80", "mma.sync", 164, 2048, 64, 32),
        Architecture(
            "sm_90", "sm_90", "wgmma", 228, 4096, 64, 32, tma_since=(), gathers_by_tma=False, precisions=BLOCK
        ),
        Architecture(
            *("sm_100", "sm_100", "tcgen05", 228, 8192, 64, 32),
            tensor_columns=512,
            tma_since=(),
            fences_since=(3, 7, 1),
            precisions=BOTH,
        ),
        Architecture(
            *("sm_120", "nvidia", "mma.sync", 100, 1024, 48, 24), tma_since=(3, 7), spills_boxes=True, precisions=BOTH
        ),
        Architecture("gfx942", "amd", "mfma", 64, 2048, 32, 32, warp_size=64, chiplets=8),
        Architecture(
            *("gfx950", "amd", "mfma", 160, 4096, 32, 32), warp_size=64, chiplets=8, has_tf32=False, precisions=BOTH
        ),
    )
}
"""The targets for which every variant of every kernel is compiled."""

OTHER_ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("sm_86", "nvidia", "mma.sync", 100, 1024, 48, 16),
        Architecture("sm_89", "nvidia", "mma.sync", 100, 1024, 48, 24, precisions=BLOCK),
        Architecture("gfx90a", "amd", "mfma", 64, 1024, 32, 32, warp_size=64, has_tf32=False),
    )
}
"""The targets for which the variants are compiled that are compiled by default."""

_KNOWN = {
    **ARCHITECTURES,
    **OTHER_ARCHITECTURES,
    r"sm_8\d": OTHER_ARCHITECTURES["sm_86"],
    r"sm_10\d": ARCHITECTURES["sm_100"],
    r"sm_12\d": ARCHITECTURES["sm_120"],
    r"gfx9\w+": OTHER_ARCHITECTURES["gfx90a"],
    r"gfx1[12]\w+": Architecture("gfx1100", "amd", "wmma", 64, 512, 32, 32, has_tf32=False),
}
"""What stands for a card that is not listed: its family's, or the one of its family that has least."""
_STRANGERS = {
    "interpreter": replace(ARCHITECTURES["sm_100"], tiles="interpreter", fences_since=()),
    r"sm_9\d": ARCHITECTURES["sm_90"],
    r"sm_\d\d": OTHER_ARCHITECTURES["sm_86"],
    r"sm_\d+": replace(ARCHITECTURES["sm_120"], tma_since=(), spills_boxes=False, precisions=()),
    r".*": OTHER_ARCHITECTURES["gfx90a"],
}
"""What stands, in a launch, for the interpreter and for cards of which nothing is known."""


class Card(NamedTuple):
    """A product with GPUs of one architecture, by its data sheet. tflops: dense products, 1e12 FLOP/s by dtype."""

    architecture: str
    multiprocessors: int
    memory_gb: float
    memory_tb_per_s: float
    tflops: Mapping[str, float]


_HOPPER = {"bf16": 989.4, "fp16": 989.4, "fp8": 1978.9}
_GRACE_BLACKWELL = {"bf16": 2500.0, "fp16": 2500.0, "fp8": 5000.0}
CARDS = {
    "A100": Card("sm_80", 108, 80, 2.04, {"bf16": 312.0, "fp16": 312.0}),
    "H100": Card("sm_90", 132, 80, 3.35, _HOPPER),
    "H200": Card("sm_90", 132, 141, 4.8, _HOPPER),
    "B200": Card("sm_100", 148, 180, 8.0, {"bf16": 2250.0, "fp16": 2250.0, "fp8": 4500.0}),
    "GB200": Card("sm_100", 148, 186, 8.0, _GRACE_BLACKWELL),
    "GB300": Card("sm_103", 148, 279, 8.0, _GRACE_BLACKWELL),
    "MI300X": Card("gfx942", 304, 192, 5.3, {"bf16": 1307.4, "fp16": 1307.4, "fp8": 2614.9}),
}


@functools.cache
def architecture_like(name: str) -> Architecture:
    """Return what kernels may use on any card, or in the "interpreter": that of its family, or of the most like it."""
    rows = (_KNOWN | _STRANGERS).items()
    return replace(next(row for pattern, row in rows if re.fullmatch(pattern, name)), name=name)


def architecture_named(name: str) -> Architecture:
    """Return what a GPU has, named as a tile's key names it: "sm_87", "gfx942".

    Raises:
        ValueError: no such GPU is known.
    """
    if any(re.fullmatch(pattern, name) for pattern in _KNOWN):
        return architecture_like(name)
    raise ValueError(
        f"a target must be one of {', '.join(ARCHITECTURES | OTHER_ARCHITECTURES)}, or be named like them and have "
        f"compute capability 8, 10 or 12, gfx9, gfx11 or gfx12, got {name!r}"
    )
