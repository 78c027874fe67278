"""Compile every kernel ahead of time, without a GPU, and check that it fits: python -m tritonmoe.kernels.aot

The backend's own operations run on meta tensors while `launch.recording` collects their launches, so what is
compiled here, argument specialisation included, is what a GPU would get. Exits non-zero when a kernel doesn't
compile, spills on an NVIDIA target, or needs more shared memory than the target has.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..backends import triton as operations
from ..config import ClampedSwiGLU, ExpertLayout, FusedActivation
from . import launch

__all__ = ["TARGETS", "Compiled", "compile_all", "main"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_MEMORY_BYTES = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
TYPE_NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Variant:
    """One set of weights whose kernels are compiled; shapes are those of Qwen3-30B."""

    dtype: torch.dtype = torch.bfloat16
    layout: ExpertLayout = field(default_factory=ExpertLayout)
    activation: FusedActivation = "silu"
    hidden_size: int = 2048
    intermediate_size: int = 768
    num_experts: int = 64
    top_k: int = 8


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one target."""

    kernel: str
    target: str
    registers: int
    """A thread's registers (vector registers on AMD)."""
    spills: int
    """Bytes of stack a thread uses on NVIDIA, spilled vector registers on AMD."""
    shared_bytes: int
    error: str = ""

    @property
    def problem(self) -> str:
        """Say what is wrong; empty when the kernel is fit to run."""
        if self.error:
            return self.error
        if self.spills and self.target.startswith("sm_"):
            return f"spills {self.spills} bytes"
        limit = SHARED_MEMORY_BYTES[self.target]
        return f"needs more than {limit} bytes of shared memory" if self.shared_bytes > limit else ""


