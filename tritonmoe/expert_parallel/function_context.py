"""What an autograd Function of a call saves and gives back, the same of a whole call and of half a batch.

Activation checkpointing repeats a half's call as a whole one, and takes the tensors of the one for those of the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.expert_parallel.call import CallGradients, Kept, SavedTensors
from tritonmoe.experts.run import ExpertsRun
from tritonmoe.runtime.autograd import keep_beside

__all__ = ["gradients_of_inputs", "save_forward", "saved_forward"]


def save_forward(
    ctx: Any, run: ExpertsRun, kept: Kept, weights: PerWeight[Tensor], activation_parameters: Sequence[Tensor]
) -> None:
    """Save what the backward of a call needs, if any rank needs a gradient."""
    if kept.plan.needs_any:
        mark = keep_beside(ctx, kept)
        ctx.save_for_backward(run.rows, run.topk_weights, *weights, run.h, mark, *activation_parameters)


def saved_forward(ctx: Any) -> tuple[SavedTensors, Tensor]:
    """Give the tensors that save_forward() saved, and the mark by which kept_beside() finds what it kept."""
    rows, topk_weights, w1, b1, w2, b2, h, mark, *parameters = ctx.saved_tensors
    return SavedTensors(rows, topk_weights, PerWeight(w1, b1, w2, b2), h, parameters), mark


def gradients_of_inputs(grads: CallGradients, topk_weights_dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Give them in the order of the inputs: call, topk_ids, x, topk_weights, anchor, weights, activation parameters."""
    dtopk_weights = None if grads.topk_weights is None else grads.topk_weights.to(topk_weights_dtype)
    return None, None, grads.x, dtopk_weights, None, *grads.weights, *grads.activation_parameters
