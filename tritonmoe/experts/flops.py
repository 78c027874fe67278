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

from tritonmoe.backends import launches_kernels
from tritonmoe.backends.ops import Operations
from tritonmoe.config.formats import logical_shape
from tritonmoe.experts.tensors import CallTensors

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "FLOP_FORMULAS",
    "Shape",
    "backward_flops",
    "count_products",
    "forward_flops",
    "matrix_size",
    "register_flop_formulas",
]

Shape = tuple[int, ...]


def matrix_size(shape: Sequence[int]) -> int:
    """Return the multiplications of one pair with its expert's matrix of a weight of this shape (E, ., .)."""
    return shape[1] * shape[2]


def forward_flops(shapes: CallTensors[Shape]) -> int:
    """Return 6*N*D*F gated, 4*N*D*F ungated, and what adapters add; N = T*K, skipped pairs included."""
    return 2 * sum(_products(shapes).values())


def backward_flops(shapes: CallTensors[Shape], needs: CallTensors[bool], computes_h: bool) -> int:
    """Return twice the forward's where all is wanted; less for frozen tensors, more where h is computed again."""
    products = _products(shapes)
    of_x = {"gate_up_proj": needs.x, "gate_up_a": 1 + needs.x, "gate_up_b": 1}
    of_x |= {"down_proj": 1, "down_a": 2, "down_b": 1}
    again = {"gate_up_proj", "gate_up_a", "gate_up_b"} if computes_h else set()
    return 2 * sum(
        size * (of_x[name] + bool(getattr(needs.weights, name)) + (name in again)) for name, size in products.items()
    )


def _products(shapes: CallTensors[Shape]) -> dict[str, int]:
    """Return the multiplications of every pair with its expert's matrices, of the weights that are matrices."""
    num_tokens, top_k = shapes.topk_weights
    weights = shapes.weights
    matrices = {name: getattr(weights, name) for name in ("gate_up_a", "gate_up_b", "down_a", "down_b")}
    matrices["gate_up_proj"] = logical_shape(weights.gate_up_proj, weights.gate_up_scales)
    matrices["down_proj"] = logical_shape(weights.down_proj, weights.down_scales)
    return {name: 0 if shape is None else num_tokens * top_k * matrix_size(shape) for name, shape in matrices.items()}


@torch.library.custom_op("tritonmoe::grouped_products", mutates_args=())
def _grouped_products(like: Tensor, flops: int) -> None:
    """Do nothing: stands for kernels that somebody counts. like: a tensor on their device."""


def _given_flops(like: Shape, flops: int, *_: object, **__: object) -> int:
    return flops


FLOP_FORMULAS: dict[object, Callable[..., int]] = {torch.ops.tritonmoe.grouped_products: _given_flops}
"""Operator -> its FLOPs, from shapes in place of tensors; modules with operators add theirs."""


def register_flop_formulas() -> None:
    """Tell torch.utils.flop_counter what the operators cost, once somebody counts.

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
