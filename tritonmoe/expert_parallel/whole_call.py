"""A layer call as one autograd Function: run_whole_call()."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonmoe.expert_parallel.agreed_call import AgreedCall
from tritonmoe.expert_parallel.call_pass import CallBackward, CallForward
from tritonmoe.expert_parallel.function_context import (
    anchor_of,
    gradients_of_inputs,
    needs_of,
    saved_forward,
    tensors_to_save,
)
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.runtime.autograd import keep_beside, kept_beside, once_differentiable

__all__ = ["run_whole_call"]


class _WholeCall(torch.autograd.Function):
    """One layer call on one rank; the plan is made before, so that autograd sees what any rank needs."""

    @staticmethod
    def forward(ctx: Any, call: AgreedCall, anchor: Tensor | None, *flat: Any) -> tuple[Tensor, Tensor | None]:
        tensors = CallTensors.unflatten(flat)
        forward = CallForward(call, tensors)
        out = forward.run()
        ctx.call = call
        ctx.weights_dtype = tensors.topk_weights.dtype
        mark = None
        if call.plan.needs_any:
            mark = keep_beside(ctx, forward.kept)
            ctx.save_for_backward(*tensors_to_save(forward.experts, needs_of(ctx), mark))
        return out, mark

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        forward, mark = saved_forward(saved)
        backward = CallBackward(ctx.call, kept_beside(ctx, mark), forward, dout, needs_of(ctx).weights)
        return gradients_of_inputs(backward.run(), ctx.weights_dtype)


def run_whole_call(call: AgreedCall, tensors: CallTensors[Tensor]) -> Tensor:
    """Run a planned call as a Function: see RunForward."""
    out, _ = _WholeCall.apply(call, anchor_of(call, tensors), *tensors.flatten())
    return out
