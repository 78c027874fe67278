"""Triton's interpreter as the tests run it: it rounds as a GPU does, and computes nothing twice or for nobody.

Import it with TRITON_INTERPRET set. In the interpreter the sums of a tile's product are rounded from fp64. Some of
OpenBLAS's fp32 kernels (the CPU chooses) round a row differently at another place of the tile, which no tensor core
does: bits would depend on the neighbours.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy
from triton.runtime import interpreter

core = interpreter.tl.core
patch_lang = interpreter._patch_lang
unwrap_any = core._unwrap_if_constexpr
patched: set[Any] = set()
"""The modules of the language that are patched while a kernel runs; launches come one after the other."""
scopes: list[Any] = []
"""What a launch has patched: Triton forgets what a device function patches, and no kernel could be compiled then."""


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
    scopes.append(scope)
    scope.restore = restore_all
    return scope


def restore_all() -> None:
    """Restore the language when a launch ends: Triton calls this of the kernel's own scope alone."""
    while scopes:
        interpreter._LangPatchScope.restore(scopes.pop())
    patched.clear()


def unwrap(value: Any) -> Any:
    return unwrap_any(value) if isinstance(value, core.constexpr | core.tuple | list | tuple) else value


@functools.cache
def checked_shape(sizes: tuple[int, ...]) -> tuple[Any, int]:
    """Return the shape of a type of blocks, made and checked once, and its number of values."""
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    return core.tuple(sizes), core.validate_block_shape(sizes)


@functools.cache
def tensor_shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))


def init_block_type(block_type: Any, element_type: Any, shape: Iterable[Any]) -> None:
    block_type.element_ty = element_type
    block_type.shape, block_type.numel = checked_shape(tuple(map(unwrap, shape)))


def same_block_type(block_type: Any, other: Any) -> bool:
    is_block = isinstance(other, core.block_type)
    return is_block and block_type.shape is other.shape and block_type.element_ty == other.element_ty


def init_tensor(tensor: Any, handle: Any, of_type: Any) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, of_type, of_type.scalar
    tensor.shape, tensor.numel = tensor_shape(tuple(of_type.shape.values) if of_type.is_block() else ())


def install() -> None:
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang = patch_lang_once
    interpreter._get_np_dtype = numpy_dtype
    options = interpreter.interpreter_builder.options
    assert not options.debug
    # Without debug, which asserts, sums of integers are made a second time in 64 bits and compared for nobody.
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    core._unwrap_if_constexpr = unwrap
    core.tensor.__init__ = init_tensor
    core.block_type.__init__ = init_block_type
    core.block_type.__eq__ = same_block_type
    core.block_type.name = property(lambda block_type: f"<{block_type.shape}, {block_type.element_ty}>")
