"""The one-device experts as operators that PyTorch's tracers can see: `tritonmoe::moe_mlp` and its backward.

torch.compile, torch.export, fake and meta tensors and dispatch modes (selective checkpointing, FlopCounterMode) need an
operator with a name, tensors in and out, and shapes that are known without running it. Plain eager calls go another
way, since an operator with a gradient formula costs about 200 microseconds a call and an autograd Function 16;
experts/moe_mlp.py decides. Both run the two functions `run_forward` and `run_backward`, so they give the same bits.

Operators take no objects and give no None: an ExpertSpec comes as the string that spec.encode() makes of it, and what
is not wanted has no elements. The grouping is not saved but made again in backward: it is short work, and 8K bytes a
token less, of the kernels 12K.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonmoe.config.formats import weight_shape
from tritonmoe.experts.arguments import check_num_pairs
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.flops import FLOP_FORMULAS, Shape, backward_flops, forward_flops, register_flop_formulas
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.experts.quantized_weight import check_contents
from tritonmoe.experts.spec import ExpertSettings, ExpertSpec, choose_backend, decode, encode
from tritonmoe.experts.tensors import CallTensors, schema
from tritonmoe.ops.grouping import Grouping
from tritonmoe.runtime.autograd import Context, refuse_second_derivative, save_tensors, saved_by, without_autocast

__all__ = [
    "gradient_shapes",
    "moe_mlp_operator",
    "run_backward",
    "run_forward",
]


def run_forward(
    settings: ExpertSettings, tensors: CallTensors[Tensor], keep_hidden: bool, h: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Grouping]:
    """Return out (T, D), h where it is kept, and the grouping. h: memory for it, (T*K, 2F) or more."""
    grouping = settings.ops.group(tensors.topk_ids, tensors.weights.gate_up_proj.shape[0])
    if settings.spec.precision is not None:
        tensors = tensors._replace(x=settings.rounded_rows(tensors.x))
    run = ForwardRun(settings, tensors, grouping, keep_hidden, None if h is None else h[: grouping.num_pairs])
    return run.forward(0), run.h, grouping


def run_backward(run: BackwardRun, dout: Tensor, needs: CallTensors[bool]) -> CallTensors[Tensor | None]:
    """Return the wanted gradients; None for those in main_grads too."""
    run.rows, dout = run.settings.rounded_rows(run.rows), run.settings.rounded_rows(dout)
    dx, dweights = run.backward(0, dout, needs.x)
    dtopk_weights = dweights.to(run.topk_weights.dtype) if needs.topk_weights else None
    return CallTensors(dx, None, dtopk_weights, run.weight_grad(dout, needs.weights))


@torch.library.custom_op(
    "tritonmoe::moe_mlp", mutates_args=(), schema=f"({schema()}, bool keep_hidden, str spec) -> (Tensor, Tensor)"
)
def _moe_mlp(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return out (T, D) and h (T*K, 2F), or (0, 2F) unless keep_hidden."""
    *flat, keep_hidden, spec = arguments
    tensors = CallTensors.unflatten(flat)
    settings = choose_backend(decode(spec), tensors)
    check_num_pairs(tensors.topk_ids)
    check_contents(tensors.weights)
    h = _empty_hidden(tensors, keep_hidden, spec)
    with without_autocast(h.device):
        out, _, grouping = run_forward(settings, tensors, keep_hidden, h if keep_hidden else None)
    h[grouping.num_pairs :].zero_()
    return out, h


@_moe_mlp.register_fake
def _moe_mlp_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    *flat, keep_hidden, spec = arguments
    tensors = CallTensors.unflatten(flat)
    return tensors.x.new_empty(tensors.x.shape), _empty_hidden(tensors, keep_hidden, spec)


def _empty_hidden(tensors: CallTensors[Tensor], keep_hidden: bool, spec: str) -> Tensor:
    shape = weight_shape(tensors.weights.gate_up_proj, tensors.weights.gate_up_scales)
    width = shape[2 if decode(spec).layout.transposed else 1]
    return tensors.x.new_empty(tensors.topk_ids.numel() if keep_hidden else 0, width)


@torch.library.custom_op(
    "tritonmoe::moe_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor dout, {schema()}, Tensor? h, bool[] needs, str spec) -> Tensor[]",
)
def _moe_mlp_backward(dout: Tensor, *arguments: Any) -> list[Tensor]:
    """Return the gradients in the order of flatten(); no elements where not wanted. needs: flat, as the tensors are."""
    *flat, h, needs, spec = arguments
    tensors = CallTensors.unflatten(flat)
    settings = choose_backend(decode(spec), tensors)
    with without_autocast(dout.device):
        grouping = settings.ops.group(tensors.topk_ids, tensors.weights.gate_up_proj.shape[0])
        h = None if h is None else h[: grouping.num_pairs]
        run = BackwardRun(settings, tensors, grouping, h)
        grads = run_backward(run, dout, CallTensors.unflatten(needs))
    return [dout.new_empty(0) if grad is None else grad for grad in grads.flatten()]


@_moe_mlp_backward.register_fake
def _moe_mlp_backward_shapes(dout: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, _, needs, _ = arguments
    return gradient_shapes(dout, tensors, needs)


def gradient_shapes(dout: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Return fake gradients of the tensors; no elements where not wanted."""
    return [
        tensor.new_empty(tensor.shape) if tensor is not None and needed else dout.new_empty(0)
        for tensor, needed in zip(tensors, needs, strict=True)
    ]


def _setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, keep_hidden, ctx.spec = inputs
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # zeros as large as h, which nobody reads
    save_tensors(ctx, *tensors, h if keep_hidden else None)


def _backward(ctx: Context, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    needs = list(ctx.needs_input_grad[:-2])
    grads = _moe_mlp_backward(dout, *saved_by(ctx), needs, ctx.spec)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None


_moe_mlp.register_autograd(_backward, setup_context=_setup_context)
_moe_mlp_backward.register_autograd(refuse_second_derivative)


def _forward_flops(*arguments: Any, **_: object) -> int:
    """Shapes stand for tensors."""
    *shapes, _, _ = arguments
    return forward_flops(CallTensors.unflatten(shapes))


def _backward_flops(dout: Shape, *arguments: Any, **_: object) -> int:
    *shapes, h, needs, _ = arguments
    return backward_flops(CallTensors.unflatten(shapes), CallTensors.unflatten(needs), h is None)


FLOP_FORMULAS[torch.ops.tritonmoe.moe_mlp] = _forward_flops
FLOP_FORMULAS[torch.ops.tritonmoe.moe_mlp_backward] = _backward_flops


def moe_mlp_operator(spec: ExpertSpec, tensors: CallTensors[Tensor], keep_hidden: bool) -> Tensor:
    """Call the operator tritonmoe::moe_mlp: (T, D)."""
    if not torch.compiler.is_compiling():
        register_flop_formulas()
    out, _ = _moe_mlp(*tensors.flatten(), keep_hidden, encode(spec))
    return out
