"""What each operation of ops.py computes and moves for one pair: the one place that knows.

FLOP counters (experts/flops.py), the bounds of kernels (tools/benchmarks/roofline.py) and predictions of steps
(tools/planner/) ask here, and add what is theirs: weights, indices, rates.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = [
    "BACKWARD",
    "FORWARD",
    "SUMS",
    "WEIGHT_GRADS",
    "PairWork",
    "grad_multiplications",
    "multiplications",
    "pair_work",
    "products_and_elements",
]

FORWARD = ("up", "down", "gather_sum")
BACKWARD = ("down_grad", "up_grad", "gather_sum_grad")
WEIGHT_GRADS = ("weight_grad W1", "weight_grad W2")
SUMS = ("gather_sum", "gather_sum_grad")
"""The operations that are no products."""


class PairWork(NamedTuple):
    """What one operation does for one pair."""

    flops: int
    token_elements: int
    """Read or written of a token's row, which all of its pairs may share: x, dout, and the sums over pairs."""
    pair_elements: int
    """Read or written of rows that each pair has for itself."""


def pair_work(hidden_size: int, intermediate_size: int, *, gated: bool = True) -> dict[str, PairWork]:
    """Return the work of every operation, by name; the two gradients of weights apart, as the two sums of rows."""
    d, a = hidden_size, intermediate_size
    h = 2 * a if gated else a
    return {
        "up": PairWork(2 * d * h, d, h + a),
        "down": PairWork(2 * a * d, 0, a + d),
        "gather_sum": PairWork(2 * d, d, d),
        "down_grad": PairWork(2 * d * a, d, h + h + a),  # reads h, writes dh and s * a
        "up_grad": PairWork(2 * h * d, 0, h + d),
        "gather_sum_grad": PairWork(d, d, d),
        "weight_grad W1": PairWork(2 * d * h, d, h),
        "weight_grad W2": PairWork(2 * a * d, d, a),
    }


def products_and_elements(work: Mapping[str, PairWork], names: Sequence[str]) -> tuple[int, int]:
    """Return the FLOPs of these operations' products, and the elements that they move of a pair that shares no row."""
    flops = sum(work[name].flops for name in names if name not in SUMS)
    return flops, sum(work[name].token_elements + work[name].pair_elements for name in names)


def multiplications(weight: int, factor_a: int, factor_b: int) -> int:
    """Return the multiplications of a pair with a weight, and the factors of its adapter, of so many elements.

    Of an expert's part of each; 0 where there is no adapter.
    """
    return weight + factor_a + factor_b


def grad_multiplications(weight: int, factor_a: int, factor_b: int, needs_inputs: bool) -> int:
    """Return those of the gradient: through the weight and both factors, and once more with A, for B's gradient.

    needs_inputs: whether the gradient of what is multiplied is wanted; without, that of the factors alone is prepared.
    """
    return factor_a + factor_b + (weight + factor_a if needs_inputs else 0)
