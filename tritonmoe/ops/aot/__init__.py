"""Compile every kernel ahead of time, without a GPU, and check that it fits: python -m tritonmoe.ops.aot

The backend's own operations run on meta tensors while `launch.recording` collects their launches, so what is
compiled here, argument specialisation included, is what a GPU would get.
"""

from tritonmoe.ops.aot.compilation import Compiled, compile_all, compile_one, compile_unchecked
from tritonmoe.ops.aot.launches import record_launches, source_of
from tritonmoe.ops.aot.variants import VARIANTS, Variant
from tritonmoe.ops.kernels.gpus import ARCHITECTURES, OTHER_ARCHITECTURES, Architecture, architecture_named

__all__ = [
    "ARCHITECTURES",
    "OTHER_ARCHITECTURES",
    "TARGETS",
    "VARIANTS",
    "Architecture",
    "Compiled",
    "Variant",
    "architecture_named",
    "compile_all",
    "compile_one",
    "compile_unchecked",
    "record_launches",
    "source_of",
]

TARGETS = {name: architecture.target for name, architecture in ARCHITECTURES.items()}
