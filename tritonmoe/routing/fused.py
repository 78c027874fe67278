"""The router by kernels: where they take the place of PyTorch's operations, as an autograd Function and an operator.

As for the experts (experts/operator.py) plain eager calls go through the Function, which costs a tenth of what an
operator with a gradient formula does; compiled code has the operator `tritonmoe::route`. Both run the same kernels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tritonmoe.config.routing import decode
from tritonmoe.ops.backends import triton_unusable_reason
from tritonmoe.routing.replay import is_replaying
from tritonmoe.routing.token_routing import Routing
from tritonmoe.runtime.autograd import Context, once_differentiable, refuse_second_derivative, without_autocast
from tritonmoe.runtime.transforms import is_transformed

__all__ = ["is_fused", "route_by_kernels"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The fields of kernels.router_kernels.Routed: logits, scores, topk_ids, topk_weights, counts."""


def is_fused(backend: str, x: Tensor, weight: Tensor) -> bool:
    """Return whether kernels route x (T, D) by weight (E, D), instead of PyTorch's operations, which can be watched.

    Kernels do on a device where they run, if `backend` is "triton", or "auto" on a GPU; x and weight are plain tensors
    up to fp32; and nothing looks at the operations: no replay of the routing, which answers torch.topk; no dispatch
    mode (save_topk in eager code, FlopCounterMode, fake tensors); no transform of torch.func or forward-mode AD.
    """
    if x.dtype not in DTYPES or weight.dtype not in DTYPES or not _has_kernels(backend, x.device) or is_transformed():
        return False
    if torch.compiler.is_compiling():
        return True
    is_watched = is_replaying() or torch._C._len_torch_dispatch_stack() > 0
    return not is_watched and all(type(tensor) in (Tensor, nn.Parameter) for tensor in (x, weight))


def _has_kernels(backend: str, device: torch.device) -> bool:
    wanted = backend == "triton" or (backend == "auto" and device.type == "cuda")
    return wanted and triton_unusable_reason(device) is None


# What torch.compiler.assume_constant_result does, without importing dynamo: tracers can't look for packages.
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def route_by_kernels(x: Tensor, weight: Tensor, selection_bias: Tensor | None, rule: str) -> Routing:
    """Return the routing of x (T, D), differentiable (once) in x and weight. rule: RoutingRule.encode()."""
    route = _route if torch.compiler.is_compiling() else _Route.apply
    logits, scores, topk_ids, topk_weights, counts = route(x, weight, selection_bias, rule)
    return Routing(
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        logits=logits,
        scores=scores,
        num_nonfinite_rows=counts[-1],
        load=counts[:-1],
    )


def _run(x: Tensor, weight: Tensor, selection_bias: Tensor | None, rule: str) -> Parts:
    from tritonmoe.ops.kernels.router_kernels import route

    with without_autocast(x.device):
        logits, scores, topk_ids, topk_weights, counts = route(x, weight, selection_bias, decode(rule))
    return logits, scores, topk_ids, topk_weights, counts


def _run_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    needs: tuple[bool, bool],
    rule: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and weight; those of logits, scores and weights are given, or None."""
    from tritonmoe.ops.kernels.router_kernels import route_grad

    with without_autocast(saved[0].device):
        return route_grad(*saved, grads, decode(rule), needs)


class _Route(torch.autograd.Function):
    """(x, weight, selection_bias, rule) -> the fields of Routed."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, selection_bias: Tensor | None, rule: str) -> Parts:
        parts = _run(x, weight, selection_bias, rule)
        _, scores, topk_ids, topk_weights, counts = parts
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(topk_ids, counts)
        ctx.save_for_backward(x, weight, scores, topk_ids, topk_weights)
        return parts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Context,
        saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        dlogits: Tensor | None,
        dscores: Tensor | None,
        *others: Tensor | None,
    ) -> tuple[object, ...]:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grads = dlogits, dscores, others[1]
        return *_run_backward(grads, saved, (needs_x, needs_weight), ctx.rule), None, None


# As an operator


@torch.library.custom_op("tritonmoe::route", mutates_args=())
def _route(x: Tensor, weight: Tensor, selection_bias: Tensor | None, rule: str) -> Parts:
    return _run(x, weight, selection_bias, rule)


@_route.register_fake
def _route_shapes(x: Tensor, weight: Tensor, selection_bias: Tensor | None, rule: str) -> Parts:
    num_tokens, num_experts, top_k = x.shape[0], weight.shape[0], decode(rule).top_k
    return (
        x.new_empty(num_tokens, num_experts, dtype=torch.float32),
        x.new_empty(num_tokens, num_experts, dtype=torch.float32),
        x.new_empty(num_tokens, top_k, dtype=torch.int64),
        x.new_empty(num_tokens, top_k, dtype=torch.float32),
        x.new_empty(num_experts + 1, dtype=torch.int64),
    )


@torch.library.custom_op("tritonmoe::route_backward", mutates_args=())
def _route_backward(
    dlogits: Tensor | None,
    dscores: Tensor | None,
    dweights: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    needs: list[bool],
    rule: str,
) -> list[Tensor]:
    """Return the gradients of x and weight; no elements where not wanted."""
    needs_x, needs_weight = needs
    saved = x, weight, scores, topk_ids, topk_weights
    grads = _run_backward((dlogits, dscores, dweights), saved, (needs_x, needs_weight), rule)
    return [x.new_empty(0) if grad is None else grad for grad in grads]


@_route_backward.register_fake
def _route_backward_shapes(*arguments: Any) -> list[Tensor]:
    _, _, _, x, weight, *_, needs, _ = arguments
    return [like.new_empty(like.shape if needed else (0,)) for like, needed in zip((x, weight), needs, strict=True)]


def _setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None, str], output: Parts) -> None:
    x, weight, _, ctx.rule = inputs
    _, scores, topk_ids, topk_weights, counts = output
    ctx.mark_non_differentiable(topk_ids, counts)
    ctx.save_for_backward(x, weight, scores, topk_ids, topk_weights)


def _backward(
    ctx: Context, dlogits: Tensor | None, dscores: Tensor | None, *others: Tensor | None
) -> tuple[object, ...]:
    needs = list(ctx.needs_input_grad[:2])
    grads = _route_backward(dlogits, dscores, others[1], *ctx.saved_tensors, needs, ctx.rule)
    dx, dweight = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, dweight, None, None


_route.register_autograd(_backward, setup_context=_setup_context)
_route_backward.register_autograd(refuse_second_derivative)
