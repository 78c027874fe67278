"""Every operation of a layer as a function that runs it alone, and dense products of the same FLOPs."""

from collections.abc import Callable

from torch import Tensor

from tritonmoe.config.layer import Projection
from tritonmoe.experts.quantized_weight import QuantizedWeight
from tritonmoe.ops import backends
from tritonmoe.ops.backends.ops import NO_GRADIENTS, GradientOperands
from tritonmoe.tools.benchmarks.shapes import LayerInputs, LayerShape

__all__ = ["dense_products", "operation_calls"]


def operation_calls(inputs: LayerInputs, backend: str) -> dict[str, Callable[[], object]]:
    """Return every operation of a step, forward and backward, as a function that runs it alone.

    Weights that the shape says are packed are packed here, and have no gradients.
    """
    shape, layout = inputs.shape, inputs.shape.layout
    ops = backends.choose(backend, inputs.x.device, inputs.x.dtype)
    x, gates, dout = inputs.x.detach(), inputs.topk_weights.detach(), inputs.dout
    w = {name: weight.detach() for name, weight in inputs.weights.items()}
    gate_up = _projection(shape, w["gate_up_proj"], w.get("gate_up_bias"))
    down = _projection(shape, w["down_proj"], w.get("down_bias"))
    activation = shape.activation
    grouping = ops.group(inputs.topk_ids, shape.num_experts)
    h, a = ops.up(x, gate_up, grouping, activation)
    y = ops.down(a, down, grouping)
    dh, scaled_a, _ = ops.down_grad(dout, down, h, gates, grouping, activation)
    dx = ops.up_grad(dh, gate_up, grouping)
    operands = GradientOperands(x, dh, dout, scaled_a, gates)
    needs_w1, needs_w2 = NO_GRADIENTS._replace(gate_up_proj=True), NO_GRADIENTS._replace(down_proj=True)
    calls: dict[str, Callable[[], object]] = {
        "group": lambda: ops.group(inputs.topk_ids, shape.num_experts),
        "up": lambda: ops.up(x, gate_up, grouping, activation),
        "up, inference": lambda: ops.up(x, gate_up, grouping, activation, needs_h=False),
        "down": lambda: ops.down(a, down, grouping),
        "gather_sum": lambda: ops.gather_sum(y, grouping.inverse, gates),
        "down_grad": lambda: ops.down_grad(dout, down, h, gates, grouping, activation),
        "up_grad": lambda: ops.up_grad(dh, gate_up, grouping),
        "gather_sum_grad": lambda: ops.gather_sum(dx, grouping.inverse),
    }
    if shape.weight_format is None:
        calls["weight_grad W1"] = lambda: ops.weight_grad(grouping, layout, operands, needs_w1)
        calls["weight_grad W2"] = lambda: ops.weight_grad(grouping, layout, operands, needs_w2)
    return calls


def _projection(shape: LayerShape, weight: Tensor, bias: Tensor | None) -> Projection:
    if shape.weight_format is None:
        return Projection(weight, bias, shape.layout)
    packed = QuantizedWeight.pack(weight, shape.weight_format)
    return Projection(packed.values, bias, shape.layout, scales=packed.scales)


def dense_products(inputs: LayerInputs) -> dict[str, Callable[[], Tensor]]:
    """Return for every kernel with a product one dense product of the same FLOPs."""
    shape, x = inputs.shape, inputs.x.detach()
    n, d, f = inputs.topk_ids.numel(), shape.hidden_size, shape.intermediate_size
    width = 2 * f if shape.layout.gated else f
    rows, hidden, inner = (x.new_empty(n, columns).normal_() for columns in (d, width, f))
    w1, w2 = x.new_empty(width, d).normal_(), x.new_empty(d, f).normal_()
    return {
        "up": lambda: rows @ w1.mT,
        "up, inference": lambda: rows @ w1.mT,
        "down": lambda: inner @ w2.mT,
        "down_grad": lambda: rows @ w2,
        "up_grad": lambda: hidden @ w1,
        "weight_grad W1": lambda: hidden.mT @ rows,
        "weight_grad W2": lambda: rows.mT @ inner,
    }
