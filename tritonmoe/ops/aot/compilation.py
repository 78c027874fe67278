"""Compile launches, several processes at a time, and judge what came out."""

import concurrent.futures
import functools
import multiprocessing
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonmoe.ops.aot.launches import record_launches, source_of
from tritonmoe.ops.aot.machine_code import MachineCode, read_amd, read_nvidia
from tritonmoe.ops.aot.variants import VARIANTS
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.compiled import settle_cache
from tritonmoe.ops.kernels.gpus import SCHEDULERS, Architecture, architecture_named
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.runtime.processes import ends_with_its_parent

__all__ = ["Compiled", "compile_all", "compile_one", "compile_unchecked"]

BYTES = {"bf16": 2, "f16": 2, "f8E4M3FN": 1}
"""Bytes of an element of a product's operands, by its type in Triton's IR."""
E4M3 = " e4m3"
"""Behind the name of a matrix instruction that multiplies codes."""
FIRST_RIGHT_PTXAS = (13, 3)
"""The release that keeps the registers of wgmma's operands until it has read them."""
FEW_BYTES = 16
"""What a thread may spill outside of innermost loops: ptxas does so where one more program then fits."""


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one target."""

    variant: str
    kernel: str
    target: str
    registers: int = 0
    """A thread's registers (vector registers on AMD)."""
    spills: int = 0
    """Bytes of stack a thread uses on NVIDIA, spilled vector registers on AMD."""
    looped_spills: int = 0
    """Loads and stores of that stack in innermost loops."""
    shared_bytes: int = 0
    num_warps: int = 0
    occupancy: int = 0
    """Programs that fit side by side on a multiprocessor (AMD: a compute unit)."""
    matrix: str = ""
    """The matrix instruction in the loop, and "e4m3" behind it where it multiplies codes."""
    expected_matrix: str = ""
    """The matrix instruction that must be there; empty where the kernel has no product of codes or in fp16 or bf16."""
    tma_operands: int = 0
    """Operands that the launch hands over as descriptors, to be read by TMA; results, stored by TMA, don't count."""
    loop: dict[str, int] = field(default_factory=dict)
    """Instructions by kind in the innermost loop around the matrix instruction (no such loop: in the whole kernel)."""
    step: dict[str, int] = field(default_factory=dict)
    """Of a step of a product of codes or in fp16 or bf16: the tile's rows, columns and depth, what `MachineCode.step`
    has, the bytes of its operands' tiles ("l2_bytes"), the cycles of its products ("matrix_cycles"), and on NVIDIA
    those in which one scheduler issues its instructions ("issue_slots")."""
    doubt: str = ""
    """Why the assembler isn't trusted with it; empty where it is."""
    error: str = ""

    @property
    def problem(self) -> str:
        """What is wrong with the kernel; empty when the kernel is fit to run."""
        architecture = architecture_named(self.target)
        limit = architecture.shared_bytes_per_program
        if self.error:
            return self.error
        if self.doubt:
            return self.doubt
        if architecture.target.backend == "cuda":
            if self.looped_spills:
                return f"spills in a loop: {self.looped_spills} loads and stores of {self.spills} bytes"
            if self.spills > FEW_BYTES:
                return f"spills {self.spills} bytes"
        elif self.spills:
            return f"spills {self.spills} registers"
        if self.shared_bytes > limit:
            return f"needs {self.shared_bytes} bytes of shared memory, there are {limit}"
        if self.occupancy < 1:
            return f"no program fits: {self.registers} registers, {self.num_warps} warps"
        if self.expected_matrix and self.matrix != self.expected_matrix:
            return f"its loop has {self.matrix or 'no matrix instruction'}, not {self.expected_matrix}"
        if self.loop.get("TMA", 0) < self.tma_operands:
            return f"its loop has {self.loop.get('TMA', 0)} TMA loads for {self.tma_operands} descriptors"
        return ""


class _ProductTile(NamedTuple):
    rows: int
    columns: int
    depth: int
    element_bytes: int


def _product_tile(ttir: str) -> _ProductTile | None:
    """Return a kernel's tiles in products of codes or in fp16 or bf16; None where there are none."""
    tiles = [
        _ProductTile(int(match[3]), int(match[4]), int(match[1]), BYTES[match[2]])
        for match in re.finditer(
            r"tt\.dot(?:_scaled)? .*?tensor<\d+x(\d+)x(bf16|f16|f8E4M3FN)\S*>.* \* .*-> tensor<(\d+)x(\d+)x", ttir
        )
    ]
    return max(tiles, default=None)


def _multiplies_codes(assembly: Mapping[str, object]) -> bool:
    """Return whether matrix instructions of 8-bit operands are there."""
    if "ptx" in assembly:
        return bool(re.search(r"(wgmma|mma\.sync|tcgen05\.mma)\S*(e4m3|f8f6f4)", str(assembly["ptx"])))
    return bool(re.search(r"v_mfma\S*(fp8_fp8|f8f6f4)", str(assembly["amdgcn"])))


