"""The Triton kernels against the reference operations; in the interpreter where there is no GPU."""

import threading

import pytest
import torch
from kernel_cases import (
    ACTIVATIONS,
    ALL_GRADIENTS,
    DEVICE,
    GPT_OSS,
    LAYOUTS,
    SOME_LAYOUTS,
    Layer,
    check_operations,
    given_grads,
    random_ids,
    row_sources,
)

from tritonmoe.config.layer import NO_WEIGHTS
from tritonmoe.ops import aot
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.backends.ops import NO_GRADIENTS, GradientOperands


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("layout", "activation"),
    [
        pytest.param(layout, activation, id=f"{name}-{activation}")
        for name, layout in LAYOUTS.items()
        for activation in ACTIVATIONS
        if layout.gated or isinstance(activation, str)
    ],
)
def test_layouts_and_activations(layout, activation):
    check_operations(Layer(random_ids(13, 3, 3), 3, layout), activation)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "transposed", "ungated"])
def test_dtypes_over_several_tiles(layout, dtype):
    ids = random_ids(33, 3, 5)
    layer = Layer(ids, 5, LAYOUTS[layout], dtype, hidden=40, intermediate=36, bias=layout != "interleaved")
    check_operations(layer, "silu")


@pytest.mark.parametrize("layout", ["concatenated", "ungated"])
def test_without_activation(layout):
    check_operations(Layer(random_ids(13, 3, 3), 3, LAYOUTS[layout]), None)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", SOME_LAYOUTS)
def test_addends_in_the_memory_of_the_result(layout, dtype):
    """As low-rank adapters add them: to h, y, g and dx."""
    ids = random_ids(33, 3, 5)
    layer = Layer(ids, 5, LAYOUTS[layout], dtype, hidden=40, intermediate=36)
    check_operations(layer.with_addends(), "silu")


ROUTINGS = {
    "no rows": torch.empty(0, 3, dtype=torch.int64),
    "one pair": torch.tensor([[4]]),
    "all skipped": torch.full((5, 2), -1),
    "one hot expert": torch.full((70, 1), 3),
    "repeated ids": torch.tensor([[2, 2, 2], [0, 2, 0], [6, 6, -1]]),
    "most experts empty": torch.tensor([[0, 6], [6, 0], [0, -1]]),
    "top 16": random_ids(4, 16, 7),
}


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_routings(routing):
    ids = ROUTINGS[routing]
    layer = Layer(ids, 7, LAYOUTS["concatenated"])
    results = check_operations(layer, "silu")
    grouping = reference.group(layer.ids, 7)
    counts = grouping.expert_offsets.diff()
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert (results[f"weight_grad: {name}"][counts == 0] == 0).all(), name
    rows_without_pairs = (grouping.inverse < 0).all(1)
    assert (results["gather_sum"][rows_without_pairs] == 0).all()


def test_skipped_pair_may_have_any_weight():
    layer = Layer(torch.tensor([[0, -1], [2, 1]]), 3, LAYOUTS["concatenated"])
    layer.weights[0, 1] = float("nan")
    check_operations(layer, "silu")


def test_strided_and_expanded_operands():
    layer = Layer(random_ids(11, 3, 4), 4, LAYOUTS["concatenated"])
    layer.dout = layer.dout[:1, :1].expand(11, 20)
    layer.x = torch.stack([layer.x, torch.full_like(layer.x, float("nan"))], 1).flatten(1)[:, :20]
    layer.w1 = layer.w1.mT.contiguous().mT
    layer.w2 = torch.stack([layer.w2, torch.full_like(layer.w2, float("nan"))], 1)[:, 0]
    layer.weights = layer.weights.T.contiguous().T
    assert layer.dout.stride() == (0, 0)
    check_operations(layer, "silu")
    layer.dout = torch.randn(20, device=DEVICE).expand(11, 20)
    layer.x = layer.x.T.contiguous().T
    layer.weights = layer.weights[:1, :1].expand(11, 3)
    check_operations(layer, GPT_OSS)


