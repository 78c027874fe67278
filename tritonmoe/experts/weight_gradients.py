"""weight_gradients(): one call of the op for all weights that need a gradient; a main_grad gets it added."""

from torch import Tensor

from tritonmoe.backends.reference import WeightGrads
from tritonmoe.experts.arguments import ExpertSettings, ExpertWeights, MainGrads
from tritonmoe.experts.flops import count_products
from tritonmoe.grouping import Grouping

__all__ = ["weight_gradients"]


def weight_gradients(
    settings: ExpertSettings,
    grouping: Grouping,
    needs: ExpertWeights | tuple[bool, bool, bool, bool],
    main_grads: MainGrads | None,
    *,
    x: Tensor | None = None,
    dh: Tensor | None = None,
    dout: Tensor | None = None,
    scaled_a: Tensor | None = None,
    topk_weights: Tensor | None = None,
) -> WeightGrads:
    """Call the weight_grad op for the weights that need it, and add to main_grads where there are such."""
    needs_w1, needs_b1, needs_w2, needs_b2 = needs
    if not any(needs):
        return WeightGrads(None, None, None, None)
    main = main_grads or MainGrads(None, None, None, None)
    for is_needed, one, other in ((needs_w1, x, dh), (needs_w2, dout, scaled_a)):
        if is_needed:
            assert one is not None
            assert other is not None
            count_products(settings.ops, one, grouping.num_pairs, one.shape[1] * other.shape[1])
    grads = settings.ops.weight_grad(
        grouping,
        settings.layout,
        x=x if needs_w1 else None,
        dh=dh if needs_w1 or needs_b1 else None,
        dout=dout if needs_w2 or needs_b2 else None,
        scaled_a=scaled_a if needs_w2 else None,
        topk_weights=topk_weights if needs_b2 else None,
        gate_up_bias=bool(needs_b1),
        down_bias=bool(needs_b2),
        accumulate_gate_up=main.gate_up_proj if needs_w1 else None,
        accumulate_down=main.down_proj if needs_w2 else None,
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
