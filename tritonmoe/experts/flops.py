"""What operators and kernels cost, told to torch.utils.flop_counter once somebody counts.

A FlopCounterMode sees operators. This package's own have formulas here; those of the other backends are PyTorch's. The
kernels of the Triton backend, where they don't run inside an operator, are no operators: count_products() calls one in
their place that does nothing but cost what they do.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tritonmoe.config.formats import logical_shape
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.backends import launches_kernels
from tritonmoe.ops.backends.ops import Operations
from tritonmoe.ops.backends.pair_work import grad_multiplications, multiplications

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "FLOP_FORMULAS",
    "Shape",
    "backward_flops",
    "count_products",
    "forward_flops",
    "matrix_sizes",
    "register_flop_formulas",
]

Shape = tuple[int, ...]


def matrix_sizes(
    weight: Sequence[int], factor_a: Sequence[int] | None, factor_b: Sequence[int] | None
) -> tuple[int, int, int]:
    """Return how many elements an expert has of a weight, and of the factors of its adapter, of shapes (E, ., .)."""

    def size(shape: Sequence[int] | None) -> int:
        return 0 if shape is None else shape[1] * shape[2]

    return size(weight), size(factor_a), size(factor_b)


def forward_flops(shapes: CallTensors[Shape]) -> int:
    """Return 6*N*D*F gated, 4*N*D*F ungated, and what adapters add; N = T*K, skipped pairs included."""
    return 2 * _num_pairs(shapes) * sum(multiplications(*sizes) for sizes in _sizes(shapes))


def backward_flops(shapes: CallTensors[Shape], needs: CallTensors[bool], computes_h: bool) -> int:
    """Return twice the forward's where all is wanted; less for frozen tensors, more where h is computed again."""
    gate_up, down = _sizes(shapes)
    of = needs.weights
    trained = [of.gate_up_proj, of.gate_up_a, of.gate_up_b, of.down_proj, of.down_a, of.down_b]
    of_pair = grad_multiplications(*gate_up, needs.x) + grad_multiplications(*down, True)
    of_pair += sum(size for size, is_needed in zip([*gate_up, *down], trained, strict=True) if is_needed)
    return 2 * _num_pairs(shapes) * (of_pair + (multiplications(*gate_up) if computes_h else 0))


def _num_pairs(shapes: CallTensors[Shape]) -> int:
    num_tokens, top_k = shapes.topk_weights
    return num_tokens * top_k


def _sizes(shapes: CallTensors[Shape]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return matrix_sizes() of the up-projection and of the down-projection."""
    of = shapes.weights
    return (
        matrix_sizes(logical_shape(of.gate_up_proj, of.gate_up_scales), of.gate_up_a, of.gate_up_b),
        matrix_sizes(logical_shape(of.down_proj, of.down_scales), of.down_a, of.down_b),
    )


@torch.library.custom_op("tritonmoe::grouped_products", mutates_args=())
def _grouped_products(like: Tensor, flops: int) -> None:
    """Stand for kernels whose FLOPs are counted; compute nothing. like: a tensor on their device."""


def _given_flops(like: Shape, flops: int, *_: object, **__: object) -> int:
    return flops


FLOP_FORMULAS: dict[object, Callable[..., int]] = {torch.ops.tritonmoe.grouped_products: _given_flops}
"""Operator -> its FLOPs, from shapes in place of tensors; modules with operators add theirs."""


def register_flop_formulas() -> None:
    """Register the operators' formulas with torch.utils.flop_counter, once somebody counts.

    Not before: its module imports triton. A FlopCounterMode copies the formulas when it is made, so those that are at
    work already are told as well.
    """
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None:
        return
    for operator, formula in FLOP_FORMULAS.items():
        if operator not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operator)(formula)
    for counter in _counters_at_work(flop_counter):
        counter.flop_registry.update({operator: flop_counter.flop_registry[operator] for operator in FLOP_FORMULAS})


def count_products(ops: Operations, like: Tensor, num_pairs: int, multiplications: Callable[[], int]) -> None:
    """Count kernels that multiply each of num_pairs pairs so many times; nothing where the mode sees the products.

    On one device skipped pairs are counted too: how many there are is known to the device alone.
    """
    if torch._C._len_torch_dispatch_stack() == 0 or not launches_kernels(ops):
        return
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is not None and any(_counters_at_work(flop_counter)):
        register_flop_formulas()
        _grouped_products(like, 2 * num_pairs * multiplications())


def _counters_at_work(flop_counter: ModuleType) -> Iterator["FlopCounterMode"]:
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, flop_counter.FlopCounterMode):
            yield counter
