"""down_grad and weight_grad on drawn shapes, routings, gates and dtypes; addresses past 2^31; what they launch."""

import pytest
import torch
from backward_cases import Operands
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, LAYOUTS, given_grads, random_ids
from tolerance import assert_close_to_exact
from uninitialised import nan_filled_memory

from tritonmoe.config.activations import ACTIVATION_NAMES, ClampedSwiGLU, GateFunction, SoftcappedSwiGLU
from tritonmoe.config.layer import KernelOptions, PerWeight, Projection
from tritonmoe.ops import aot
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.backends.ops import NO_GRADIENTS, GradientOperands
from tritonmoe.ops.kernels import bias_grad, launch, weight_grad

ACTIVATIONS = (*ACTIVATION_NAMES, ClampedSwiGLU(0.7, alpha=1.702, up_offset=1.0), SoftcappedSwiGLU(0.7, 1.5), None)


@pytest.mark.thorough
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    num_rows=st.integers(0, 40),
    top_k=st.integers(1, 4),
    num_experts=st.integers(1, 9),
    skip=st.sampled_from([0.0, 0.3, 0.95]),
    hidden=st.integers(1, 40),
    intermediate=st.integers(1, 40),
    bias=st.booleans(),
    num_sms=st.sampled_from([None, 1, 5]),
    span=st.sampled_from([4, 16, 4096]),
    seed=st.integers(0, 99),
)
def test_backward_matches_reference(
    layout,
    activation,
    dtype,
    num_rows,
    top_k,
    num_experts,
    skip,
    hidden,
    intermediate,
    bias,
    num_sms,
    span,
    seed,
):
    """Against fp64, in memory full of NaN, twice with the same bits; a clamp of 0.7 cuts half of all units."""
    if isinstance(activation, GateFunction) and not LAYOUTS[layout].gated:
        activation = "silu"
    ids = random_ids(num_rows, top_k, num_experts, skip=skip, seed=seed)
    operands = Operands(ids, num_experts, LAYOUTS[layout], dtype, hidden=hidden, intermediate=intermediate, seed=seed)
    expected_grouping, options = operands.group(), KernelOptions(num_sms=num_sms)
    plain = operands.down_grad(reference, expected_grouping, activation, bias)
    plain |= given_grads(operands.weight_grad(reference, expected_grouping))
    exact = operands.double().down_grad(reference, expected_grouping, activation, bias)
    exact |= given_grads(operands.double().weight_grad(reference, expected_grouping))
    runs = []
    with pytest.MonkeyPatch.context() as patch, nan_filled_memory():
        patch.setattr(weight_grad, "span_length", lambda *_: span)
        patch.setattr(bias_grad, "SPAN", span)
        for _ in range(2):
            grouping = kernels.group(operands.ids, num_experts)
            found = operands.down_grad(kernels, grouping, activation, bias, options=options)
            runs.append(found | given_grads(operands.weight_grad(kernels, grouping, options=options)))
    for name, value in runs[0].items():
        assert_close_to_exact(name, value, plain[name], exact[name])
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.skipif(DEVICE == "cuda", reason="untouched memory costs nothing only on a CPU")
def test_addresses_past_two_to_the_31():
    """Rows and experts 2^30 elements apart, three of each: an int32 product would leave the buffer."""
    stride, rows = 2**30 + 8, 3
    buffer = torch.empty(2 * stride + 2048, dtype=torch.float16)  # 4.3 GB of addresses, a few pages of memory
    taken = 0

    def spread(values):
        """Return the same (3, ...) values with their first axis `stride` elements apart."""
        nonlocal taken
        piece = values[0].numel()
        far = buffer.as_strided(values.shape, (stride, *values.stride()[1:]), taken)
        taken += -(-piece // 8) * 8
        assert taken <= 2048
        return far.copy_(values)

    # One pair for each row and each expert, in an order that is not that of the rows.
    operands = Operands(torch.tensor([[1], [0], [2]]), rows, LAYOUTS["concatenated"], torch.float16, hidden=10)
    grouping = operands.group()
    expected = operands.down_grad(kernels, grouping, "silu")
    expected_grads = operands.weight_grad(kernels, grouping)
    for name in ("x", "dout", "h", "dh", "scaled_a", "w2", "b2"):
        setattr(operands, name, spread(getattr(operands, name)))
    out = spread(operands.dh), spread(operands.scaled_a)
    reached = operands.down_grad(kernels, grouping, "silu", out=out)
    for name, value in expected.items():
        assert torch.equal(reached[name], value), name
    gate_up = spread(torch.zeros_like(expected_grads.gate_up_proj))
    down = spread(torch.zeros_like(expected_grads.down_proj))
    grads = operands.weight_grad(kernels, grouping, accumulate=PerWeight(gate_up, None, down, None))
    assert torch.equal(gate_up, expected_grads.gate_up_proj)
    assert torch.equal(down, expected_grads.down_proj)
    assert torch.equal(grads.gate_up_bias, expected_grads.gate_up_bias)
    assert torch.equal(grads.down_bias, expected_grads.down_bias)


def test_backward_launches():
    """num_sms bounds the grids; nothing is launched for a gradient that nobody asked for."""

    def names():
        found = [item.kernel.__name__ for item in launches]
        launches.clear()
        return found

    def meta(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    layout, options = LAYOUTS["concatenated"], KernelOptions(num_sms=100)
    x, h, a, w2 = meta(4096, 2048), meta(32768, 1536), meta(32768, 768), meta(64, 2048, 768)
    weights = torch.empty(4096, 8, device="meta")
    with launch.recording(aot.TARGETS["sm_90"]) as launches:
        grouping = kernels.group(torch.empty(4096, 8, dtype=torch.int64, device="meta"), 64)
        launches.clear()
        kernels.down_grad(x, Projection(w2, None, layout), h, weights, grouping, "silu", options=options)
        assert launches[0].grid == (100,)
        assert names() == ["_down_grad_kernel", "_sum_partials_kernel"]
        operands = GradientOperands(x, h, x, a, weights)
        kernels.weight_grad(grouping, layout, operands, NO_GRADIENTS._replace(gate_up_proj=True), options=options)
        assert launches[0].grid == (100,)
        assert names() == ["_outer_sums_kernel", "_sum_spans_kernel"]
        kernels.weight_grad(grouping, layout, operands, NO_GRADIENTS._replace(gate_up_bias=True))
        assert names() == ["_bias_grad_kernel", "_sum_spans_kernel"]
        kernels.weight_grad(grouping, layout, operands, NO_GRADIENTS._replace(down_proj=True))
        assert launches[0].grid[0] > 100
        assert names() == ["_outer_sums_kernel", "_sum_spans_kernel"]
        kernels.weight_grad(grouping, layout, operands, NO_GRADIENTS)
        assert names() == []
