"""Triton's interpreter as the tests run it: it rounds as a GPU does, and looks nothing up twice.

Import it with TRITON_INTERPRET set. In the interpreter the sums of a tile's product are rounded from fp64. Some of
OpenBLAS's fp32 kernels (the CPU chooses) round a row differently at another place of the tile, which no tensor core
does: bits would depend on the neighbours.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy
from triton.runtime import interpreter

patch_lang = interpreter._patch_lang
patched: set[Any] = set()
"""The modules of the language that are patched while a kernel runs; launches come one after the other."""


scalar_dtype = functools.cache(interpreter._get_np_dtype)


def numpy_dtype(triton_dtype):
    is_pointer = isinstance(triton_dtype.scalar, interpreter.tl.pointer_type)
    return numpy.dtype(numpy.uint64) if is_pointer else scalar_dtype(triton_dtype.scalar)


def create_dot(builder, a, b, accumulator, input_precision, max_num_imprecise_acc):
    product = numpy.matmul(a.data, b.data, dtype=numpy.float64).astype(accumulator.data.dtype)
    return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


@functools.cache
def languages_of(function: Callable) -> frozenset:
    modules = (value for value in function.__globals__.values() if inspect.ismodule(value))
    return frozenset(module for module in modules if module in (interpreter.tl, interpreter.tl.core))


def patch_lang_once(function: Callable) -> Any:
    """Patch the language for a kernel, and for a device function that it calls only what is not patched yet."""
    if patched and languages_of(function) <= patched:
        return interpreter._LangPatchScope()
    patched.update(languages_of(function))
    scope = patch_lang(function)
    restore = scope.restore

    def restore_all() -> None:
        restore()
        patched.clear()

    scope.restore = restore_all
    return scope


def install() -> None:
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang = patch_lang_once
    interpreter._get_np_dtype = numpy_dtype
