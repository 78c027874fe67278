"""A GPU's large tiles: several of them for each expert and program, and sums of several steps."""

import pytest
import torch
from kernel_cases import DEVICE, GPT_OSS, LAYOUTS, Layer, WithOptions, check_operations, random_ids

from tritonmoe.config.layer import NO_WEIGHTS, KernelOptions
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.backends.ops import NO_GRADIENTS, GradientOperands
from tritonmoe.ops.kernels.tiles import measured_tiles

ON_THREE = KernelOptions(num_sms=3)


def several_steps(dtype=torch.bfloat16, layout="concatenated", *, num_rows=300, num_experts=6, hidden=272, **others):
    """Return a layer with a hot expert and an empty one, whose rows TMA can read where D is a multiple of 16."""
    ids = random_ids(num_rows, 3, num_experts - 1)
    ids[: num_rows // 2, 0] = 1
    return Layer(ids, num_experts, LAYOUTS[layout], dtype, hidden=hidden, intermediate=hidden // 2 + 8, **others)


@pytest.mark.parametrize(
    ("dtype", "layout", "activation", "options"),
    [
        (torch.bfloat16, "concatenated", "silu", ON_THREE),
        (torch.bfloat16, "interleaved", GPT_OSS, KernelOptions()),
        (torch.float16, "transposed", "gelu", ON_THREE),
        (torch.bfloat16, "ungated", "relu2", ON_THREE),
        (torch.float32, "concatenated", "gelu_tanh", ON_THREE),
        (torch.bfloat16, "concatenated", "silu", KernelOptions(batch_invariant=True)),
    ],
    ids=["silu", "clamped", "gelu", "relu2", "fp32", "batch invariant"],
)
def test_operations(dtype, layout, activation, options):
    check_operations(several_steps(dtype, layout), activation, WithOptions(options))


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_addends_in_the_memory_of_the_result(layout):
    check_operations(several_steps(layout=layout).with_addends(), "silu", WithOptions(ON_THREE))


@pytest.mark.parametrize("num_rows", [1, 8, 40, 80, 150])
def test_few_rows(num_rows):
    """Every class of tile heights."""
    check_operations(several_steps(num_rows=num_rows, num_experts=5), "silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_odd_sizes(dtype):
    """Neither TMA nor a vector can read such rows."""
    check_operations(several_steps(dtype, hidden=131), "silu")


@pytest.mark.parametrize(
    "fields", [{"tma": False}, {"gather": "tma"}, {"gather": "copy"}, {"persistent": False}], ids=str
)
def test_other_ways_to_read(fields):
    layer = several_steps(bias=False)
    with measured_tiles.asked() as asked:
        check_operations(layer, "silu", WithOptions(ON_THREE))
    with measured_tiles.using(dict.fromkeys(asked, fields)):
        check_operations(layer, "silu", WithOptions(ON_THREE))


def test_inference_and_accumulation():
    """`up` without h gives the same a; gradients added to main_grad are those given otherwise, in fp32."""
    layer = several_steps()
    grouping = kernels.group(layer.ids, layer.num_experts)
    _, a = kernels.up(layer.x, layer.gate_up, grouping, "silu")
    h, alone = kernels.up(layer.x, layer.gate_up, grouping, "silu", needs_h=False)
    num_active = int(grouping.expert_offsets[-1])
    assert h is None
    assert torch.equal(alone[:num_active], a[:num_active])
    dh = torch.randn(grouping.num_pairs, layer.w1.shape[1], generator=torch.Generator().manual_seed(1))
    dh = dh.to(DEVICE, torch.bfloat16)
    operands, needs = GradientOperands(x=layer.x, dh=dh), NO_GRADIENTS._replace(gate_up_proj=True)
    given = kernels.weight_grad(grouping, layer.layout, operands, needs).gate_up_proj
    main_grad = torch.ones(layer.w1.shape, device=DEVICE)
    accumulate = NO_WEIGHTS._replace(gate_up_proj=main_grad)
    assert kernels.weight_grad(grouping, layer.layout, operands, needs, accumulate=accumulate)[0] is None
    assert torch.equal((main_grad - 1).to(torch.bfloat16)[-1], torch.zeros_like(given[-1]))  # the empty expert
    torch.testing.assert_close(main_grad - 1, given.float(), rtol=2**-8, atol=1e-4)
