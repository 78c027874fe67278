"""How kernels are launched: pinned options, one lock for the interpreter, and launches that are caught instead.

Kernel arguments that grow with the number of rows are never specialised, nor is the alignment of indices and weights of
which a chunk takes a part: each new value would cost a compilation in the middle of training.
"""

import contextlib
import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tritonmoe.config.layer import KernelOptions
from tritonmoe.ops.kernels.compiled import compiled_kernels
from tritonmoe.ops.kernels.gpus import Architecture, architecture_like
from tritonmoe.ops.kernels.tiles.config import TileConfig

__all__ = [
    "INTERPRETED",
    "TRITON_VERSION",
    "Launch",
    "architecture_of",
    "cdiv",
    "compiled_for",
    "contiguous_columns",
    "dot_precision",
    "gpu_of",
    "launch",
    "next_power_of_2",
    "num_programs",
    "output",
    "recording",
    "target_of",
    "tile_keywords",
]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether this process runs kernels in Triton's interpreter (TRITON_INTERPRET=1)."""

TRITON_VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
_interpreter_lock = threading.Lock()


@dataclass(frozen=True)
class Launch:
    """A launch that `recording` caught instead of running it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]


@dataclass
class _Recording:
    target: GPUTarget
    run: Callable[[Launch], None] | None
    launches: list[Launch]


_recording: _Recording | None = None


@contextlib.contextmanager
def recording(target: GPUTarget, run: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Collect launches, as `target` would get them, instead of running them (works on meta tensors).

    run: called with each launch as it is caught, to fill its outputs in another way than on the target.
    """
    global _recording
    before, _recording = _recording, _Recording(target, run, [])
    try:
        yield _recording.launches
    finally:
        _recording = before


@functools.cache
def _device_target(index: int) -> GPUTarget:
    if torch.version.hip is not None:
        properties = torch.cuda.get_device_properties(index)
        return GPUTarget("hip", properties.gcnArchName.split(":")[0], properties.warp_size)
    major, minor = torch.cuda.get_device_capability(index)
    return GPUTarget("cuda", 10 * major + minor, 32)


def target_of(device: torch.device) -> GPUTarget | None:
    """Return the GPU that kernels on `device` are compiled for; None for the interpreter."""
    if _recording is not None:
        return _recording.target
    if INTERPRETED:
        return None
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


def architecture_of(target: GPUTarget | None) -> str:
    """Name a target as tile configurations do: "sm_90", "gfx942", "interpreter"."""
    if target is None:
        return "interpreter"
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def gpu_of(device: torch.device) -> Architecture:
    """Return the row of the table of GPUs for the one that kernels on `device` are compiled for."""
    return architecture_like(architecture_of(target_of(device)))


def compiled_for(semantic: Any) -> Architecture:
    """Return the row of the table of GPUs for the compiler's target; semantic: the `_semantic` of a builtin."""
    return architecture_like(semantic.builder.options.arch.replace("sm", "sm_"))


@functools.cache
def _options(num_warps: int, num_stages: int, max_registers: int | None) -> dict[str, Any]:
    """Return the options of a launch, with what every launch fixes: Triton's default for FP fusion changes."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    with contextlib.suppress(ImportError):
        from triton.backends.nvidia.compiler import CUDAOptions

        if any(field.name == "enable_fp_fusion" for field in dataclasses.fields(CUDAOptions)):
            options["enable_fp_fusion"] = True
    return options if max_registers is None else {**options, "maxnreg": max_registers}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int | None = None,
    **constexprs: Any,
) -> None:
    """Run `kernel` over `grid`; an empty grid is nothing to do.

    args: the first is a tensor or a descriptor of one; the kernel runs on its device.
    max_registers: how many registers a thread may have, on NVIDIA. Without it ptxas may spill some bytes so that one
    more program fits.
    The interpreter patches module globals while it runs, so its launches take turns.
    """
    if 0 in grid:
        return
    on_nvidia = torch.version.hip is None if _recording is None else _recording.target.backend == "cuda"
    options = _options(num_warps, num_stages, max_registers if on_nvidia else None)
    if _recording is not None:
        caught = Launch(kernel, grid, args, constexprs, options)
        _recording.launches.append(caught)
        if _recording.run is not None:
            _recording.run(caught)
    elif INTERPRETED:
        with _interpreter_lock:
            kernel[grid](*args, **constexprs)
    else:
        first = args[0]
        index = (first if isinstance(first, Tensor) else first.base).device.index
        if index != torch.cuda.current_device():  # to ask costs less than to enter the device
            with torch.cuda.device(index):
                compiled_kernels(kernel).launch(index, grid, args, constexprs, options)
        else:
            compiled_kernels(kernel).launch(index, grid, args, constexprs, options)


def cdiv(dividend: int, divisor: int) -> int:
    """Return the quotient rounded up. Triton's own, which kernels may call too, takes 4 us on the host."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is no smaller than `number`, from 1 on; Triton's own takes 4 us too."""
    return 1 << (number - 1).bit_length()


def tile_keywords(config: TileConfig, like: Tensor) -> dict[str, Any]:
    """Return the keywords of `launch` that say how a grouped product of such operands cuts its matrices into tiles."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "FLATTEN": config.persistent,
        "SUBTILES": config.subtiles,
        "PRECISION": dot_precision(like),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def num_programs(num_tiles: int, config: TileConfig, options: KernelOptions, device: torch.device) -> int:
    """Return the grid of a kernel whose programs walk all tiles: one for each tile, or as many as its SMs may take."""
    num_sms = options.num_sms
    if num_sms is None and config.persistent and device.type == "cuda":
        num_sms = _num_multiprocessors(torch.cuda.current_device() if device.index is None else device.index)
    return num_tiles if num_sms is None else min(num_sms * config.programs_per_multiprocessor, num_tiles)


@functools.cache
def _num_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def dot_precision(like: Tensor) -> str:
    """Return the PRECISION of `dot` of such tensors: tf32 for fp32, if the torch setting asks and the GPU has it."""
    if like.dtype != torch.float32:
        return "ieee"
    if not gpu_of(like.device).has_tf32:
        return "ieee"
    # allow_tf32 raises where the newer setting has been used; fp32_precision reflects both.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def contiguous_columns(tensor: Tensor) -> Tensor:
    """Return `tensor` (n, width) with columns side by side or expanded; rows may have any stride."""
    return tensor if tensor.stride(1) in (0, 1) or tensor.shape[1] == 1 else tensor.contiguous()


def output(like: Tensor, num_rows: int, num_columns: int, out: Tensor | None = None) -> Tensor:
    """Return `out`, whose rows must be contiguous, or new memory with the dtype and device of `like`."""
    if out is None:
        return like.new_empty(num_rows, num_columns)
    assert out.shape == (num_rows, num_columns), f"out is {tuple(out.shape)}, not {(num_rows, num_columns)}"
    assert num_columns == 1 or out.stride(1) == 1, f"rows of out must be contiguous, strides are {out.stride()}"
    return out
