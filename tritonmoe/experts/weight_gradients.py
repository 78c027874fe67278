"""weight_gradients(): one call of the op for all weights that need a gradient; a main_grad gets it added."""

from torch import Tensor

from tritonmoe.backends.ops import GradientOperands
from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.experts.flops import count_products
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.grouping import Grouping

__all__ = ["weight_gradients"]


def weight_gradients(
    settings: ExpertSettings,
    grouping: Grouping,
    needs: PerWeight[bool],
    main_grads: PerWeight[Tensor | None] | None,
    operands: GradientOperands,
) -> PerWeight[Tensor | None]:
    """Call the operation weight_grad for the weights that need it, and add to main_grads where there are such."""
    if not any(needs):
        return NO_WEIGHTS
    main = main_grads or NO_WEIGHTS
    x, dh, dout, scaled_a, _ = operands
    for is_needed, one, other in ((needs.gate_up_proj, x, dh), (needs.down_proj, dout, scaled_a)):
        if is_needed and one is not None and other is not None:
            count_products(settings.ops, one, grouping.num_pairs, one.shape[1] * other.shape[1])
    grads: PerWeight[Tensor | None] = settings.ops.weight_grad(
        grouping, settings.layout, operands, needs, accumulate=main, options=settings.options
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
