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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.experts.arguments import ExpertInputs, Needs, check_num_pairs
from tritonmoe.experts.flops import FLOP_FORMULAS, Shape, backward_flops, forward_flops, register_flop_formulas
from tritonmoe.experts.run import ExpertsRun
from tritonmoe.experts.spec import ExpertSettings, ExpertSpec, choose_backend, decode, encode
from tritonmoe.grouping import Grouping
from tritonmoe.runtime.autograd import refuse_second_derivative, without_autocast

__all__ = [
    "SavedForward",
    "gradient_shapes",
    "moe_mlp_operator",
    "run_backward",
    "run_forward",
]


NUM_TENSORS = len(("x", "topk_ids", "topk_weights", *PerWeight._fields))
"""How many of the operator's arguments are these tensors, which come first."""


class SavedForward(NamedTuple):
    """What a forward leaves for its backward."""

    x: Tensor
    topk_weights: Tensor
    weights: PerWeight[Tensor]
    grouping: Grouping
    h: Tensor | None
    """(N, 2F), or None where backward computes it again."""
    row_seeds: Tensor | None = None


def run_forward(
    settings: ExpertSettings, inputs: ExpertInputs, keep_hidden: bool, h: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Grouping]:
    """Give out (T, D), h where it is kept, and the grouping. h: memory for it, (T*K, 2F) or more."""
    x, topk_ids, topk_weights, weights, row_seeds = inputs
    grouping = settings.ops.group(topk_ids, weights.gate_up_proj.shape[0])
    run = ExpertsRun(settings, weights, x, topk_weights, grouping, keep_hidden, row_seeds=row_seeds)
    if h is not None:
        run.h = h[: grouping.num_pairs]
    return run.forward(0), run.h, grouping


def run_backward(
    settings: ExpertSettings,
    saved: SavedForward,
    dout: Tensor,
    needs: Needs,
    main_grads: PerWeight[Tensor | None] | None = None,
) -> tuple[Tensor | None, ...]:
    """Give the wanted gradients of x, topk_weights and the weights; None for the others and for those in main_grads."""
    x, topk_weights, weights, grouping, h, row_seeds = saved
    run = ExpertsRun(settings, weights, x, topk_weights, grouping, False, h, main_grads=main_grads, row_seeds=row_seeds)
    dx, dweights = run.backward(0, dout, needs.x)
    grads = run.weight_grad(dout, needs.weights)
    return dx, dweights.to(topk_weights.dtype) if needs.topk_weights else None, *grads


@torch.library.custom_op("tritonmoe::moe_mlp", mutates_args=())
def _moe_mlp(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    row_seeds: Tensor | None,
    keep_hidden: bool,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """Give out (T, D) and h (T*K, 2F), or (0, 2F) unless keep_hidden."""
    factors = gate_up_a, gate_up_b, down_a, down_b
    weights = PerWeight(gate_up_proj, gate_up_bias, down_proj, down_bias, *factors)
    inputs = ExpertInputs(x, topk_ids, topk_weights, weights, row_seeds)
    settings = choose_backend(decode(spec), inputs)
    check_num_pairs(topk_ids)
    h = _empty_hidden(x, topk_ids, gate_up_proj, keep_hidden, spec)
    with without_autocast(x.device):
        out, _, grouping = run_forward(settings, inputs, keep_hidden, h if keep_hidden else None)
    h[grouping.num_pairs :].zero_()
    return out, h


@_moe_mlp.register_fake
def _moe_mlp_shapes(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    *_, keep_hidden, spec = others
    return x.new_empty(x.shape), _empty_hidden(x, topk_ids, gate_up_proj, keep_hidden, spec)


def _empty_hidden(x: Tensor, topk_ids: Tensor, gate_up_proj: Tensor, keep_hidden: bool, spec: str) -> Tensor:
    width = gate_up_proj.shape[2 if decode(spec).layout.transposed else 1]
    return x.new_empty(topk_ids.numel() if keep_hidden else 0, width)


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
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    row_seeds: Tensor | None,
    h: Tensor | None,
    needs: list[bool],
    spec: str,
) -> list[Tensor]:
    """Give the gradients of x, topk_weights and the weights; no elements where not wanted. needs: Needs.as_list()."""
    factors = gate_up_a, gate_up_b, down_a, down_b
    weights = PerWeight(gate_up_proj, gate_up_bias, down_proj, down_bias, *factors)
    settings = choose_backend(decode(spec), ExpertInputs(x, topk_ids, topk_weights, weights))
    with without_autocast(x.device):
        grouping = settings.ops.group(topk_ids, gate_up_proj.shape[0])
        h = None if h is None else h[: grouping.num_pairs]
        saved = SavedForward(x, topk_weights, weights, grouping, h, row_seeds)
        grads = run_backward(settings, saved, dout, Needs.from_list(needs))
    return [x.new_empty(0) if grad is None else grad for grad in grads]


@_moe_mlp_backward.register_fake
def _moe_mlp_backward_shapes(dout: Tensor, x: Tensor, topk_ids: Tensor, *others: Any) -> list[Tensor]:
    *differentiable, _, _, needs, _ = others
    return gradient_shapes(x, differentiable, needs)


def gradient_shapes(x: Tensor, others: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Give fake gradients of x and of the others; no elements where not wanted."""
    return [
        tensor.new_empty(tensor.shape) if tensor is not None and needed else x.new_empty(0)
        for tensor, needed in zip((x, *others), needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, keep_hidden, ctx.spec = inputs
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # zeros as large as h, which nobody reads
    ctx.save_for_backward(*tensors, h if keep_hidden else None)


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    tensors = ctx.saved_tensors
    needs_x, _, *needs_others = ctx.needs_input_grad[:NUM_TENSORS]
    needs = [needs_x, *needs_others]
    grads = _moe_mlp_backward(dout, *tensors, needs, ctx.spec)
    dx, *others = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, None, *others, None, None, None


_moe_mlp.register_autograd(_backward, setup_context=_setup_context)
_moe_mlp_backward.register_autograd(refuse_second_derivative)


def _forward_flops(x: Shape, topk_ids: Shape, topk_weights: Shape, *others: Any, **__: Any) -> int:
    """Shapes stand for tensors."""
    *weights, _, _, _ = others
    return forward_flops(topk_ids, weights)


def _backward_flops(dout: Shape, x: Shape, topk_ids: Shape, topk_weights: Shape, *others: Any, **__: Any) -> int:
    *weights, _, h, needs, _ = others
    return backward_flops(topk_ids, weights, needs, h is None)


FLOP_FORMULAS[torch.ops.tritonmoe.moe_mlp] = _forward_flops
FLOP_FORMULAS[torch.ops.tritonmoe.moe_mlp_backward] = _backward_flops


def moe_mlp_operator(spec: ExpertSpec, inputs: ExpertInputs, keep_hidden: bool) -> Tensor:
    """Call the operator tritonmoe::moe_mlp: (T, D)."""
    if not torch.compiler.is_compiling():
        register_flop_formulas()
    x, topk_ids, topk_weights, weights, row_seeds = inputs
    out, _ = _moe_mlp(x, topk_ids, topk_weights, *weights, row_seeds, keep_hidden, encode(spec))
    return out
