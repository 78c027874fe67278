"""Activations and their slopes in fp32, as pieces of kernels: a function for each entry of config/activations.py.

A function takes gate and up (the gate once more where there is none), the activation's numbers and GATED. It returns
a = act(gate, up), da/dgate and da/dup.
"""

from typing import Any

import triton
import triton.language as tl

from tritonmoe.config.activations import MAX_NUMBERS, FusedActivation, find_activation
from tritonmoe.ops.kernels.arithmetic import sigmoid_of

__all__ = ["activation_options"]


def activation_options(activation: FusedActivation | None) -> tuple[Any, tuple[float, ...]]:
    """Return the ACTIVATION constexpr and MAX_NUMBERS numbers, zeros behind those of the activation."""
    if activation is None:
        return None, (0.0,) * MAX_NUMBERS
    found = find_activation(activation)
    padding = (0.0,) * (MAX_NUMBERS - len(found.numbers))
    return KERNEL_FUNCTIONS[found.name], found.numbers + padding


@triton.jit
def _lower_of(x, bound):
    """Return the lower one; NaN stays NaN, as in PyTorch."""
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher_of(x, bound):
    """Return the higher one; NaN stays NaN."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _times_up(value, slope, up, GATED: tl.constexpr):
    """Return value times up and its two slopes, for the value and slope of the gate."""
    if GATED:
        a = value * up
        slope_gate = slope * up
        slope_up = value
    else:
        a = value
        slope_gate = slope
        slope_up = slope
    return a, slope_gate, slope_up


@triton.jit
def silu(gate, up, numbers, GATED: tl.constexpr):
    sigmoid = sigmoid_of(gate)
    value = gate * sigmoid
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return _times_up(value, slope, up, GATED)


@triton.jit
def gelu(gate, up, numbers, GATED: tl.constexpr):
    cumulative = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    value = gate * cumulative
    slope = cumulative + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return _times_up(value, slope, up, GATED)


@triton.jit
def gelu_tanh(gate, up, numbers, GATED: tl.constexpr):
    # (1 + tanh(z)) / 2 is sigmoid(2 z); 1.5957... is 2 sqrt(2 / pi).
    square = gate * gate
    sigmoid = sigmoid_of(1.5957691216057308 * gate * (1.0 + 0.044715 * square))
    value = gate * sigmoid
    slope = sigmoid + gate * sigmoid * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    return _times_up(value, slope, up, GATED)


@triton.jit
def relu(gate, up, numbers, GATED: tl.constexpr):
    value = _higher_of(gate, 0.0)
    slope = tl.where(gate <= 0.0, 0.0, 1.0)  # 1 for NaN, as in PyTorch
    return _times_up(value, slope, up, GATED)


@triton.jit
def relu2(gate, up, numbers, GATED: tl.constexpr):
    value = _higher_of(gate, 0.0)
    slope = 2.0 * value
    return _times_up(value * value, slope, up, GATED)


@triton.jit
def clamped_swiglu(gate, up, numbers, GATED: tl.constexpr):
    limit, alpha, up_offset = numbers
    clamped_gate = _lower_of(gate, limit)
    shifted_up = _lower_of(_higher_of(up, -limit), limit) + up_offset
    sigmoid = sigmoid_of(alpha * clamped_gate)
    swish = clamped_gate * sigmoid
    a = swish * shifted_up
    slope = sigmoid * (1.0 + alpha * clamped_gate * (1.0 - sigmoid))
    slope_gate = tl.where(gate <= limit, slope * shifted_up, 0.0)
    slope_up = tl.where((up >= -limit) & (up <= limit), swish, 0.0)
    return a, slope_gate, slope_up


@triton.jit
def _tanh(x):
    """Return tanh(x), near zero by Cephes' polynomial: the difference of 1 and almost 1 has few bits."""
    square = x * x
    odd = -5.70498872745e-3 * square + 2.06390887954e-2
    odd = (odd * square - 5.37397155531e-2) * square + 1.33314422036e-1
    odd = (odd * square - 3.33332819422e-1) * square * x + x
    return tl.where(tl.abs(x) < 0.625, odd, 1.0 - 2.0 * sigmoid_of(-2.0 * x))


@triton.jit
def softcapped_swiglu(gate, up, numbers, GATED: tl.constexpr):
    gate_cap, up_cap, _ = numbers
    gate_tanh, up_tanh = _tanh(gate / gate_cap), _tanh(up / up_cap)
    sigmoid, capped_up = sigmoid_of(gate), up_cap * up_tanh
    swish = gate_cap * gate_tanh * sigmoid
    slope = sigmoid * (1.0 - gate_tanh * gate_tanh) + swish * (1.0 - sigmoid)
    return swish * capped_up, slope * capped_up, swish * (1.0 - up_tanh * up_tanh)


KERNEL_FUNCTIONS = {
    function.__name__: function for function in (silu, gelu, gelu_tanh, relu, relu2, clamped_swiglu, softcapped_swiglu)
}
