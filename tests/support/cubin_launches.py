"""Run by test_gpu_cubins.py in a process without the interpreter: cubins of a small layer, launched in two ways.

`bytes FOLDER`: over a driver that runs nothing, beside Triton's own launcher, comparing what the driver is given.
`values`: on the virtual GPU, beside the launches of the installed Triton. Each prints a line for every operation.
"""

import ctypes
import dataclasses
import sys
import types
from pathlib import Path

import torch

from bench.gpu import beside_cubins, cubins
from bench.gpu.cubin_drivers import CudaDriver
from bench.gpu.setting import DAY, REHEARSAL, SMALL, Setting
from bench.gpu.workbench import Workbench
from bench.launch import take_launches
from tritonmoe.ops.aot import TARGETS
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.compiled import compiled_kernels
from tritonmoe.tools.benchmarks.shapes import draw_inputs, operation_calls

NUM_TOKENS = 300
"""Enough pairs for each expert that its tiles are the headline's."""


class Small(Setting):
    shapes = types.MappingProxyType(dict.fromkeys(DAY.shapes, SMALL))


FIELDS = {field.name: getattr(REHEARSAL, field.name) for field in dataclasses.fields(REHEARSAL)}
SETTING = Small(**FIELDS | {"dtype_name": "bfloat16"})


class Given:
    """What the stand-in driver was given by the last launch."""

    def __init__(self, library: str) -> None:
        self.library = ctypes.CDLL(library)
        self.bytes = (ctypes.c_ubyte * 8192).in_dll(self.library, "parameters")

    def expect(self, sizes: list[int]) -> None:
        ctypes.c_uint.in_dll(self.library, "num_parameters").value = len(sizes)
        (ctypes.c_uint * 64).in_dll(self.library, "parameter_bytes")[: len(sizes)] = sizes
        ctypes.memset(self.bytes, 0xAB, len(self.bytes))

    def last(self) -> tuple[list[int], bytes]:
        return list((ctypes.c_uint * 7).in_dll(self.library, "launch_sizes")), bytes(self.bytes)


def compare_bytes(folder: Path) -> None:
    take_launches(folder)
    library = str(folder / "libcuda.so.1")
    given, driver = Given(library), CudaDriver(library)
    torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0)
    inputs = draw_inputs(SMALL, NUM_TOKENS, "uniform", torch.bfloat16, torch.device("cpu"))
    calls = operation_calls(inputs, "triton")
    for operation in DAY.compiled_operations:
        compiled = cubins.compile_operation(SETTING, operation, NUM_TOKENS, "sm_90")
        with launch.recording(TARGETS["sm_90"]) as launches:
            calls[operation]()
        for item in launches:
            kernel = item.kernel.__name__
            kinds = [kind for _, _, kind in compiled.cubins[kernel].parameters]
            given.expect([cubins.SIZES[kind] for kind in kinds])
            compiled_kernels(item.kernel).launch(0, item.grid, item.args, item.constexprs, item.options)
            theirs = given.last()
            given.expect([cubins.SIZES[kind] for kind in kinds])
            beside_cubins.ByCubins(compiled, driver)(item)
            assert given.last() == theirs, (kernel, given.last()[0], theirs[0])
            print(operation, kernel, len(kinds), kinds.count("map"))


def compare_values() -> None:
    bench = Workbench(SETTING)
    for operation in DAY.compiled_operations:
        compiled = cubins.compile_operation(SETTING, operation, NUM_TOKENS, "sm_90")
        found = next(beside_cubins.compare(compiled, NUM_TOKENS, bench))
        assert found["passed"], (operation, found)
        assert found["has_equal_bits"], (operation, found)
        print(operation, *compiled.cubins)
    bench.clocks.close()


if __name__ == "__main__":
    compare_bytes(Path(sys.argv[2])) if sys.argv[1] == "bytes" else compare_values()
