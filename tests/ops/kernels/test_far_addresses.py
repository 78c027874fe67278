"""Offsets past 2^31: rows, experts and pairs so far apart that int32 arithmetic on them would wrap.

The memory is sparse files, of which only a few pages exist. A wrapped address is not mapped: another process takes the
crash.
"""

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

STRIDE = 2**30 + 16
"""Between rows, or between experts: twice this is past 2^31, and the stride itself still is an int32."""


class FarMemory:
    """Tensors whose outermost stride is STRIDE."""

    def __init__(self, folder):
        self.folder, self.num_files = folder, 0

    def like(self, tensor):
        """Return a far tensor of the same shape and dtype, all zeros."""
        self.num_files += 1
        size = STRIDE * (tensor.shape[0] - 1) + tensor[0].numel()
        path = os.path.join(self.folder, str(self.num_files))
        storage = torch.from_file(path, shared=True, size=size, dtype=tensor.dtype)
        return storage.as_strided(tensor.shape, (STRIDE, *tensor[0].contiguous().stride()))

    def copy(self, tensor):
        """Return a far tensor with the same values."""
        return self.like(tensor).copy_(tensor)


def check(folder):
    """Run every operation on operands that are far apart and on ones that are not: the bits must be the same."""
    from kernel_cases import ALL_GRADIENTS, LAYOUTS, Layer

    from tritonmoe.config.layer import PerWeight
    from tritonmoe.ops.backends import triton as kernels
    from tritonmoe.ops.backends.ops import GradientOperands
    from tritonmoe.ops.grouping import RowSources
    from tritonmoe.ops.kernels import up as up_kernels
    from tritonmoe.ops.kernels.gather import gather_rows

    far, ids = FarMemory(folder), torch.tensor([[2], [0], [1]], dtype=torch.int32)
    near = Layer(ids, 3, LAYOUTS["concatenated"], torch.float16)
    layer = Layer(ids, 3, LAYOUTS["concatenated"], torch.float16)
    for name in ("ids", "x", "dout", "weights", "w1", "w2", "b1", "b2"):
        setattr(layer, name, far.copy(getattr(near, name)))

    def same(name, actual, expected):
        assert torch.equal(actual, expected), name

    grouping, expected_grouping = kernels.group(layer.ids, 3), kernels.group(near.ids, 3)
    same("pair_index", grouping.pair_index, expected_grouping.pair_index)
    same("expert_offsets", grouping.expert_offsets, expected_grouping.expert_offsets)
    same("copied rows", gather_rows(layer.x, grouping), gather_rows(near.x, expected_grouping))
    sources = RowSources((0,), torch.tensor([[1], [2]]))
    chunks = {"chunk_row_offsets": (0, 1, 3), "chunk_pair_offsets": (0, 1, 3), "row_sources": sources}
    in_chunks = [kernels.group(operands.ids, 3, **chunks) for operands in (layer, near)]
    same("source_order", *(each.source_order for each in in_chunks))
    same("chunk_expert_offsets", *(each.chunk_expert_offsets for each in in_chunks))
    h, a = kernels.up(near.x, near.gate_up, grouping, "silu")
    with patch.object(up_kernels, "output", lambda like, rows, width, out=None: far.like(a) if out is None else out):
        out_h, out_a = kernels.up(layer.x, layer.gate_up, grouping, "silu", out_h=far.like(h))
    same("h", out_h, h)
    same("a", out_a, a)
    y = kernels.down(a, near.down, grouping)
    out_y = kernels.down(out_a, layer.down, grouping, out=far.like(y))
    same("y", out_y, y)
    index, far_index = grouping.inverse, far.copy(grouping.inverse)
    out = kernels.gather_sum(y, index, near.weights)
    far_out = kernels.gather_sum(out_y, far_index, layer.weights, out=far.like(out))
    same("out", far_out, out)
    dh, scaled_a, dweights = kernels.down_grad(near.dout, near.down, h, near.weights, grouping, "silu")
    out_dh, out_scaled_a, out_dweights = kernels.down_grad(
        layer.dout,
        layer.down,
        out_h,
        layer.weights,
        grouping,
        "silu",
        out=(far.like(dh), far.like(scaled_a)),
    )
    same("dh", out_dh, dh)
    same("scaled_a", out_scaled_a, scaled_a)
    same("dweights", out_dweights, dweights)
    dx = kernels.up_grad(dh, near.gate_up, grouping)
    same("dx", kernels.up_grad(out_dh, layer.gate_up, grouping, out=far.like(dx)), dx)
    near_w1, near_w2 = torch.zeros_like(near.w1), torch.zeros_like(near.w2)
    far_w1, far_w2 = far.like(near.w1), far.like(near.w2)
    grads = [
        kernels.weight_grad(
            grouping,
            layer.layout,
            GradientOperands(one.x, pairs_dh, one.dout, pairs_a, one.weights),
            ALL_GRADIENTS,
            accumulate=PerWeight(w1, None, w2, None),
        )
        for one, pairs_dh, pairs_a, w1, w2 in (
            (near, dh, scaled_a, near_w1, near_w2),
            (layer, out_dh, out_scaled_a, far_w1, far_w2),
        )
    ]
    same("gate_up_proj", far_w1, near_w1)
    same("down_proj", far_w2, near_w2)
    same("gate_up_bias", grads[1].gate_up_bias, grads[0].gate_up_bias)
    same("down_bias", grads[1].down_bias, grads[0].down_bias)
    check_router(far, near.x, near.dout)
    print("every operation reached", far.num_files)


