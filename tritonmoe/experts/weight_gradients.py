"""weight_gradients(): one call of the op for all weights that need a gradient; a main_grad gets it added."""

from typing import NamedTuple

from torch import Tensor

from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.experts.flops import count_products
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.grouping import Grouping

__all__ = ["GradientOperands", "weight_gradients"]


class GradientOperands(NamedTuple):
    """What the gradients of weights are products and sums of; those that no wanted gradient needs may be None."""

    x: Tensor | None = None
    """(R, D); with dh, of gate_up_proj."""
    dh: Tensor | None = None
    """(N, 2F); also of gate_up_bias."""
    dout: Tensor | None = None
    """(R, D); with scaled_a, of down_proj."""
    scaled_a: Tensor | None = None
    """(N, F): the activations, each times its pair's gate weight."""
    topk_weights: Tensor | None = None
    """(R, K); with dout, of down_bias."""


def weight_gradients(
    settings: ExpertSettings,
    grouping: Grouping,
    needs: PerWeight[bool],
    main_grads: PerWeight[Tensor | None] | None,
    operands: GradientOperands,
) -> PerWeight[Tensor | None]:
    """Call the weight_grad op for the weights that need it, and add to main_grads where there are such."""
    if not any(needs):
        return NO_WEIGHTS
    main = main_grads or NO_WEIGHTS
    x, dh, dout, scaled_a, topk_weights = operands
    for is_needed, one, other in ((needs.gate_up_proj, x, dh), (needs.down_proj, dout, scaled_a)):
        if is_needed and one is not None and other is not None:
            count_products(settings.ops, one, grouping.num_pairs, one.shape[1] * other.shape[1])
    grads: PerWeight[Tensor | None] = settings.ops.weight_grad(
        grouping,
        settings.layout,
        x=x if needs.gate_up_proj else None,
        dh=dh if needs.gate_up_proj or needs.gate_up_bias else None,
        dout=dout if needs.down_proj or needs.down_bias else None,
        scaled_a=scaled_a if needs.down_proj else None,
        topk_weights=topk_weights if needs.down_bias else None,
        gate_up_bias=bool(needs.gate_up_bias),
        down_bias=bool(needs.down_bias),
        accumulate_gate_up=main.gate_up_proj if needs.gate_up_proj else None,
        accumulate_down=main.down_proj if needs.down_proj else None,
        options=settings.options,
    )
    return grads._replace(
        gate_up_bias=_added(grads.gate_up_bias, main.gate_up_bias),
        down_bias=_added(grads.down_bias, main.down_bias),
    )


def _added(grad: Tensor | None, main_grad: Tensor | None) -> Tensor | None:
    if grad is None or main_grad is None:
        return grad
    main_grad.add_(grad)
    return None
