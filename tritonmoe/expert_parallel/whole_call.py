"""A layer call as one autograd Function, and what such a Function saves, the same of a whole call and of half a batch.

A recompute of a half runs as a whole call, so both save the same list of tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonmoe.expert_parallel.layer_pass import BackwardPass, ForwardPass
from tritonmoe.expert_parallel.plans.base import NUM_KIND_TENSORS, Kept, PlannedCall
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.runtime.autograd import Context, keep_beside, kept_beside, once_differentiable, save_tensors

__all__ = ["anchor_of", "gradients_of_inputs", "needs_of", "run_whole_call", "save_forward", "saved_forward"]


class _WholeCall(torch.autograd.Function):
    """One layer call on one rank; the plan is made before, so that autograd sees what any rank needs."""

    @staticmethod
    def forward(
        ctx: Context, call: PlannedCall, anchor: Tensor | None, *flat: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        tensors = CallTensors.unflatten(flat)
        forward = ForwardPass(call, tensors)
        out = forward.run()
        ctx.call = call
        ctx.weights_dtype = tensors.topk_weights.dtype
        return out, save_forward(ctx, forward, needs_of(ctx))

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, saved: Sequence[Tensor], dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        backward = BackwardPass(ctx.call, saved_forward(ctx, saved), dout, needs_of(ctx).weights)
        return gradients_of_inputs(backward.run(), ctx.weights_dtype)


def run_whole_call(call: PlannedCall, tensors: CallTensors[Tensor]) -> Tensor:
    """Run a planned call as a Function: see RunForward."""
    out, _ = _WholeCall.apply(call, anchor_of(call, tensors), *tensors.flatten())
    return out


def anchor_of(call: PlannedCall, tensors: CallTensors[Tensor]) -> Tensor | None:
    """Return the anchor of a Function, by which a rank that needs no gradient itself takes part in others' backward."""
    return tensors.x.new_empty(0).requires_grad_() if call.plan.needs_any else None


def needs_of(ctx: Context) -> CallTensors[bool]:
    """Return of which tensors a gradient is wanted; before them such a Function takes its call and an anchor."""
    _, _, *needs = ctx.needs_input_grad
    return CallTensors.unflatten(needs)


def save_forward(ctx: Context, forward: ForwardPass, needs: CallTensors[bool]) -> Tensor | None:
    """Save what the backward of a call needs, and return the mark of keep_beside(); None where no rank needs any."""
    if not forward.call.plan.needs_any:
        return None
    run, rows = forward.experts.own, forward.rows_to_keep(needs.weights)
    _, kind_tensors = forward.experts.kept()
    mark = keep_beside(ctx, forward.kept)
    save_tensors(ctx, mark, run.h, *kind_tensors, *run.tensors._replace(x=rows).flatten())
    return mark


def saved_forward(ctx: Context, saved: Sequence[Tensor]) -> Kept:
    """Return what save_forward() has saved, in this forward or in its recompute."""
    mark, h, *others = saved
    kept: Kept = kept_beside(ctx, mark)
    kind_tensors, received = tuple(others[:NUM_KIND_TENSORS]), CallTensors.unflatten(others[NUM_KIND_TENSORS:])
    return kept._replace(received=received, h=h, kind_tensors=kind_tensors)


def gradients_of_inputs(
    grads: CallTensors[Tensor | None], topk_weights_dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Return one gradient for each argument of a Function that takes a call, an anchor and flat tensors."""
    if grads.topk_weights is not None:
        grads = grads._replace(topk_weights=grads.topk_weights.to(topk_weights_dtype))
    return None, None, *grads.flatten()
