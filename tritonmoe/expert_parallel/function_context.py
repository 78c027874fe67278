"""What an autograd Function of a call saves, the same of a whole call and of half a batch.

Activation checkpointing repeats a half's call as a whole one, and takes the tensors of the one for those of the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonmoe.config.activations import is_fused
from tritonmoe.expert_parallel.call import SavedTensors
from tritonmoe.experts.run import ExpertsRun
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.experts.weight_gradients import rows_to_save

__all__ = ["gradients_of_inputs", "needs_of", "saved_forward", "tensors_to_save"]


def needs_of(ctx: Any) -> CallTensors[bool]:
    """Say of which tensors a gradient is wanted; before them such a Function takes its call and an anchor."""
    _, _, *needs = ctx.needs_input_grad
    return CallTensors.unflatten(needs)


def tensors_to_save(
    run: ExpertsRun, given: CallTensors[Tensor], needs: CallTensors[bool], mark: Tensor
) -> tuple[Tensor | None, ...]:
    """Return what the backward of a call needs; given: the call's own tensors; mark: that of keep_beside()."""
    computes_h = is_fused(run.settings.spec.activation) and run.h is None
    rows = rows_to_save(run.rows, given.weights, needs.weights.gate_up_proj, computes_h=computes_h)
    received = given._replace(x=rows, topk_weights=run.topk_weights, row_seeds=run.row_seeds).without("topk_ids")
    return mark, run.h, *received.flatten()


def saved_forward(saved: Sequence[Tensor]) -> tuple[SavedTensors, Tensor]:
    """Make SavedTensors of what tensors_to_save() gave, and give the mark for kept_beside()."""
    mark, h, *received = saved
    return SavedTensors(CallTensors.unflatten(received), h), mark


def gradients_of_inputs(
    grads: CallTensors[Tensor | None], topk_weights_dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Return one gradient for each argument of a Function that takes a call, an anchor and flat tensors."""
    if grads.topk_weights is not None:
        grads = grads._replace(topk_weights=grads.topk_weights.to(topk_weights_dtype))
    return None, None, *grads.flatten()
