"""moe_mlp(): the experts on one device, eager or traced."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tritonmoe.config.layer import Activation, ExpertLayout, KernelOptions, is_fused
from tritonmoe.experts.arguments import (
    ExpertSettings,
    ExpertWeights,
    cast_for_autocast,
    check_arguments,
    check_options,
    check_tensors,
    find_main_grads,
    make_settings,
)
from tritonmoe.experts.callable_activation import checked_activation, zero_padding
from tritonmoe.experts.flops import count_products, matrix_size
from tritonmoe.experts.operator import encode, moe_mlp_operator, run_backward, run_forward
from tritonmoe.experts.weight_gradients import weight_gradients
from tritonmoe.grouping import Grouping
from tritonmoe.runtime.autograd import keep_beside, kept_beside, once_differentiable, outside_graphs, without_autocast
from tritonmoe.runtime.transforms import MAIN_GRAD, is_transformed, run_function, unwrapped

__all__ = ["moe_mlp"]


class _MoEMLP(torch.autograd.Function):
    """moe_mlp with a fused activation, called eagerly: what the operator (operator.py) does, at a tenth of its cost.

    `owners` are the weights as the user holds them (autocast hands over copies): a main_grad hangs on them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: ExpertSettings,
        owners: ExpertWeights,
        topk_ids: Tensor,
        x: Tensor,
        topk_weights: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        experts = ExpertWeights(*weights)  # type: ignore[arg-type]
        keep_hidden = settings.save == "hidden"
        out, h, grouping = run_forward(settings, x, topk_ids, topk_weights, experts, keep_hidden)
        ctx.settings, ctx.owners = settings, owners
        ctx.save_for_backward(x, topk_weights, *weights, h, keep_beside(ctx, grouping))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, topk_weights, *weights, h, mark = ctx.saved_tensors
        grads = run_backward(
            ctx.settings,
            x,
            topk_weights,
            ExpertWeights(*weights),
            kept_beside(ctx, mark),
            h,
            dout,
            ctx.needs_input_grad[3:],
            find_main_grads(ctx.owners),
        )
        return None, None, None, *grads


