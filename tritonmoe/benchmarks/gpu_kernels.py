"""What `tritonmoe bench gpu` measures of single kernels: each operation beside a dense product of its FLOPs."""

import statistics
from collections.abc import Callable

from torch import Tensor

from tritonmoe import backends
from tritonmoe.backends.ops import NO_GRADIENTS, GradientOperands
from tritonmoe.benchmarks.gpu_cases import Setting, time_variants
from tritonmoe.benchmarks.roofline import kernel_work
from tritonmoe.benchmarks.shapes import LayerInputs, LayerShape, draw_inputs
from tritonmoe.benchmarks.timing import summarize
from tritonmoe.config.layer import Projection
from tritonmoe.runtime.files import Json

__all__ = ["measure_kernels", "operation_calls"]


def operation_calls(inputs: LayerInputs, backend: str) -> dict[str, Callable[[], object]]:
    """Give every operation of a step, forward and backward, as a function that runs it alone."""
    shape, layout = inputs.shape, inputs.shape.layout
    ops = backends.choose(backend, inputs.x.device, inputs.x.dtype)
    x, gates, dout = inputs.x.detach(), inputs.topk_weights.detach(), inputs.dout
    w = {name: weight.detach() for name, weight in inputs.weights.items()}
    gate_up = Projection(w["gate_up_proj"], w.get("gate_up_bias"), layout)
    down = Projection(w["down_proj"], w.get("down_bias"), layout)
    activation = shape.activation
    grouping = ops.group(inputs.topk_ids, shape.num_experts)
    h, a = ops.up(x, gate_up, grouping, activation)
    y = ops.down(a, down, grouping)
    dh, scaled_a, _ = ops.down_grad(dout, down, h, gates, grouping, activation)
    dx = ops.up_grad(dh, gate_up, grouping)
    operands = GradientOperands(x, dh, dout, scaled_a, gates)
    needs_w1, needs_w2 = NO_GRADIENTS._replace(gate_up_proj=True), NO_GRADIENTS._replace(down_proj=True)
    return {
        "group": lambda: ops.group(inputs.topk_ids, shape.num_experts),
        "up": lambda: ops.up(x, gate_up, grouping, activation),
        "up, inference": lambda: ops.up(x, gate_up, grouping, activation, needs_h=False),
        "down": lambda: ops.down(a, down, grouping),
        "gather_sum": lambda: ops.gather_sum(y, grouping.inverse, gates),
        "down_grad": lambda: ops.down_grad(dout, down, h, gates, grouping, activation),
        "up_grad": lambda: ops.up_grad(dh, gate_up, grouping),
        "gather_sum_grad": lambda: ops.gather_sum(dx, grouping.inverse),
        "weight_grad W1": lambda: ops.weight_grad(grouping, layout, operands, needs_w1),
        "weight_grad W2": lambda: ops.weight_grad(grouping, layout, operands, needs_w2),
    }


def measure_kernels(shape: LayerShape, num_tokens: int, routing: str, setting: Setting) -> Json:
    """Time each operation beside a dense product of its FLOPs, where it has one."""
    inputs = draw_inputs(shape, num_tokens, routing, setting.dtype, setting.device)
    runs = operation_calls(inputs, setting.backend)
    works = kernel_work(shape, num_tokens, element_bytes=inputs.x.element_size())
    works["up, inference"] = works["up"]
    dense = _dense_by_kernel(inputs)
    results: Json = {}
    for name, run in runs.items():
        variants = {"kernel": run} | ({"dense product": dense[name]} if name in dense else {})
        times, failed = time_variants(variants, setting)
        if failed:
            raise RuntimeError(f"{name}: {failed}")
        summary = summarize(times["kernel"])
        seconds = statistics.median(times["kernel"])
        results[name] = {
            **summary,
            "us": round(seconds * 1e6, 2),
            "tflops": round(works[name].flops / seconds / 1e12, 3),
            "gb_per_s": round(works[name].num_bytes / seconds / 1e9, 1),
        }
        if name in dense:
            results[name]["fraction_of_dense"] = round(statistics.median(times["dense product"]) / seconds, 3)
    return results


def _dense_by_kernel(inputs: LayerInputs) -> dict[str, Callable[[], Tensor]]:
    """Give for every kernel with a product one dense product of the same FLOPs."""
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
