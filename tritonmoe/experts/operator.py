"""The one-device experts as operators that PyTorch's tracers can see: `tritonmoe::moe_mlp` and its backward.

torch.compile, torch.export, fake and meta tensors and dispatch modes (selective checkpointing, FlopCounterMode) need an
operator with a name, tensors in and out, and shapes that are known without running it. Plain eager calls go another
way, since an operator with a gradient formula costs about 200 microseconds a call and an autograd Function 16;
experts/moe_mlp.py decides. Both run the two functions `run_forward` and `run_backward`, so they give the same bits.

Operators take no objects and give no None: settings are spelled out (OperatorSettings), and what is not wanted has no
elements. The grouping is not saved but made again in backward: it is short work, and 8K bytes a token less.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonmoe import backends
from tritonmoe.config.layer import Activation, ClampedSwiGLU, ExpertLayout, KernelOptions
from tritonmoe.experts.arguments import ExpertSettings, ExpertWeights, MainGrads, check_num_pairs
from tritonmoe.experts.flops import FLOP_FORMULAS, backward_flops, num_products, register_flop_formulas
from tritonmoe.experts.run import ExpertsRun
from tritonmoe.grouping import Grouping
from tritonmoe.runtime.autograd import SECOND_DERIVATIVE, without_autocast

__all__ = [
    "OperatorSettings",
    "decode_activation",
    "encode",
    "gradient_shapes",
    "moe_mlp_operator",
    "refuse_second_derivative",
    "run_backward",
    "run_forward",
]

Needs = tuple[bool, bool, bool, bool, bool, bool]
"""Which gradients are wanted: x, topk_weights, then the weights in the order of ExpertWeights."""


def run_forward(
    settings: ExpertSettings,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    keep_hidden: bool,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Grouping]:
    """Give out (T, D), h where it is kept, and the grouping. h: memory for it, (T*K, 2F) or more."""
    grouping = settings.ops.group(topk_ids, weights.gate_up_proj.shape[0])
    run = ExpertsRun(settings, weights, x, topk_weights, grouping, keep_hidden)
    if h is not None:
        run.h = h[: grouping.num_pairs]
    return run.forward(0), run.h, grouping


def run_backward(
    settings: ExpertSettings,
    x: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    grouping: Grouping,
    h: Tensor | None,
    dout: Tensor,
    needs: Needs,
    main_grads: MainGrads | None = None,
) -> tuple[Tensor | None, ...]:
    """Give the wanted gradients in the order of `needs`, None for the others and for those added to main_grads."""
    needs_x, needs_topk_weights, *needs_weights = needs
    run = ExpertsRun(settings, weights, x, topk_weights, grouping, False, h, main_grads=main_grads)
    dx, dweights = run.backward(0, dout, needs_x)
    grads = run.weight_grad(dout, tuple(needs_weights))  # type: ignore[arg-type]
    return dx, dweights.to(topk_weights.dtype) if needs_topk_weights else None, *grads


class OperatorSettings(NamedTuple):
    """ExpertSettings as an operator takes them."""

    activation: str
    """A name, or "clamped_swiglu" with the next three."""
    limit: float
    alpha: float
    up_offset: float
    gated: bool
    interleaved: bool
    transposed: bool
    backend: str
    num_sms: int | None
    batch_invariant: bool


def encode(activation: Activation, layout: ExpertLayout, backend: str, options: KernelOptions) -> OperatorSettings:
    if isinstance(activation, ClampedSwiGLU):
        name, constants = "clamped_swiglu", (activation.limit, activation.alpha, activation.up_offset)
    else:
        assert isinstance(activation, str)
        name, constants = activation, (0.0, 0.0, 0.0)
    flags = layout.gated, layout.interleaved, layout.transposed
    return OperatorSettings(name, *constants, *flags, backend, options.num_sms, options.batch_invariant)


def decode_activation(name: str, limit: float, alpha: float, up_offset: float) -> Activation:
    return ClampedSwiGLU(limit, alpha, up_offset) if name == "clamped_swiglu" else name


def decode(encoded: tuple[Any, ...], x: Tensor, topk_ids: Tensor, gate_up_proj: Tensor) -> ExpertSettings:
    name, limit, alpha, up_offset, gated, interleaved, transposed, backend, *options = encoded
    num_experts, top_k = gate_up_proj.shape[0], topk_ids.shape[1]
    return ExpertSettings(
        backends.choose(backend, x.device, x.dtype, KernelOptions(*options), num_experts=num_experts, top_k=top_k),
        ExpertLayout(gated, interleaved, transposed),
        decode_activation(name, limit, alpha, up_offset),
        options=KernelOptions(*options),
    )


@torch.library.custom_op("tritonmoe::moe_mlp", mutates_args=())
def _moe_mlp(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    keep_hidden: bool,
    activation: str,
    limit: float,
    alpha: float,
    up_offset: float,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    backend: str,
    num_sms: int | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """Give out (T, D) and h (T*K, 2F), or (0, 2F) unless keep_hidden."""
    encoded = activation, limit, alpha, up_offset, gated, interleaved, transposed, backend, num_sms, batch_invariant
    settings = decode(encoded, x, topk_ids, gate_up_proj)
    check_num_pairs(topk_ids)
    weights = ExpertWeights(gate_up_proj, gate_up_bias, down_proj, down_bias)
    h = x.new_empty(topk_ids.numel() if keep_hidden else 0, _hidden_width(gate_up_proj, transposed))
    with without_autocast(x.device):
        out, _, grouping = run_forward(
            settings, x, topk_ids, topk_weights, weights, keep_hidden, h if keep_hidden else None
        )
    h[grouping.num_pairs :].zero_()
    return out, h


@_moe_mlp.register_fake
def _moe_mlp_shapes(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    keep_hidden: bool,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    width = _hidden_width(gate_up_proj, OperatorSettings(*settings).transposed)
    return x.new_empty(x.shape), x.new_empty(topk_ids.numel() if keep_hidden else 0, width)


@torch.library.custom_op("tritonmoe::moe_mlp_backward", mutates_args=())
def _moe_mlp_backward(
    dout: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    h: Tensor | None,
    needs: list[bool],
    activation: str,
    limit: float,
    alpha: float,
    up_offset: float,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    backend: str,
    num_sms: int | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of x, topk_weights and the weights, in the order of Needs; no elements where not wanted."""
    encoded = activation, limit, alpha, up_offset, gated, interleaved, transposed, backend, num_sms, batch_invariant
    settings = decode(encoded, x, topk_ids, gate_up_proj)
    weights = ExpertWeights(gate_up_proj, gate_up_bias, down_proj, down_bias)
    with without_autocast(x.device):
        grouping = settings.ops.group(topk_ids, gate_up_proj.shape[0])
        h = None if h is None else h[: grouping.num_pairs]
        grads = run_backward(settings, x, topk_weights, weights, grouping, h, dout, tuple(needs))  # type: ignore[arg-type]
    dx, dtopk_weights, dw1, db1, dw2, db2 = (x.new_empty(0) if grad is None else grad for grad in grads)
    return dx, dtopk_weights, dw1, db1, dw2, db2