def test_out_arguments():
    layer = Layer(random_ids(11, 3, 4), 4, LAYOUTS["concatenated"])
    grouping = kernels.group(layer.ids, 4)
    num_pairs, num_active = grouping.num_pairs, int(grouping.expert_offsets[-1])
    h, a = kernels.up(layer.x, layer.gate_up, grouping, "silu")
    y = kernels.down(a, layer.down, grouping)
    arguments = (layer.dout, layer.down, h, layer.weights, grouping, "silu")
    dh, scaled_a, dweights = kernels.down_grad(*arguments)

    wide = torch.full((num_pairs + 4, 40), -7.0, device=DEVICE)
    out_h = wide[2:-2, :24]
    assert kernels.up(layer.x, layer.gate_up, grouping, "silu", out_h=out_h)[0] is out_h
    assert torch.equal(out_h[:num_active], h[:num_active])
    assert (wide[:2] == -7).all()
    assert (wide[num_active + 2 :] == -7).all()
    assert (wide[:, 24:] == -7).all()

    out_y, out_dx = torch.empty_like(y), torch.empty_like(y)
    up_arguments = (layer.x, layer.gate_up, grouping, "silu")
    no_h, same_a = kernels.up(*up_arguments, needs_h=False)
    assert no_h is None
    assert torch.equal(same_a[:num_active], a[:num_active])
    assert kernels.up(*up_arguments, needs_h=False, out_h=out_h)[0] is out_h
    assert kernels.down(a, layer.down, grouping, out=out_y) is out_y
    assert torch.equal(out_y[:num_active], y[:num_active])
    assert kernels.up_grad(dh, layer.gate_up, grouping, out=out_dx) is out_dx
    assert torch.equal(out_dx[:num_active], kernels.up_grad(dh, layer.gate_up, grouping)[:num_active])

    out = torch.empty(11, 20, device=DEVICE)
    assert kernels.gather_sum(y, grouping.inverse, layer.weights, out=out) is out
    assert torch.equal(out, kernels.gather_sum(y, grouping.inverse, layer.weights))

    # dh may take the place of h.
    out_scaled_a = torch.empty_like(scaled_a)
    in_place = kernels.down_grad(*arguments, out=(h, out_scaled_a))
    assert in_place[0] is h
    assert in_place[1] is out_scaled_a
    assert torch.equal(h[:num_active], dh[:num_active])
    assert torch.equal(out_scaled_a[:num_active], scaled_a[:num_active])
    assert torch.equal(in_place[2][:num_active], dweights[:num_active])


def test_weight_grad_gives_only_what_is_asked_for():
    layer = Layer(random_ids(5, 2, 3), 3, LAYOUTS["concatenated"])
    grouping = kernels.group(layer.ids, 3)
    dh = torch.ones(grouping.num_pairs, 24, device=DEVICE)
    operands = GradientOperands(dh=dh, dout=layer.dout, scaled_a=dh[:, :12])
    assert kernels.weight_grad(grouping, layer.layout, operands, NO_GRADIENTS) == NO_WEIGHTS
    only_bias = kernels.weight_grad(grouping, layer.layout, operands, NO_GRADIENTS._replace(gate_up_bias=True))
    assert only_bias.gate_up_proj is None
    counts = grouping.expert_offsets.diff()
    assert torch.equal(only_bias.gate_up_bias, counts[:, None].expand(3, 24).float())
    only_w2 = kernels.weight_grad(grouping, layer.layout, operands, NO_GRADIENTS._replace(down_proj=True))
    assert only_w2.down_proj.shape == (3, 20, 12)
    assert only_w2.down_bias is None


