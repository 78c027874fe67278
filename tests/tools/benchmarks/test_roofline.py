"""Bytes, operations and bounds of the kernels, against sums worked out by hand."""

from dataclasses import replace

import pytest

from tritonmoe.config.layer import NO_WEIGHTS, ExpertLayout
from tritonmoe.experts.flops import backward_flops, forward_flops
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.tools.benchmarks.roofline import Work, kernel_work, product_flops
from tritonmoe.tools.benchmarks.shapes import GPU_SHAPES, LayerShape
from tritonmoe.tools.planner.cluster_presets import CLUSTERS

H100 = CLUSTERS["H100"].gpu
SHAPE = LayerShape("small", num_experts=4, top_k=2, hidden_size=8, intermediate_size=3)


def test_bytes_by_hand():
    """T = 5 tokens, N = 10 pairs, D = 8, F = 3, all 4 experts hit, 2 bytes an element."""
    work = kernel_work(SHAPE, 5)
    x, pairs, h, a = 5 * 8 * 2, 10 * 8 * 2, 10 * 6 * 2, 10 * 3 * 2
    w1, w2, index = 4 * 6 * 8 * 2, 4 * 3 * 8 * 2, 10 * 4
    assert work["up"] == Work(2 * 10 * 8 * 6, x + index + w1 + h + a)
    assert work["down"] == Work(2 * 10 * 8 * 3, a + w2 + pairs)
    assert work["gather_sum"].num_bytes == pairs + index + 40 + x
    assert work["down_grad"].num_bytes == x + index + 40 + w2 + h + h + a + 40
    assert work["up_grad"] == Work(2 * 10 * 8 * 6, h + w1 + pairs)
    assert work["weight_grad W1"].num_bytes == x + index + h + w1
    assert work["weight_grad W2"].num_bytes == x + index + a + w2


def test_empty_experts_cost_their_gradient_only():
    work = kernel_work(SHAPE, 1)  # 2 pairs, at most 2 of 4 experts
    assert work["down"].num_bytes == 2 * 3 * 2 + 2 * 3 * 8 * 2 + 2 * 8 * 2
    assert work["weight_grad W2"].num_bytes == 8 * 2 + 2 * 3 * 2 + 2 * 4 + 4 * 3 * 8 * 2


@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_products_add_up_to_the_layer(shape):
    """6*N*D*F forward and 12*N*D*F backward."""
    product = 100 * shape.top_k * shape.hidden_size * shape.intermediate_size
    assert product_flops(shape, 100, backward=False) == 6 * product
    assert product_flops(shape, 100, backward=True) == 18 * product


@pytest.mark.parametrize("gated", [True, False])
def test_products_are_those_that_flop_counters_hear_of(gated):
    shape = LayerShape("small", 4, 2, 8, 3, "silu" if gated else "relu2", ExpertLayout(gated=gated))
    weights = NO_WEIGHTS._replace(gate_up_proj=(4, 6 if gated else 3, 8), down_proj=(4, 8, 3))
    shapes = CallTensors((5, 8), (5, 2), (5, 2), weights)
    forward = forward_flops(shapes)
    assert product_flops(shape, 5, backward=False) == forward
    needs = shapes.map(lambda _: True)
    assert product_flops(shape, 5, backward=True) == forward + backward_flops(shapes, needs, computes_h=False)


def test_without_a_gate():
    shape = LayerShape("ungated", 4, 2, 8, 3, "relu2", ExpertLayout(gated=False))
    assert product_flops(shape, 5, backward=False) == 4 * 10 * 8 * 3


def test_bounds():
    assert Work(989_400_000_000_000, 1).seconds(H100) == pytest.approx(1.0)
    assert Work(0, 3_350_000_000_000).seconds(H100) == pytest.approx(1.0)
    ridge = 989.4 / 3.35
    assert Work(round(ridge * 1e6) + 1, 10**6).bound(H100) == "compute"
    assert Work(round(ridge * 1e6) - 1, 10**6).bound(H100) == "memory"
    assert (Work(1, 2) + Work(3, 4)).intensity == pytest.approx(4 / 6)


def test_training_is_compute_bound_and_decode_is_not():
    shape = GPU_SHAPES["Qwen3-30B-A3B"]
    assert kernel_work(shape, 32768)["up"].bound(H100) == "compute"
    assert kernel_work(shape, 1)["up"].bound(H100) == "memory"
    assert kernel_work(shape, 32768)["gather_sum"].bound(H100) == "memory"


def test_packed_weights_have_their_own_bytes_and_no_gradients():
    plain = LayerShape("plain", 4, 2, 128, 64)
    packed = replace(plain, weight_format="mxfp4")
    works = kernel_work(plain, 5), kernel_work(packed, 5)
    for name, parameters in (
        ("up", 2 * 128 * 64),
        ("down", 128 * 64),
        ("down_grad", 128 * 64),
        ("up_grad", 2 * 128 * 64),
    ):
        saved = works[0][name].num_bytes - works[1][name].num_bytes
        assert saved == 4 * parameters * (2 - 17 / 32)
        assert works[0][name].flops == works[1][name].flops
    assert works[0].keys() - works[1].keys() == {"weight_grad W1", "weight_grad W2"}
    assert product_flops(packed, 5, backward=True) * 3 == product_flops(plain, 5, backward=True) * 2