def record_launches(variant: Variant, target: GPUTarget) -> dict[str, launch.Launch]:
    """Run forward and backward of one layer on meta tensors and give its launches by operation and kernel."""
    v, rows = variant, 4096
    width = 2 * v.intermediate_size if v.layout.gated else v.intermediate_size
    w1_shape, w2_shape = (width, v.hidden_size), (v.hidden_size, v.intermediate_size)
    if v.layout.transposed:
        w1_shape, w2_shape = w1_shape[::-1], w2_shape[::-1]

    def empty(*shape: int, dtype: torch.dtype = v.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, dout = empty(rows, v.hidden_size), empty(rows, v.hidden_size)
    w1, w2 = empty(v.num_experts, *w1_shape), empty(v.num_experts, *w2_shape)
    b1, b2 = empty(v.num_experts, width), empty(v.num_experts, v.hidden_size)
    ids = empty(rows, v.top_k, dtype=torch.int64)
    weights = empty(rows, v.top_k, dtype=torch.float32)
    found: dict[str, launch.Launch] = {}

    with launch.recording(target) as launches:

        def name(operation: str) -> None:
            for item in launches:
                found[f"{operation} {item.kernel.__name__.strip('_').removesuffix('_kernel')}"] = item
            launches.clear()

        grouping = operations.group(ids, v.num_experts)
        name("group")
        operations.group(ids[:8], v.num_experts)
        name("group")
        h, a = operations.up(x, w1, b1, grouping, v.layout, v.activation)
        name("up")
        assert h is not None
        assert a is not None
        y = operations.down(a, w2, b2, grouping, v.layout)
        name("down")
        operations.combine(y, grouping.inverse, weights)
        name("combine")
        dh, scaled_a, _ = operations.down_grad(dout, w2, b2, h, weights, grouping, v.layout, v.activation)
        name("down_grad")
        operations.up_grad(dh, w1, grouping, v.layout)
        name("up_grad")
        operations.weight_grad(grouping, v.layout, x=x, dh=dh, gate_up_bias=True)
        name("weight_grad 1")
        operations.weight_grad(grouping, v.layout, dout=dout, scaled_a=scaled_a, topk_weights=weights, down_bias=True)
        name("weight_grad 2")
    return found


def source_of(item: launch.Launch) -> ASTSource:
    """Describe a launch as the just-in-time compiler would: 1 and None are constants, multiples of 16 are known."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = dict(zip(item.kernel.arg_names, item.args, strict=False)) | item.constexprs
    for index, argument in enumerate(item.kernel.arg_names):
        value = values[argument]
        specialize = not item.kernel.params[index].do_not_specialize
        if argument in item.constexprs or value is None or (specialize and type(value) is int and value == 1):
            signature[argument] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            signature[argument] = TYPE_NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(item.kernel, signature, constants, attributes)


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Give registers and stack bytes of a thread, from cuobjdump inside the triton package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"\b{key}:(\d+)", text)[1])  # type: ignore[index]
        for key in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def _amd_resources(assembly: str) -> tuple[int, int]:
    registers, spills = (
        int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # type: ignore[index]
        for key in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, spills


def compile_one(name: str, item: launch.Launch, target_name: str) -> Compiled:
    """Compile one launch for one target."""
    try:
        compiled = triton.compile(source_of(item), target=TARGETS[target_name], options=item.options)
        if "cubin" in compiled.asm:
            registers, spills = _nvidia_resources(compiled.asm["cubin"])
        else:
            registers, spills = _amd_resources(compiled.asm["amdgcn"])
    except Exception as error:
        return Compiled(name, target_name, 0, 0, 0, f"{type(error).__name__}: {error}"[:2000])
    return Compiled(name, target_name, registers, spills, compiled.metadata.shared)


def _variants(every_layout: bool) -> dict[str, Variant]:
    """Give the default variants (bf16, fp32), or the other layouts and activations too."""
    chosen = {"bf16": Variant(), "fp32": Variant(dtype=torch.float32)}
    if every_layout:
        clamped = ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0)
        chosen |= {
            "fp16": Variant(dtype=torch.float16),
            "bf16 gelu": Variant(activation="gelu"),
            "bf16 gelu_tanh": Variant(activation="gelu_tanh"),
            "bf16 transposed": Variant(layout=ExpertLayout(transposed=True)),
            "bf16 ungated": Variant(layout=ExpertLayout(gated=False), activation="relu2"),
            "bf16 interleaved": Variant(layout=ExpertLayout(interleaved=True), activation=clamped),
            "bf16 gpt-oss": Variant(
                layout=ExpertLayout(interleaved=True, transposed=True),
                activation=clamped,
                hidden_size=2880,
                intermediate_size=2880,
                num_experts=32,
                top_k=4,
            ),
            "bf16 odd": Variant(hidden_size=1001, intermediate_size=333, num_experts=60, top_k=6),
            "fp32 odd": Variant(torch.float32, hidden_size=1001, intermediate_size=333, num_experts=60, top_k=6),
            "bf16 sparse": Variant(num_experts=256),
            "bf16 tiny": Variant(hidden_size=1, intermediate_size=1, num_experts=1, top_k=1),
        }
    return chosen


def _jobs(target_names: list[str], every_layout: bool) -> Iterator[tuple[str, str, str, bool]]:
    for label, variant in _variants(every_layout).items():
        for target in target_names:
            if variant.dtype == torch.float32 and target != "sm_90":
                continue
            for name in record_launches(variant, TARGETS[target]):
                # What doesn't depend on the layout or the dtype is compiled once.
                if label == "bf16" or name.split()[0] not in ("group", "combine"):
                    yield label, target, name, every_layout


def _run(job: tuple[str, str, str, bool]) -> Compiled:
    label, target, name, every_layout = job
    item = record_launches(_variants(every_layout)[label], TARGETS[target])[name]
    return compile_one(f"{label} {name}", item, target)


def compile_all(target_names: list[str], every_layout: bool = False, num_workers: int = 2) -> list[Compiled]:
    """Compile the kernels of all variants for the given targets."""
    jobs = list(_jobs(target_names, every_layout))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        return list(pool.map(_run, jobs))


def print_table(results: list[Compiled]) -> None:
    """Print one line per kernel and one column per target: registers/spills/shared KB."""
    targets = list(dict.fromkeys(result.target for result in results))
    kernels = list(dict.fromkeys(result.kernel for result in results))
    by_key = {(result.kernel, result.target): result for result in results}
    width = max(map(len, kernels))
    print("registers / spills / shared KB")
    print(" " * width, *(f"{target:>16}" for target in targets))
    for kernel in kernels:
        cells = []
        for target in targets:
            result = by_key.get((kernel, target))
            if result is None:
                text = "-"
            elif result.error:
                text = "error"
            else:
                text = f"{result.registers} / {result.spills} / {result.shared_bytes / 1024:.0f}"
            cells.append(f"{text:>16}")
        print(f"{kernel:<{width}}", *cells)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print and say (as an exit status) whether every kernel is fit to run."""
    parser = argparse.ArgumentParser(prog="python -m tritonmoe.kernels.aot", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(DEFAULT_TARGETS))
    parser.add_argument("--all", action="store_true", help="also the other layouts, activations and shapes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        print("Triton's interpreter is on: nothing can be compiled. Unset TRITON_INTERPRET.", file=sys.stderr)
        return 2
    results = compile_all(options.targets, options.all, options.workers)
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        print_table(results)
    problems = [result for result in results if result.problem]
    for result in problems:
        print(f"{result.kernel} on {result.target}: {result.problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
