"""What operations compute and move for one pair, against sums worked out by hand."""

import pytest

from tritonmoe.ops.backends.pair_work import (
    BACKWARD,
    FORWARD,
    SUMS,
    WEIGHT_GRADS,
    grad_multiplications,
    multiplications,
    pair_work,
    products_and_elements,
)

D, F = 8, 3


@pytest.mark.parametrize(("names", "flops", "elements"), [
    (FORWARD, 6 * D * F, (D + 2 * F + F) + (F + D) + 2 * D),
    (BACKWARD, 6 * D * F, (D + 2 * F + 2 * F + F) + (2 * F + D) + 2 * D),
    (WEIGHT_GRADS, 6 * D * F, (D + 2 * F) + (D + F)),
    (["up"], 4 * D * F, D + 2 * F + F),
], ids=["forward", "backward", "weight_grads", "up"])  # fmt: skip
def test_gated_experts(names: tuple[str, ...], flops: int, elements: int) -> None:
    assert products_and_elements(pair_work(D, F), names) == (flops, elements)


def test_ungated_experts() -> None:
    work = pair_work(D, F, gated=False)
    assert products_and_elements(work, FORWARD) == (4 * D * F, (D + F + F) + (F + D) + 2 * D)
    assert all(work[name] == pair_work(D, F)[name] for name in (*SUMS, "down", "weight_grad W2"))


def test_a_projection_with_an_adapter() -> None:
    """D = 4 inputs, 5 outputs, rank 2: x W and (x A) B; backward g W, (g B) A, and x A once more for B's gradient."""
    weight, factor_a, factor_b = 4 * 5, 4 * 2, 2 * 5
    assert multiplications(weight, factor_a, factor_b) == 20 + 8 + 10
    assert grad_multiplications(weight, factor_a, factor_b, True) == 20 + 10 + 8 + 8
    assert grad_multiplications(weight, factor_a, factor_b, False) == 10 + 8
    assert grad_multiplications(weight, 0, 0, False) == 0
