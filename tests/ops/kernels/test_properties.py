"""Any layer, any routing: all seven operations against the reference in fp64, on cases that hypothesis draws."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import ACTIVATIONS, LAYOUTS, Layer, check_operations, random_ids

from tritonmoe.config.activations import ClampedSwiGLU, GateFunction

FEWEST_CASES, FEW_CASES, MANY_CASES = 12, 60, 200
DEEPSEEK_V4 = ClampedSwiGLU(0.5)


def routed_ids(routing, num_rows, top_k, num_experts, seed):
    """Draw (T, K) ids: all kinds of load that experts can get."""
    ids = random_ids(num_rows, top_k, num_experts, skip=0.2 if routing == "skips" else 0.0, seed=seed)
    if routing == "hot":
        return torch.full_like(ids, num_experts - 1)
    if routing == "half empty":
        return ids // 2
    if routing == "all skipped":
        return torch.full_like(ids, -1)
    return ids


@st.composite
def layers(draw):
    """Return a small layer and an activation that fits it."""
    layout = draw(st.sampled_from(list(LAYOUTS.values())))
    activation = draw(st.sampled_from((*ACTIVATIONS, DEEPSEEK_V4)))
    if not layout.gated and isinstance(activation, GateFunction):
        activation = "relu2"
    num_experts, top_k, num_rows = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(0, 20))
    routing = draw(st.sampled_from(["skips", "skips", "even", "hot", "half empty", "all skipped"]))
    seed = draw(st.integers(0, 9))
    layer = Layer(
        routed_ids(routing, num_rows, top_k, num_experts, seed),
        num_experts,
        layout,
        draw(st.sampled_from([torch.float32, torch.float16])),
        hidden=draw(st.integers(1, 24)),
        intermediate=draw(st.integers(1, 20)),
        bias=draw(st.booleans()),
        seed=seed,
    )
    return layer, activation


def check(case):
    """Compare forward and backward, each operation on the same operands."""
    check_operations(*case)


# A case takes a second in the interpreter: too slow to shrink a failing one.
common = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@settings(common, max_examples=FEWEST_CASES)
@given(layers())
def test_operations_are_those_of_the_reference_in_some_cases(case):
    check(case)


@pytest.mark.thorough
@settings(common, max_examples=FEW_CASES)
@given(layers())
def test_operations_are_those_of_the_reference(case):
    check(case)


@pytest.mark.slow
@settings(common, max_examples=MANY_CASES)
@given(layers())
def test_operations_are_those_of_the_reference_in_many_cases(case):
    check(case)
