"""Compile launches for a GPU that isn't there and run them on tensors in this process's memory."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonmoe.ops.aot.launches import source_of
from tritonmoe.ops.kernels import launch
from virtual_gpu.amd import machine as amd_machine
from virtual_gpu.amd import parser as amd_parser
from virtual_gpu.amd import translation as amd_translation
from virtual_gpu.amd.arguments import argument_segment
from virtual_gpu.arithmetic import bits_of_scalar
from virtual_gpu.memory import GlobalMemory, View
from virtual_gpu.nvidia import machine as nvidia_machine
from virtual_gpu.nvidia import parser as nvidia_parser
from virtual_gpu.nvidia import translation as nvidia_translation
from virtual_gpu.nvidia.tensor_map import TensorMap

__all__ = ["run_launch"]

SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}
"""By the numbers that Triton's compiler and CUDA's driver give swizzles."""

_compiled: dict[tuple[str, str, str], Any] = {}
"""What `triton.compile` gave, which asks its cache on disk each time."""


def run_launch(item: launch.Launch, target: GPUTarget, edit: Callable[[str], str] = lambda assembly: assembly) -> None:
    """Run a launch on CPU tensors as a `target` would; `edit` changes the assembly first.

    Raises:
        MemoryFault, Deadlock: see `memory` and the machines.
        NotImplementedError: for an instruction that the machine doesn't know.
    """
    source = source_of(item, target)
    key = (source.hash(), str(target), repr(sorted(item.options.items())))
    if key not in _compiled:
        _compiled[key] = _compile(source, target, item.options)
    compiled = _compiled[key]
    names = [parameter.name for parameter in item.kernel.params]
    values = {**dict(zip(names, item.args, strict=False)), **item.constexprs}
    descriptors = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    parameters: list[Any] = []
    spans: list[View] = []
    for name, kind in source.signature.items():
        if kind == "constexpr":
            continue
        value = values[name]
        if isinstance(value, TensorDescriptor):
            spans.append(_view(value.base))
            parameters += [_tensor_map(value, next(descriptors)), *value.shape, *value.strides]
        elif isinstance(value, Tensor):
            spans.append(_view(value))
            parameters.append(value.data_ptr())
        else:
            parameters.append(bits_of_scalar(value, kind))
    x, y, z = (*item.grid, 1, 1)[:3]
    shared_bytes = compiled.metadata.shared
    if target.backend == "hip":
        program = _amd_translation(edit(compiled.asm["amdgcn"]))
        segment = argument_segment(program.kernel, parameters, (x, y, z), shared_bytes)
        spans.append(View(segment.ctypes.data, (segment.nbytes,), (1,), 1))
        amd_machine.run_grid(program, segment, GlobalMemory(spans), shared_bytes, (x, y, z))
        return
    translation = _nvidia_translation(edit(compiled.asm["ptx"]))
    parameters += [0] * (len(translation.kernel.parameters) - len(parameters))  # scratch memory: none
    # Before 3.7.1 Triton fences no asynchronous copies: tritonmoe/ops/kernels/tiles/tile_choice.py says what follows.
    checks_fences = target.arch != 90 or launch.TRITON_VERSION >= (3, 7, 1)
    nvidia_machine.run_grid(translation, parameters, GlobalMemory(spans), shared_bytes, (x, y, z), checks_fences)


def _compile(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Any:
    """Compile as far as the assembly: what ptxas makes of it nobody reads here, and it takes a quarter of the time.

    What has no binary is kept apart from what a launch would look for in Triton's cache.
    """
    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = _leave_out_ptxas
        knobs.cache.dir = str(Path(knobs.cache.dir) / "no_binaries")
        return triton.compile(source, target=target, options=options)


def _leave_out_ptxas(backend: Any = None, stages: dict[str, Any] | None = None, *_: Any) -> tuple[str, str]:
    """Stand as Triton's hook on the stages of a compilation; without stages it asks for a part of its cache's key."""
    if stages is not None and "cubin" in stages:
        stages["cubin"] = lambda ptx, metadata: b""
    return "", ""


@functools.lru_cache(256)
def _nvidia_translation(ptx: str) -> nvidia_translation.Translation:
    return nvidia_translation.translate(nvidia_parser.parse(ptx))


@functools.lru_cache(256)
def _amd_translation(assembly: str) -> amd_translation.Translation:
    return amd_translation.translate(amd_parser.parse(assembly))


def _view(tensor: Tensor) -> View:
    return View(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.element_size())


def _tensor_map(descriptor: TensorDescriptor, meta: dict[str, Any]) -> TensorMap:
    return TensorMap(
        descriptor.base.data_ptr(),
        tuple(descriptor.shape),
        tuple(descriptor.strides),
        tuple(meta["block_size"]),
        meta["elem_size"],
        SWIZZLE_BYTES[meta["swizzle"]],
    )
