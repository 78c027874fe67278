"""What an autograd Function of a call saves and gives back, the same of a whole call and of half a batch.

Activation checkpointing repeats a half's call as a whole one, and takes the tensors of the one for those of the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight, is_fused
from tritonmoe.expert_parallel.call import CallGradients, SavedTensors
from tritonmoe.experts.run import ExpertsRun
from tritonmoe.experts.weight_gradients import rows_to_save

__all__ = ["NUM_WEIGHTS", "gradients_of_inputs", "needs_of_weights", "saved_forward", "tensors_to_save"]

NUM_WEIGHTS = len(PerWeight._fields)
FIRST_WEIGHT = 6
"""The Functions' inputs before the weights: the call, topk_ids, row_seeds, x, topk_weights and the anchor."""


def needs_of_weights(ctx: Any) -> PerWeight[bool]:
    """Give which weights of a Function's call need a gradient."""
    return PerWeight(*ctx.needs_input_grad[FIRST_WEIGHT : FIRST_WEIGHT + NUM_WEIGHTS])


def tensors_to_save(
    run: ExpertsRun,
    weights: PerWeight[Tensor],
    needs: PerWeight[bool],
    mark: Tensor,
    activation_parameters: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Give what the backward of a call needs; mark: that of keep_beside()."""
    computes_h = is_fused(run.settings.activation) and run.h is None
    rows = rows_to_save(run.rows, weights, needs.gate_up_proj, computes_h=computes_h)
    return rows, run.topk_weights, *weights, run.h, run.row_seeds, mark, *activation_parameters


def saved_forward(saved_tensors: Sequence[Tensor]) -> tuple[SavedTensors, Tensor]:
    """Make SavedTensors of what tensors_to_save() gave, and give the mark for kept_beside()."""
    rows, topk_weights, *others = saved_tensors
    h, row_seeds, mark, *parameters = others[NUM_WEIGHTS:]
    return SavedTensors(rows, topk_weights, PerWeight(*others[:NUM_WEIGHTS]), h, row_seeds, parameters), mark


def gradients_of_inputs(grads: CallGradients, topk_weights_dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Give them in the order of the inputs, from the call and topk_ids to the parameters of the activation."""
    dtopk_weights = None if grads.topk_weights is None else grads.topk_weights.to(topk_weights_dtype)
    return None, None, None, grads.x, dtopk_weights, None, *grads.weights, *grads.activation_parameters
