"""UnusedLoss: says once that a layer trains with a weight for an auxiliary loss that nobody reads."""

import logging

from torch import Tensor

from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.transforms import is_transformed

__all__ = ["UnusedLoss"]

log = logging.getLogger(__name__)
NUM_STEPS = 2
"""Training forwards behind which a backward has run: one alone may be a trial, or of a loss that is read afterwards."""


class UnusedLoss:
    """Whether a layer's auxiliary loss was read, asked in training forwards until it is known; then it costs nothing.

    Reading the attribute counts as use, in compiled code too: what becomes of it can't be seen. Compiled layers,
    transforms, evaluation and forwards without gradients count no steps.
    """

    def __init__(self, is_wanted: bool) -> None:
        """is_wanted: whether the layer's config gives the loss a weight."""
        self.is_settled = not is_wanted
        self._num_steps = 0
        self._has_run_backward = False

    def watch(self, topk_weights: Tensor) -> None:
        """Look at a training forward with these gate weights, which its backward reaches; warn where it is time."""
        if self.is_settled or not topk_weights.requires_grad or is_recomputing() or is_transformed():
            return
        if self._has_run_backward:
            self._has_run_backward = False
            self._num_steps += 1
        if self._num_steps >= NUM_STEPS:
            self.is_settled = True
            log.warning(
                "nobody has read the aux_loss of a MoELayer in %d training steps, so its load_balance_loss_weight or "
                "z_loss_weight does nothing: add layer.aux_loss to the loss, or give both the weight 0. (This is said "
                "once for each layer)",
                NUM_STEPS,
            )
            return
        topk_weights.register_hook(self._note_backward)

    def _note_backward(self, _: Tensor) -> None:
        self._has_run_backward = True
