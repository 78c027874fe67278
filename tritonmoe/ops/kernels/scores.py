"""Scores of logits in fp32, and back, as pieces of kernels: two functions for each entry of config/scores.py.

The value takes rows of logits and which columns are experts, the backward the gradient of the scores and the scores.
"""

from typing import Any

import triton
import triton.language as tl

from tritonmoe.config.scores import LEAST_SOFTPLUS

__all__ = ["score_function", "score_gradient"]

_LEAST_SOFTPLUS = tl.constexpr(LEAST_SOFTPLUS)


def score_function(name: str) -> Any:
    """Return the SCORE constexpr of a forward."""
    return KERNEL_FUNCTIONS[name][0]


def score_gradient(name: str) -> Any:
    """Return the SCORE_GRAD constexpr of a backward."""
    return KERNEL_FUNCTIONS[name][1]


@triton.jit
def softmax(values, is_expert):
    largest = tl.max(tl.where(is_expert, values, float("-inf")), 1)
    powers = tl.where(is_expert, tl.exp(values - largest[:, None]), 0.0)
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def softmax_grad(grad, score):
    return score * (grad - tl.sum(score * grad, 1)[:, None])


@triton.jit
def sigmoid(values, is_expert):
    return 1.0 / (1.0 + tl.exp(-values))


@triton.jit
def sigmoid_grad(grad, score):
    return grad * score * (1.0 - score)


@triton.jit
def sqrtsoftplus(values, is_expert):
    power = tl.exp(-tl.abs(values))
    more = 1.0 + power
    # The logarithm of 1 + power, right where the sum has rounded most of the power away (Kahan).
    logarithm = tl.where(more == 1.0, power, tl.log(more) * (power / (more - 1.0)))
    root = tl.sqrt(tl.maximum(values, 0.0) + logarithm)
    return tl.where(values < _LEAST_SOFTPLUS, tl.exp(0.5 * values), root)


@triton.jit
def sqrtsoftplus_grad(grad, score):
    softplus = score * score
    # The logit's sigmoid is 1 - exp(-softplus): by its series where this difference would cancel.
    series = softplus * (
        1.0 - softplus / 2.0 * (1.0 - softplus / 3.0 * (1.0 - softplus / 4.0 * (1.0 - softplus / 5.0)))
    )
    sigmoid_of_logit = tl.where(softplus < 0.1, series, 1.0 - tl.exp(-softplus))
    return tl.where(score > 0.0, grad * sigmoid_of_logit / (2.0 * score), 0.0)


KERNEL_FUNCTIONS = {
    "softmax": (softmax, softmax_grad),
    "sigmoid": (sigmoid, sigmoid_grad),
    "sqrtsoftplus": (sqrtsoftplus, sqrtsoftplus_grad),
}