class _UpHalf(torch.autograd.Function):
    """h = gathered rows x up-projection (+ bias): what a callable activation takes."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: ExpertSettings,
        owners: ExpertWeights,
        grouping: Grouping,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        count_products(settings.ops, x, grouping.num_pairs, matrix_size(weight))
        h, _ = settings.ops.up(x, weight, bias, grouping, settings.layout, None, options=settings.options)
        zero_padding(h, grouping)
        ctx.settings, ctx.owners = settings, owners
        ctx.save_for_backward(x, weight, keep_beside(ctx, grouping))
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, mark), settings = ctx.saved_tensors, ctx.settings
        grouping = kept_beside(ctx, mark)
        *_, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dh = dh.contiguous()
        dx = None
        if needs_x:
            count_products(settings.ops, dh, grouping.num_pairs, matrix_size(weight))
            dx_pairs = settings.ops.up_grad(dh, weight, grouping, settings.layout, options=settings.options)
            dx = settings.ops.gather_sum(dx_pairs, grouping.inverse)
        needs = (needs_weight, needs_bias, False, False)
        grads = weight_gradients(settings, grouping, needs, find_main_grads(ctx.owners), x=x, dh=dh)
        return None, None, None, dx, grads.gate_up_proj, grads.gate_up_bias


class _DownHalf(torch.autograd.Function):
    """Weighted sum per token of a x down-projection (+ bias): what follows a callable activation."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: ExpertSettings,
        owners: ExpertWeights,
        grouping: Grouping,
        a: Tensor,
        topk_weights: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        count_products(settings.ops, a, grouping.num_pairs, matrix_size(weight))
        y = settings.ops.down(a, weight, bias, grouping, settings.layout, options=settings.options)
        ctx.settings, ctx.owners = settings, owners
        ctx.save_for_backward(a, topk_weights, weight, bias, keep_beside(ctx, grouping))
        return settings.ops.gather_sum(y, grouping.inverse, topk_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (a, topk_weights, weight, bias, mark), settings = ctx.saved_tensors, ctx.settings
        grouping = kept_beside(ctx, mark)
        *_, needs_topk_weights, needs_weight, needs_bias = ctx.needs_input_grad
        count_products(settings.ops, dout, grouping.num_pairs, matrix_size(weight))
        da, scaled_a, dweights = settings.ops.down_grad(
            dout, weight, bias, a, topk_weights, grouping, settings.layout, None, options=settings.options
        )
        zero_padding(da, grouping)
        grads = weight_gradients(
            settings,
            grouping,
            (False, False, needs_weight, needs_bias),
            find_main_grads(ctx.owners),
            dout=dout,
            scaled_a=scaled_a,
            topk_weights=topk_weights,
        )
        dtopk_weights = grouping.pairs_to_rows(dweights).to(topk_weights.dtype) if needs_topk_weights else None
        return None, None, None, da, dtopk_weights, grads.down_proj, grads.down_bias


def _is_traced(x: Tensor) -> bool:
    """Say whether something other than plain eager autograd watches operations: a tracer or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or x.is_meta
        or (type(x) is not Tensor and type(x) is not nn.Parameter)
    )


NO_OWNERS = ExpertWeights(None, None, None, None)  # type: ignore[arg-type]


def _run_eagerly(
    settings: ExpertSettings,
    owners: ExpertWeights,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
) -> Tensor:
    """Run the experts as autograd Functions, or as none where no gradient is wanted."""
    transformed = is_transformed()
    if transformed:
        topk_ids, owners = unwrapped(topk_ids), NO_OWNERS
    if is_fused(settings.activation):
        if transformed or _needs_grad(x, topk_weights, weights):
            return run_function(_MoEMLP, settings, owners, topk_ids, x, topk_weights, *weights)
        out, _, _ = run_forward(settings, x, topk_ids, topk_weights, weights, keep_hidden=False)
        return out
    w1, b1, w2, b2 = weights
    grouping = settings.ops.group(topk_ids, w1.shape[0])
    h = run_function(_UpHalf, settings, owners, grouping, x, w1, b1)
    a = checked_activation(settings, h)
    return run_function(_DownHalf, settings, owners, grouping, a, topk_weights, w2, b2)


def _needs_grad(x: Tensor, topk_weights: Tensor, weights: ExpertWeights) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, topk_weights, *weights)
    )


@outside_graphs
def _run_callable_or_main_grad(*arguments: Any) -> Tensor:
    settings, owners, x, topk_ids, topk_weights, weights = arguments
    return _run_eagerly(make_settings(x, topk_ids, weights, *settings), owners, x, topk_ids, topk_weights, weights)


def moe_mlp(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: Activation = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str = "auto",
    save: Literal["hidden", "input"] = "hidden",
    num_sms: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Run every token through its K chosen experts and give the weighted sum, on one device.

    Differentiable (once) in x, topk_weights and every weight; a callable activation's parameters get gradients too.

    Args:
        x: tokens (T, D), floating point; T = 0 gives (0, D), still attached to the graph.
        topk_ids: (T, K) int32 or int64; ids outside [0, E) are skipped: no work, zero gradient for their weight.
            An id may stand twice in a row.
        topk_weights: (T, K) floating point; used in fp32.
        gate_up_proj: (E, 2F, D), or (E, D, 2F) with transposed=True; F instead of 2F with gated=False.
        down_proj: (E, D, F), or (E, F, D) with transposed=True.
        activation: silu, gelu, gelu_tanh, relu, relu2, a ClampedSwiGLU, or a callable that takes (n, 2F) rows in
            x.dtype, in the weights' own column order and with the bias added, and gives (n, F).
        gated: whether the up-projection has a gate half. interleaved: gate and up columns alternate.
        gate_up_bias: (E, 2F) or None. down_bias: (E, D) or None.
        backend: "auto" (triton on a GPU, torch elsewhere), "triton", "torch" or "reference".
        save: "hidden" keeps h (T*K, 2F) for backward; "input" recomputes it there.
        num_sms: how many of a GPU's multiprocessors the kernels take; None: all.
        batch_invariant: a token's bits, and its gradients', don't depend on the other tokens of the call.
    Returns:
        (T, D) in x.dtype.
    Raises:
        ValueError, TypeError: the arguments do not fit together; the message has the rule and the values.
    Example:
        Two experts that multiply by 2 and by 3 (D = F = 1, ungated relu), K = 2:
        x = [[1]], topk_ids = [[0, 1]], topk_weights = [[10, 100]] gives [[1 * 2 * 10 + 1 * 3 * 100]] = [[320]].
    """
    layout = ExpertLayout(gated, interleaved, transposed)
    options = KernelOptions(num_sms, batch_invariant)
    owners = ExpertWeights(gate_up_proj, gate_up_bias, down_proj, down_bias)
    check_tensors(x, topk_ids, topk_weights, owners)
    x, topk_weights, weights = cast_for_autocast(x, topk_weights, owners)
    check_arguments(x, topk_ids, topk_weights, weights, layout, activation)
    has_main_grads = find_main_grads(owners) is not None
    if has_main_grads and is_transformed():
        raise RuntimeError(MAIN_GRAD)
    with without_autocast(x.device):
        if is_fused(activation) and not has_main_grads and not is_transformed() and _is_traced(x):
            keep_hidden = save == "hidden" and _needs_grad(x, topk_weights, weights)
            check_options(save, options)
            operator_settings = encode(activation, layout, backend, options)
            return moe_mlp_operator(x, topk_ids, topk_weights, weights, keep_hidden, operator_settings)
        arguments = (layout, activation, backend, save, options)
        if torch.compiler.is_compiling():
            return _run_callable_or_main_grad(arguments, owners, x, topk_ids, topk_weights, weights)
        settings = make_settings(x, topk_ids, weights, *arguments)
        return _run_eagerly(settings, owners, x, topk_ids, topk_weights, weights)