@_moe_mlp_backward.register_fake
def _moe_mlp_backward_shapes(
    dout: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    h: Tensor | None,
    needs: list[bool],
    *settings: Any,
) -> tuple[Tensor, ...]:
    return gradient_shapes((x, topk_weights, gate_up_proj, gate_up_bias, down_proj, down_bias), needs)


def gradient_shapes(inputs: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    """Give fake gradients of the inputs, the first of which is there; no elements where not wanted."""
    x = inputs[0]
    assert x is not None
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and needed else x.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    )


def _hidden_width(gate_up_proj: Tensor, transposed: bool) -> int:
    return gate_up_proj.shape[2 if transposed else 1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, keep_hidden, ctx.settings = inputs[:7], inputs[7], inputs[8:]
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(*tensors, h if keep_hidden else None)


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs_x, _, *needs_others = ctx.needs_input_grad[:7]
    needs = [needs_x, *needs_others]
    grads = _moe_mlp_backward(dout, *tensors, needs, *ctx.settings)
    dx, *others = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, None, *others, None, *(None for _ in ctx.settings)


def refuse_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(SECOND_DERIVATIVE)


_moe_mlp.register_autograd(_backward, setup_context=_setup_context)
_moe_mlp_backward.register_autograd(refuse_second_derivative)


def _forward_flops(
    x_shape: Any, ids_shape: Any, weights_shape: Any, up_shape: Any, up_bias: Any, down_shape: Any, *_: Any, **__: Any
) -> int:
    """Give 6*N*D*F gated, 4*N*D*F ungated; N = T*K, skipped pairs included."""
    return 2 * (num_products(ids_shape, up_shape) + num_products(ids_shape, down_shape))


def _backward_flops(
    dout_shape: Any,
    x_shape: Any,
    ids_shape: Any,
    weights_shape: Any,
    up_shape: Any,
    up_bias: Any,
    down_shape: Any,
    down_bias: Any,
    h_shape: Any,
    needs: list[bool],
    *settings: Any,
    **__: Any,
) -> int:
    up, down = num_products(ids_shape, up_shape), num_products(ids_shape, down_shape)
    return backward_flops(up, down, needs, h_shape is None)


FLOP_FORMULAS[torch.ops.tritonmoe.moe_mlp] = _forward_flops
FLOP_FORMULAS[torch.ops.tritonmoe.moe_mlp_backward] = _backward_flops


def moe_mlp_operator(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    keep_hidden: bool,
    settings: OperatorSettings,
) -> Tensor:
    """Call the operator tritonmoe::moe_mlp: (T, D)."""
    if not torch.compiler.is_compiling():
        register_flop_formulas()
    out, _ = _moe_mlp(x, topk_ids, topk_weights, *weights, keep_hidden, *settings)
    return out
