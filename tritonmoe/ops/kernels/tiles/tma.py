"""Tiles read by TMA, the engine that copies boxes of a tensor into shared memory on NVIDIA GPUs since Hopper (sm_90).

Descriptors are made on the host for each launch and are arguments of the kernel: those made inside a kernel need
Triton's allocator, which is set for one thread at a time, and autograd runs backward in threads of its own. What TMA
can't read is read through pointers; both give the same tiles, so a row's bits don't depend on the way.
"""

import functools
from collections.abc import Mapping, Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "BY_TMA",
    "describe",
    "describe_weight",
    "halves",
    "innermost_last",
    "reads",
    "refusal",
    "refusal_of_copied_rows",
    "refusal_of_halves",
    "refusal_of_weight",
]

BY_TMA = "TMA"


def refusal(tensor: Tensor) -> str:
    """Return why TMA can't read boxes of `tensor`, axes from the outermost to the innermost; empty where it can.

    The rules are those of cuTensorMapEncodeTiled in the manual of the CUDA driver.
    """
    shape = tuple(tensor.shape)
    if 0 in shape:
        return f"shape {shape} is empty"
    return _refusal(shape[1:], tensor.stride(), tensor.data_ptr() % 16 == 0, tensor.element_size())


@functools.lru_cache(maxsize=4096)
def _refusal(inner_shape: tuple[int, ...], strides: tuple[int, ...], is_aligned: bool, element_size: int) -> str:
    """Return the same for a tensor with these strides whose axes after the first have this shape; every launch asks."""
    if strides[-1] != 1:
        return f"no axis of a tile is contiguous, strides are {strides}"
    if not is_aligned:
        return "its address is no multiple of 16 bytes"
    for axis, stride in enumerate(strides[:-1]):
        stride_bytes = stride * element_size
        if stride_bytes % 16 or stride_bytes >= 2**40:
            return f"{stride_bytes} bytes along axis {axis} are no multiple of 16 below 2^40"
        if stride < strides[axis + 1] * inner_shape[axis] or stride % strides[axis + 1]:
            return f"strides {strides} are not nested, the axes after the first have shape {inner_shape}"
    return ""


def refusal_of_weight(weight: Tensor) -> str:
    """Return why TMA can't read tiles of a weight (E, rows, columns), whichever axis is contiguous."""
    return refusal(innermost_last(weight))


def refusal_of_halves(weight: Tensor, out_axis: int) -> str:
    """Return why TMA can't read a tile's gate and up columns at once."""
    shape, strides = halves(weight, out_axis)
    if strides[2] == 1 != strides[3]:
        return "a tile's gate and up columns are two pieces of its contiguous axis"
    if 0 in shape:
        return f"shape {shape} is empty"
    return _refusal(shape[1:], strides, weight.data_ptr() % 16 == 0, weight.element_size())


def refusal_of_copied_rows(tensor: Tensor, num_rows: int) -> str:
    """Return why TMA couldn't read boxes of `num_rows` rows of `tensor`, copied one behind the other."""
    width = tensor.shape[1]
    if num_rows == 0 or width == 0:
        return f"shape {(num_rows, width)} is empty"
    return _refusal((width,), (width, 1), True, tensor.element_size())


def reads(refusals: Mapping[str, str], unusable: str) -> tuple[tuple[str, str], ...]:
    """Return how the tiles of each operand are read: (name, BY_TMA), or (name, "pointers: " and the reason).

    refusals: why TMA can't read an operand. unusable: why it can read none of them. Empty where it can.
    """
    reasons = {name: unusable or refused for name, refused in refusals.items()}
    return tuple((name, f"pointers: {reason}" if reason else BY_TMA) for name, reason in reasons.items())


def describe(
    tensor: Tensor, box: Sequence[int], shape: Sequence[int] | None = None, strides: Sequence[int] | None = None
) -> TensorDescriptor:
    """Return the descriptor of a tensor that `refusal` has nothing against; what lies beyond its end is read as zeros.

    shape, strides: where the descriptor's are not the tensor's.
    """
    # Its constructor takes longer than a launch, and checks what `refusal` has checked.
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.block_shape = tensor, list(box)
    descriptor.shape = list(tensor.shape if shape is None else shape)
    descriptor.strides = list(tensor.stride() if strides is None else strides)
    return descriptor


def innermost_last(weight: Tensor) -> Tensor:
    """Return (E, rows, columns) as it is, or (E, columns, rows) where its rows are the contiguous axis."""
    return weight.mT if weight.stride(1) == 1 and weight.stride(2) != 1 else weight


def halves(weight: Tensor, out_axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return gate_up_proj's shape and strides as (E, 2, F, D); its `out_axis` has 2F columns, gate before up."""
    shape, strides = weight.shape, weight.stride()
    num_units, of_unit = shape[out_axis] // 2, strides[out_axis]
    return (
        (shape[0], 2, num_units, shape[3 - out_axis]),
        (strides[0], num_units * of_unit, of_unit, strides[3 - out_axis]),
    )


def describe_weight(weight: Tensor, in_axis: int, block_k: int, block_n: int) -> TensorDescriptor:
    """Describe a weight for `weight_tiles.load_tile`; `in_axis` is summed over."""
    boxes = {in_axis: block_k, 3 - in_axis: block_n}
    view = innermost_last(weight)
    return describe(view, (1, boxes[1], boxes[2]) if view is weight else (1, boxes[2], boxes[1]))