def check_router(far, x, weight):
    """Run the router and its backward on tokens x (3, 20), the weight (3, 20) and gradients that are far apart."""
    from tritonmoe.config.routing import RoutingRule
    from tritonmoe.ops.kernels.router_kernels import route, route_grad

    x, weight, rule = x.bfloat16(), weight.bfloat16(), RoutingRule(2)
    generator = torch.Generator().manual_seed(0)
    gradients = tuple(torch.randn(3, width, generator=generator) for width in (3, 3, 2))
    results = []
    for place in (lambda tensor: tensor, far.copy):
        rows, far_weight = place(x), place(weight)
        routed = route(rows, far_weight, None, rule)
        saved = rows, far_weight, routed.scores, routed.topk_ids, routed.topk_weights
        results.append((*routed, *route_grad(*saved, tuple(map(place, gradients)), rule, (True, True))))
    assert all(torch.equal(actual, expected) for actual, expected in zip(*results, strict=True))


SHAPES = {
    "topk_ids": (5, 4),
    "topk_weights": (5, 4),
    "gate_up_proj": (3, 8, 4),
    "down_proj": (3, 4, 4),
    "gate_up_bias": (3, 8),
    "down_bias": (3, 4),
    "gate_up_a": (3, 2, 4),
    "gate_up_b": (3, 8, 2),
    "down_a": (3, 2, 4),
    "down_b": (3, 4, 2),
}
FAR = [(name, axis) for name, shape in SHAPES.items() for axis in range(1, len(shape))]


def inputs_with(**strides):
    """Return inputs on the meta device, contiguous but where strides are given."""
    from tritonmoe.config.layer import PerWeight
    from tritonmoe.experts.tensors import CallTensors

    tensors = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}
    for name, stride in strides.items():
        tensors[name] = torch.empty_strided(SHAPES[name], stride, device="meta")
    ids, weights = tensors.pop("topk_ids"), tensors.pop("topk_weights")
    return CallTensors(torch.empty(5, 4, device="meta"), ids, weights, PerWeight(**tensors))


@pytest.mark.parametrize(("name", "axis"), FAR)
def test_offsets_past_int32_inside_an_expert_are_refused(name, axis):
    """As of a permuted view of weights that lie with another axis first; between experts any distance is right."""
    from tritonmoe.experts.arguments import check_strides

    size = SHAPES[name][axis]
    strides = [1] * len(SHAPES[name])
    strides[0], strides[axis] = 2**40, (2**31 - 1) // (size - 1)
    check_strides(inputs_with(**{name: strides}))
    strides[axis] += 1
    with pytest.raises(ValueError, match=rf"{name} .* lies too far apart.* along axis {axis} .*{name}\.contiguous\(\)"):
        check_strides(inputs_with(**{name: strides}))


def test_weights_of_deepseek_v3_with_another_axis_first(tmp_path):
    """The refusal comes before anything is read; PyTorch's own products take such weights."""
    import tritonmoe as tm

    experts, width, depth, apart = 2, 4, 4, 2**30
    storage = torch.from_file(str(tmp_path / "far"), shared=True, size=width * apart, dtype=torch.float16)
    far = storage.as_strided((experts, width, depth), (depth, apart, 1))
    far.copy_(torch.arange(experts * width * depth).view(far.shape) / 16)
    x, ids, weights = torch.ones(3, depth).half(), torch.tensor([[0], [1], [1]]), torch.ones(3, 1)
    down = torch.ones(experts, depth, width // 2).half()
    expected = tm.moe_mlp(x, ids, weights, far.contiguous(), down)
    assert torch.equal(tm.moe_mlp(x, ids, weights, far, down, backend="torch"), expected)
    with pytest.raises(ValueError, match="at most 2147483647 along each axis but the first"):
        tm.moe_mlp(x, ids, weights, far, down, backend="triton")
    with pytest.raises(ValueError, match="lies too far apart"):
        tm.expert_parallel_mlp(
            x, ids, weights, far, down, num_experts=experts, transport=tm.transports.LocalTransport(), backend="triton"
        )


@pytest.mark.thorough
def test_addresses_past_two_to_the_31(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "every operation reached" in result.stdout


if __name__ == "__main__":
    check(sys.argv[1])