def run_in_chunks(layer, row_offsets, sources, activation):
    """Run a layer chunk by chunk and give what must not depend on the chunks."""
    expected = reference.group(layer.ids, layer.num_experts, chunk_row_offsets=row_offsets, row_sources=sources)
    grouping = kernels.group(
        layer.ids,
        layer.num_experts,
        chunk_row_offsets=row_offsets,
        chunk_pair_offsets=expected.chunk_pair_offsets,
        row_sources=sources,
    )
    layout, width = layer.layout, layer.w1.shape[2 if layer.layout.transposed else 1]
    dh = layer.x.new_empty(grouping.num_pairs, width)
    scaled_a = layer.x.new_empty(grouping.num_pairs, layout.intermediate_size(width))
    outs, dxs, dweights = [], [], []
    for index in range(grouping.num_chunks):
        chunk = grouping.chunk(index)
        pairs = slice(*grouping.chunk_pair_offsets[index : index + 2])
        rows = slice(*row_offsets[index : index + 2])
        h, a = kernels.up(layer.x, layer.gate_up, chunk, activation)
        y = kernels.down(a, layer.down, chunk)
        outs.append(kernels.gather_sum(y, chunk.inverse, layer.weights[rows]))
        *_, pair_dweights = kernels.down_grad(
            layer.dout, layer.down, h, layer.weights, chunk, activation, out=(dh[pairs], scaled_a[pairs])
        )
        dweights.append(chunk.pairs_to_rows(pair_dweights))
        dxs.append(kernels.gather_sum(kernels.up_grad(dh[pairs], layer.gate_up, chunk), chunk.inverse))
    operands = GradientOperands(layer.x, dh, layer.dout, scaled_a, layer.weights)
    grads = kernels.weight_grad(grouping, layout, operands, ALL_GRADIENTS)
    return torch.cat(outs), torch.cat(dxs), torch.cat(dweights), grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bits_do_not_depend_on_chunks(dtype):
    """One buffer sorted by source, then the same rows in four chunks: same bits per row and per weight."""
    num_rows, num_experts = 60, 3
    whole = Layer(random_ids(num_rows, 2, num_experts), num_experts, LAYOUTS["concatenated"], dtype)
    sources = torch.arange(num_rows) // 20
    reached = run_in_chunks(whole, (0, num_rows), row_sources((0, num_rows), sources, 3), "silu")
    again = run_in_chunks(whole, (0, num_rows), row_sources((0, num_rows), sources, 3), "silu")

    # Chunks 0 and 2 are small, chunk 1 has no row.
    chunk_of_row = torch.tensor([0] * 3 + [2] * 5 + [3] * 12, device=DEVICE).repeat(3)
    to_chunks = torch.argsort(chunk_of_row, stable=True)
    row_offsets = (0, 9, 9, 24, 60)
    parts = object.__new__(Layer)
    vars(parts).update(vars(whole))
    for name in ("ids", "x", "dout", "weights"):
        setattr(parts, name, getattr(whole, name)[to_chunks])
    chunked = run_in_chunks(parts, row_offsets, row_sources(row_offsets, sources[to_chunks.cpu()], 3), "silu")

    for first, second, third in zip(reached[:3], again[:3], chunked[:3], strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[to_chunks], third)
    for name in given_grads(reached[3]):
        assert torch.equal(getattr(reached[3], name), getattr(again[3], name)), name
        assert torch.equal(getattr(reached[3], name), getattr(chunked[3], name)), name


def test_launches_from_several_threads():
    """Emulated ranks are threads, and the interpreter can't run two kernels at a time."""
    layers = [Layer(random_ids(9, 2, 3, seed=s), 3, LAYOUTS["concatenated"], seed=s) for s in range(4)]

    def run(layer):
        grouping = kernels.group(layer.ids, 3)
        _, a = kernels.up(layer.x, layer.gate_up, grouping, "silu")
        y = kernels.down(a, layer.down, grouping)
        return kernels.gather_sum(y, grouping.inverse, layer.weights)

    expected = [run(layer) for layer in layers]
    results = [None] * len(layers)

    def run_rank(rank):
        results[rank] = run(layers[rank])

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, reached in zip(results, expected, strict=True):
        assert torch.equal(result, reached)


@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_operations_never_read_the_device(target):
    """Meta tensors have no values: any host read of one raises."""
    launches = aot.record_launches(aot.Variant(), aot.TARGETS[target])
    operations = {"group", "up", "down", "gather_sum", "down_grad", "up_grad", "weight_grad"}
    assert {name.split()[0] for name in launches} == operations | {"router", "router_grad"}
