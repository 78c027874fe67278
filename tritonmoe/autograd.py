"""What every autograd Function of this package needs: no autocast inside, and one derivative only, said clearly."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["SECOND_DERIVATIVE", "is_autocast_on", "once_differentiable", "outside_graphs", "without_autocast"]

SECOND_DERIVATIVE = (
    "the gradients of tritonmoe's experts cannot be differentiated again: their backward is one operation without a "
    "derivative of its own, in every backend. For a gradient penalty or a Hessian write the experts in plain PyTorch"
)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Give a context in which autocast casts nothing: dtypes are decided before, and sums stay in fp32."""
    return torch.autocast(device.type, enabled=False) if is_autocast_on(device) else nullcontext()


def is_autocast_on(device: torch.device) -> bool:
    # Not torch.amp.is_autocast_available, which torch 2.10's dynamo can't trace; meta tensors have no autocast.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


outside_graphs = torch._disable_dynamo
"""Wrap a function that torch.compile calls but does not look into: torch.compiler.disable without importing dynamo.

torch.compiler.disable imports it where a function is defined, which would make `import tritonmoe` take seconds; this
does so at the first call. Callers ask torch.compiler.is_compiling() before they come here, so eager calls never do.
"""


class _FirstDerivative(torch.autograd.Function):
    """Hands gradients on, attached to a graph that raises when they are differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.detach() for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(SECOND_DERIVATIVE)


def once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wrap a Function's backward(ctx, dout): no graph and no autocast inside; a second derivative raises RuntimeError.

    torch.autograd.function.once_differentiable does the first and the last, with an error that names nobody.
    """

    @wraps(backward)
    def once(ctx: Any, dout: Tensor) -> tuple:
        creates_graph = torch.is_grad_enabled()
        with torch.no_grad(), without_autocast(dout.device):
            grads = backward(ctx, dout)
        if not creates_graph:
            return grads
        return _FirstDerivative.apply(torch.empty(0, requires_grad=True), *grads)

    return once