def _expected_matrix(tile: _ProductTile | None, architecture: Architecture) -> str:
    if tile is None:
        return ""
    if architecture.multiplies_shared_memory and tile.rows < 64:
        return "mma.sync"  # wgmma and tcgen05 multiply 64 rows at least; Triton widens codes
    return architecture.matrix_instruction + (E4M3 if tile.element_bytes == 1 else "")


def _step(code: MachineCode, tile: _ProductTile | None, target_name: str) -> dict[str, int]:
    """Put what a step of a product costs beside what the tile asks for; empty where no matrix instruction loops."""
    if tile is None or not code.step:
        return {}
    architecture, (rows, columns, depth, element_bytes) = architecture_named(target_name), tile
    step = {"rows": rows, "columns": columns, "depth": depth, **code.step}
    step["l2_bytes"] = (rows + columns) * depth * element_bytes
    step["matrix_cycles"] = rows * columns * depth * element_bytes // architecture.matrix_flops
    if architecture.target.backend == "cuda":  # AMD's take a vector instruction in four cycles, and others beside it
        step["issue_slots"] = code.step["instructions"] * code.num_warps // SCHEDULERS
    return step


def doubt_of(ptx: str, ptxas: str) -> str:
    """Return why ptxas of this version, as "12.9", may make wrong code of a kernel; empty where it makes none.

    It used registers of a wgmma's left operand again before the product had read them (triton-lang/triton#11781).
    """
    found = re.search(r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*\{", ptx)
    if found is None or tuple(map(int, ptxas.split("."))) >= FIRST_RIGHT_PTXAS:
        return ""
    return f"wgmma reads its left operand from registers, of which ptxas {ptxas} makes wrong code: 13.3 is right"


def _doubt(assembly: Mapping[str, object], target: GPUTarget) -> str:
    if target.backend != "cuda":
        return ""
    from triton.backends.nvidia.compiler import get_ptxas  # a Triton for AMD alone hasn't it

    return doubt_of(str(assembly["ptx"]), get_ptxas(target.arch).version)


def compile_unchecked(item: launch.Launch, target: GPUTarget) -> CompiledKernel:
    """Compile one launch, into the entry of Triton's cache where a launch on such a GPU looks for it."""
    settle_cache()
    return triton.compile(source_of(item, target), target=target, options=item.options)


def compile_one(variant: str, kernel: str, item: launch.Launch, target_name: str) -> Compiled:
    """Compile one launch for one target."""
    architecture = architecture_named(target_name)
    try:
        compiled = compile_unchecked(item, architecture.target)
        assembly = compiled.asm
        code: MachineCode = (
            read_nvidia(assembly["cubin"], assembly["ptx"]) if "cubin" in assembly else read_amd(assembly["amdgcn"])
        )
    except Exception as error:
        return Compiled(variant, kernel, target_name, error=f"{type(error).__name__}: {error}"[:2000])
    tile = _product_tile(assembly["ttir"])
    shared = compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0)
    num_stored = len(set(re.findall(r"tt\.descriptor_store (%\w+)", assembly["ttir"])))
    return Compiled(
        variant,
        kernel,
        target_name,
        registers=code.registers,
        spills=code.spills,
        looped_spills=code.looped_spills,
        shared_bytes=shared,
        num_warps=code.num_warps,
        occupancy=architecture.occupancy(code.registers, shared, code.num_warps, tensor_memory),
        matrix=code.matrix + (E4M3 if code.matrix and _multiplies_codes(assembly) else ""),
        expected_matrix=_expected_matrix(tile, architecture),
        tma_operands=sum(isinstance(argument, TensorDescriptor) for argument in item.args) - num_stored,
        loop=code.loop,
        step=_step(code, tile, target_name),
        doubt=_doubt(assembly, architecture.target),
    )


@functools.lru_cache(2)
def _launches(variant: str, target: str) -> dict[str, launch.Launch]:
    """Return the launches of a variant, with the table's tiles whatever somebody tuned on this machine."""
    with measured_tiles.using({}):
        return record_launches(VARIANTS[variant], architecture_named(target).target)


def _run(job: tuple[str, str, str]) -> Compiled:
    variant, target, kernel = job
    return compile_one(variant, kernel, _launches(variant, target)[kernel], target)


def compile_all(
    targets: Iterable[str],
    variants: Iterable[str],
    kernels: Collection[str] = (),
    num_workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Compiled]:
    """Compile the kernels of the given variants for the given targets; what launches alike is compiled once.

    kernels: only these, as "operation kernel"; all where there is none.
    """
    jobs, seen = [], set()
    for variant in variants:
        for target in targets:
            for kernel, item in _launches(variant, target).items():
                source = source_of(item, architecture_named(target).target)
                key = (target, source.hash(), str(item.options))
                if key not in seen and (not kernels or kernel in kernels):
                    seen.add(key)
                    jobs.append((variant, target, kernel))
    context = multiprocessing.get_context("spawn")
    results = []
    with concurrent.futures.ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=ends_with_its_parent
    ) as pool:
        for result in pool.map(_run, jobs):
            results.append(result)
            progress(len(results), len(jobs))
    return results
