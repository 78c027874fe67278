"""Launch a cubin without Triton's launchers, which differ from release to release: through CUDA's driver, or virtually.

A launch takes the bytes of the kernel's parameters, one after the other, as the cubin's PTX declares them.
"""

import base64
import ctypes
import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bench.gpu.cubins import Cubin
from tritonmoe.runtime.files import Json
from virtual_gpu.launcher import SWIZZLE_BYTES
from virtual_gpu.memory import GlobalMemory, View
from virtual_gpu.nvidia.machine import run_grid
from virtual_gpu.nvidia.parser import parse
from virtual_gpu.nvidia.tensor_map import TensorMap
from virtual_gpu.nvidia.translation import Translation, translate

__all__ = ["CudaDriver", "Driver", "VirtualDriver"]

Grid = tuple[int, int, int]
MAP_BYTES, MAP_ALIGNMENT = 128, 64
SHARED_BYTES_BY_DEFAULT = 48 * 1024
MAX_DYNAMIC_SHARED_BYTES = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
PREFER_SHARED = 1
"""CU_FUNC_CACHE_PREFER_SHARED, which Triton's launchers ask for too."""
DATA_TYPES = {8: 10, 9: 8, 10: 9}
"""CUtensorMapDataType of the numbers that Triton's compiler gives elements, where it is another number."""
PROMOTES_128_BYTES = 2
"""CU_TENSOR_MAP_L2_PROMOTION_L2_128B, as Triton's launchers say."""


class Driver(Protocol):
    """What launches cubins."""

    def tensor_map(self, tensor: Tensor, shape: Sequence[int], strides: Sequence[int], box: Json) -> bytes:
        """Return the parameter that describes a tensor to TMA; shape and strides in elements, the outermost axis first.

        box: what Triton's compiler says of it.
        """

    def launch(self, cubin: Cubin, grid: Grid, parameters: Sequence[bytes], tensors: Sequence[Tensor]) -> None:
        """Launch on the current stream of the tensors' device, which reads and writes these tensors."""


class CudaDriver:
    """CUDA's driver, in the context that PyTorch has made."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        self._library = ctypes.CDLL(library)
        self._functions: dict[str, ctypes.c_void_p] = {}

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            said = text.value.decode() if text.value else "an error that this driver has no words for"
            raise RuntimeError(f"{name} gives {status}: {said}")

    def tensor_map(self, tensor: Tensor, shape: Sequence[int], strides: Sequence[int], box: Json) -> bytes:
        """Return what cuTensorMapEncodeTiled makes, whose axes begin with the innermost one."""
        rank = len(shape)
        size: int = box["elem_size"]
        kind: int = box["elem_type"]
        memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        begin = -ctypes.addressof(memory) % MAP_ALIGNMENT
        self._call(
            "cuTensorMapEncodeTiled",
            ctypes.byref(memory, begin),
            ctypes.c_int(DATA_TYPES.get(kind, kind)),
            ctypes.c_uint32(rank),
            ctypes.c_void_p(tensor.data_ptr()),
            (ctypes.c_uint64 * rank)(*shape[::-1]),
            (ctypes.c_uint64 * max(1, rank - 1))(*(size * stride for stride in strides[-2::-1])),
            (ctypes.c_uint32 * rank)(*box["block_size"][::-1]),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            ctypes.c_int(0),  # not interleaved
            ctypes.c_int(box["swizzle"]),
            ctypes.c_int(PROMOTES_128_BYTES),
            ctypes.c_int(0),  # zeros outside the tensor
        )
        return memory.raw[begin : begin + MAP_BYTES]

    def _function(self, cubin: Cubin) -> ctypes.c_void_p:
        """Return the loaded entry of a cubin, which may take as much shared memory as it needs."""
        if cubin.image not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), base64.b64decode(cubin.image))
            self._call("cuModuleGetFunction", ctypes.byref(function), module, cubin.kernel.encode())
            if cubin.shared_bytes > SHARED_BYTES_BY_DEFAULT:
                self._call("cuFuncSetCacheConfig", function, ctypes.c_int(PREFER_SHARED))
                most = ctypes.c_int(cubin.shared_bytes)
                self._call("cuFuncSetAttribute", function, ctypes.c_int(MAX_DYNAMIC_SHARED_BYTES), most)
            self._functions[cubin.image] = function
        return self._functions[cubin.image]

    def launch(self, cubin: Cubin, grid: Grid, parameters: Sequence[bytes], tensors: Sequence[Tensor]) -> None:
        """Launch through cuLaunchKernel, which copies the parameters before it returns."""
        function = self._function(cubin)
        held = [ctypes.create_string_buffer(each, len(each)) for each in parameters]
        addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
        sizes = (*grid, cubin.num_threads, 1, 1, cubin.shared_bytes)
        self._call("cuLaunchKernel", function, *map(ctypes.c_uint, sizes), ctypes.c_void_p(stream), addresses, None)


class VirtualDriver:
    """A GPU in NumPy, which reads the same bytes and runs the PTX from which the cubin was assembled."""

    def __init__(self, target_arch: int, compiled_by: str) -> None:
        # Before 3.7.1 Triton fences no asynchronous copies on Hopper.
        self._checks_fences = target_arch != 90 or tuple(map(int, re.findall(r"\d+", compiled_by)[:3])) >= (3, 7, 1)
        self._maps: dict[bytes, TensorMap] = {}
        self._translations: dict[str, Translation] = {}

    def tensor_map(self, tensor: Tensor, shape: Sequence[int], strides: Sequence[int], box: Json) -> bytes:
        """Return bytes by which `launch` knows the descriptor."""
        name = len(self._maps).to_bytes(MAP_BYTES, "little")
        swizzle_bytes, block = SWIZZLE_BYTES[box["swizzle"]], tuple(box["block_size"])
        self._maps[name] = TensorMap(
            tensor.data_ptr(), tuple(shape), tuple(strides), block, box["elem_size"], swizzle_bytes
        )
        return name

    def launch(self, cubin: Cubin, grid: Grid, parameters: Sequence[bytes], tensors: Sequence[Tensor]) -> None:
        """Run all programs, one after the other."""
        if cubin.ptx not in self._translations:
            self._translations[cubin.ptx] = translate(parse(cubin.ptx))
        translation = self._translations[cubin.ptx]
        assert [len(each) for each in parameters] == [one.num_bytes for one in translation.kernel.parameters]
        values = [self._maps[each] if len(each) == MAP_BYTES else int.from_bytes(each, "little") for each in parameters]
        views = [View(one.data_ptr(), tuple(one.shape), one.stride(), one.element_size()) for one in tensors]
        run_grid(translation, values, GlobalMemory(views), cubin.shared_bytes, grid, self._checks_fences)
