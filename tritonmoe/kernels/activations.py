"""Activations and their slopes in fp32, as pieces of kernels."""

import triton
import triton.language as tl

from tritonmoe.config.layer import ClampedSwiGLU, FusedActivation

__all__ = ["activate", "activate_with_slopes", "activation_options"]


def activation_options(activation: FusedActivation | None) -> tuple[str, tuple[float, float, float]]:
    """Give the ACTIVATION constexpr and the scalars (limit, alpha, up_offset)."""
    if activation is None:
        return "none", (0.0, 0.0, 0.0)
    if isinstance(activation, ClampedSwiGLU):
        scalars = (float(activation.limit), float(activation.alpha), float(activation.up_offset))
        return "clamped_swiglu", scalars
    return activation, (0.0, 0.0, 0.0)


@triton.jit
def _lower_of(x, bound):
    """Give the lower one; NaN stays NaN, as in PyTorch."""
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher_of(x, bound):
    """Give the higher one; NaN stays NaN."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pointwise_with_slope(x, ACTIVATION: tl.constexpr):
    """Give f(x) and f'(x)."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        cumulative = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cumulative
        slope = cumulative + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 z); 1.5957... is 2 sqrt(2 / pi).
        square = x * x
        sigmoid = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        value = x * sigmoid
        slope = sigmoid + x * sigmoid * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    elif ACTIVATION == "relu":
        value = _higher_of(x, 0.0)
        slope = tl.where(x <= 0.0, 0.0, 1.0)  # 1 for NaN, as in PyTorch
    else:
        tl.static_assert(ACTIVATION == "relu2")
        value = _higher_of(x, 0.0)
        slope = 2.0 * value
        value = value * value
    return value, slope


@triton.jit
def activate_with_slopes(gate, up, limit, alpha, up_offset, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """Give a = act(gate, up), da/dgate and da/dup; `up` is ignored (and da/dup is da/dgate) when ungated."""
    if ACTIVATION == "clamped_swiglu":
        clamped_gate = _lower_of(gate, limit)
        shifted_up = _lower_of(_higher_of(up, -limit), limit) + up_offset
        sigmoid = tl.sigmoid(alpha * clamped_gate)
        swish = clamped_gate * sigmoid
        a = swish * shifted_up
        slope = sigmoid * (1.0 + alpha * clamped_gate * (1.0 - sigmoid))
        slope_gate = tl.where(gate <= limit, slope * shifted_up, 0.0)
        slope_up = tl.where((up >= -limit) & (up <= limit), swish, 0.0)
    elif GATED:
        value, slope = _pointwise_with_slope(gate, ACTIVATION)
        a = value * up
        slope_gate = slope * up
        slope_up = value
    else:
        a, slope_gate = _pointwise_with_slope(gate, ACTIVATION)
        slope_up = slope_gate
    return a, slope_gate, slope_up


@triton.jit
def activate(gate, up, limit, alpha, up_offset, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """Give a = act(gate, up)."""
    a, _, _ = activate_with_slopes(gate, up, limit, alpha, up_offset, GATED, ACTIVATION)
    return a
