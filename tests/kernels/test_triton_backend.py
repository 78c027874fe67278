"""The Triton kernels against the reference operations; in the interpreter where there is no GPU."""

import contextlib
import inspect
import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonmoe.backends import reference
from tritonmoe.backends import triton as kernels
from tritonmoe.config import ClampedSwiGLU, ExpertLayout
from tritonmoe.kernels import aot, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {
    "concatenated": ExpertLayout(),
    "interleaved": ExpertLayout(interleaved=True),
    "transposed": ExpertLayout(transposed=True),
    "interleaved-transposed": ExpertLayout(interleaved=True, transposed=True),
    "ungated": ExpertLayout(gated=False),
    "ungated-transposed": ExpertLayout(gated=False, transposed=True),
}
OPERATIONS = ("group", "up", "down", "combine", "down_grad", "up_grad", "weight_grad")
GPT_OSS = ClampedSwiGLU(1.0, alpha=1.702, up_offset=1.0)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", GPT_OSS)


@contextlib.contextmanager
def garbage_memory():
    """Fill what torch.empty gives with NaN (integers: a number that is no index)."""
    with pytest.MonkeyPatch.context() as patch:

        def spoil(make):
            def spoiled(*args, **kwargs):
                tensor = make(*args, **kwargs)
                return tensor.fill_(float("nan") if tensor.is_floating_point() else -12345)

            return spoiled

        patch.setattr(torch, "empty", spoil(torch.empty))
        patch.setattr(torch, "empty_like", spoil(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", spoil(torch.Tensor.new_empty))
        yield


def assert_close(name, actual, same_dtype, exact):
    """Allow twice the error of plain PyTorch in the same dtype, plus a small floor."""
    assert actual.dtype == same_dtype.dtype, name
    assert actual.shape == same_dtype.shape, name
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    plain_error = (same_dtype.double() - exact).abs().max().item()
    floor = torch.finfo(actual.dtype).eps * max(1.0, exact.abs().max().item())
    assert error <= 2 * plain_error + floor, f"{name}: error {error}, plain PyTorch {plain_error}"


class Layer:
    """Random weights and rows of one layer, in one dtype."""

    def __init__(self, ids, num_experts, layout, dtype=torch.float32, *, hidden=20, intermediate=12, bias=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

        width = 2 * intermediate if layout.gated else intermediate
        self.layout, self.ids, self.num_experts = layout, ids.to(DEVICE), num_experts
        self.w1 = random(num_experts, width, hidden, scale=hidden**-0.5)
        self.w2 = random(num_experts, hidden, intermediate, scale=intermediate**-0.5)
        if layout.transposed:
            self.w1, self.w2 = self.w1.mT.contiguous(), self.w2.mT.contiguous()
        self.b1 = random(num_experts, width, scale=0.5) if bias else None
        self.b2 = random(num_experts, hidden, scale=0.5) if bias else None
        self.x, self.dout = random(ids.shape[0], hidden), random(ids.shape[0], hidden)
        self.weights = torch.rand(ids.shape, generator=generator).to(DEVICE)

    def double(self):
        """Give the same numbers in fp64."""
        twin = object.__new__(Layer)
        for name, value in vars(self).items():
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            setattr(twin, name, value.double() if is_float else value)
        return twin


def run_operations(backend, layer, grouping, activation, given=None):
    """Run every operation once; with `given`, on the operands that another run produced.

    Returns results by name; those in storage order are cut to the pairs that do work.
    """
    num_active = int(grouping.expert_offsets[-1])
    layout, found = layer.layout, {}

    def pad(tensor):
        """Give the operand of the other run in this run's dtype and length, NaN behind the last pair."""
        padded = torch.full((grouping.num_pairs, *tensor.shape[1:]), float("nan"), device=DEVICE)
        padded[:num_active] = tensor
        return padded.to(layer.x.dtype)

    def operand(name, own):
        return own if given is None else pad(given[name])

    h, a = backend.up(layer.x, layer.w1, layer.b1, grouping, layout, activation)
    found["h"] = h[:num_active]
    if a is None:
        a = torch.full_like(h[:, : h.shape[1] // 2] if layout.gated else h, 0.5)
        h = a
    else:
        found["a"] = a[:num_active]
        h, a = operand("h", h), operand("a", a)
    y = backend.down(a, layer.w2, layer.b2, grouping, layout)
    found["y"] = y[:num_active]
    found["out"] = backend.combine(operand("y", y), grouping.inverse, layer.weights)
    found["unweighted"] = backend.combine(operand("y", y), grouping.inverse)
    found["added"] = backend.combine(operand("y", y), grouping.inverse, layer.weights, layer.dout)
    dh, scaled_a, dweights = backend.down_grad(
        layer.dout, layer.w2, layer.b2, h, layer.weights, grouping, layout, activation
    )
    found |= {"dh": dh[:num_active], "scaled_a": scaled_a[:num_active], "dweights": dweights[:num_active]}
    if activation is None:
        return found
    dh, scaled_a = operand("dh", dh), operand("scaled_a", scaled_a)
    found["dx"] = backend.up_grad(dh, layer.w1, grouping, layout)[:num_active]
    grads = backend.weight_grad(
        grouping,
        layout,
        x=layer.x,
        dh=dh,
        dout=layer.dout,
        scaled_a=scaled_a,
        topk_weights=layer.weights,
        gate_up_bias=True,
        down_bias=True,
    )
    return found | grads._asdict()


def check_operations(layer, activation):
    """Compare every operation with the reference, each on the same operands."""
    expected_grouping = reference.group(layer.ids, layer.num_experts)
    expected = run_operations(reference, layer, expected_grouping, activation)
    exact = run_operations(reference, layer.double(), expected_grouping, activation, expected)
    with garbage_memory():
        grouping = kernels.group(layer.ids, layer.num_experts)
        actual = run_operations(kernels, layer, grouping, activation, expected)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(name, actual[name], expected[name], exact[name])
    return actual


def random_ids(num_rows, top_k, num_experts, *, skip=0.2, seed=0):
    """Draw ids, some of them skipped (below zero or too large), some twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, num_experts, (num_rows, top_k), generator=generator)
    skipped = torch.rand(num_rows, top_k, generator=generator) < skip
    outside = torch.where(torch.rand(num_rows, top_k, generator=generator) < 0.5, -1, num_experts + 3)
    return torch.where(skipped, outside, ids)


def chunked_rows(num_rows, num_chunks, num_sources, seed=0):
    """Give chunk_row_offsets and the source of each row; some chunks are empty."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, num_rows + 1, (num_chunks - 1,), generator=generator).sort().values.tolist()
    offsets = (0, *cuts, num_rows)
    sources = torch.randint(0, num_sources, (num_rows,), generator=generator)
    for first, last in itertools.pairwise(offsets):
        sources[first:last] = sources[first:last].sort().values
    return offsets, sources.to(DEVICE)


def assert_same_grouping(actual, expected):
    """Compare integers exactly; behind the last pair there is padding of -1."""
    num_pairs = expected.num_pairs
    assert torch.equal(actual.pair_index[:num_pairs], expected.pair_index)
    assert (actual.pair_index[num_pairs:] == -1).all()
    for name in ("expert_offsets", "inverse", "chunk_expert_offsets"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
        assert getattr(actual, name).dtype == torch.int32
    assert actual.chunk_row_offsets == expected.chunk_row_offsets
    if expected.source_order is None:
        assert actual.source_order is None
    else:
        assert torch.equal(actual.source_order, expected.source_order)
        assert actual.chunk_pair_offsets == expected.chunk_pair_offsets


@pytest.mark.parametrize("operation", OPERATIONS)
def test_signatures_are_those_of_the_reference(operation):
    assert inspect.signature(getattr(kernels, operation)) == inspect.signature(getattr(reference, operation))


def test_group_worked_example():
    ids = torch.tensor([[1, 0], [1, 2], [-1, 0], [1, 1]], device=DEVICE)
    grouping = kernels.group(ids, 3)
    assert grouping.pair_index.tolist() == [1, 5, 0, 2, 6, 7, 3, -1]
    assert grouping.expert_offsets.tolist() == [0, 2, 6, 7]
    assert grouping.inverse.tolist() == [[2, 0], [3, 6], [-1, 1], [4, 5]]
    assert grouping.chunk_pair_offsets == (0, 8)
    assert grouping.source_order is None


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(0, 150),
    top_k=st.integers(1, 16),
    num_experts=st.integers(1, 200),
    skip=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_group_matches_reference(num_rows, top_k, num_experts, skip, seed):
    ids = random_ids(num_rows, top_k, num_experts, skip=skip, seed=seed).to(DEVICE)
    with garbage_memory():
        actual = kernels.group(ids, num_experts)
    assert_same_grouping(actual, reference.group(ids, num_experts))


@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.integers(0, 100),
    top_k=st.integers(1, 5),
    num_experts=st.integers(1, 60),
    num_chunks=st.integers(2, 7),
    num_sources=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_group_in_chunks_matches_reference(num_rows, top_k, num_experts, num_chunks, num_sources, seed):
    ids = random_ids(num_rows, top_k, num_experts, seed=seed).to(DEVICE)
    row_offsets, sources = chunked_rows(num_rows, num_chunks, num_sources, seed)
    expected = reference.group(ids, num_experts, chunk_row_offsets=row_offsets, row_source=sources)
    with garbage_memory():
        actual = kernels.group(
            ids,
            num_experts,
            chunk_row_offsets=row_offsets,
            chunk_pair_offsets=expected.chunk_pair_offsets,
            row_source=sources,
        )
    assert_same_grouping(actual, expected)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1024, 16), (1, 1), (127, 10), (128, 2)])
def test_group_limits(num_experts, top_k):
    ids = random_ids(37, top_k, num_experts).to(DEVICE)
    expected = reference.group(ids, num_experts)
    assert_same_grouping(kernels.group(ids, num_experts), expected)
    assert_same_grouping(kernels.group(ids.to(torch.int32), num_experts), expected)
    assert_same_grouping(kernels.group(ids.T.contiguous().T, num_experts), expected)


def test_group_of_many_tiles():
    ids = random_ids(400, 16, 40).to(DEVICE)
    assert_same_grouping(kernels.group(ids, 40), reference.group(ids, 40))
    row_offsets, sources = (0, 10, 390, 400), torch.arange(400, device=DEVICE) // 200
    expected = reference.group(ids, 40, chunk_row_offsets=row_offsets, row_source=sources)
    actual = kernels.group(
        ids,
        40,
        chunk_row_offsets=row_offsets,
        chunk_pair_offsets=expected.chunk_pair_offsets,
        row_source=sources,
    )
    assert_same_grouping(actual, expected)


def test_group_wants_pair_offsets_and_sources_for_chunks():
    ids = random_ids(6, 2, 3).to(DEVICE)
    with pytest.raises(ValueError, match="chunk_pair_offsets"):
        kernels.group(ids, 3, chunk_row_offsets=(0, 2, 6))
    with pytest.raises(ValueError, match="row_source"):
        kernels.group(ids, 3, chunk_row_offsets=(0, 2, 6), chunk_pair_offsets=(0, 4, 12))


@pytest.mark.parametrize(
    ("layout", "activation"),
    [
        pytest.param(layout, activation, id=f"{name}-{getattr(activation, 'alpha', activation)}")
        for name, layout in LAYOUTS.items()
        for activation in ACTIVATIONS
        if layout.gated or isinstance(activation, str)
    ],
)
def test_layouts_and_activations(layout, activation):
    check_operations(Layer(random_ids(13, 3, 3), 3, layout), activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "transposed", "ungated"])
def test_dtypes_over_several_tiles(layout, dtype):
    ids = random_ids(33, 3, 5)
    layer = Layer(ids, 5, LAYOUTS[layout], dtype, hidden=40, intermediate=36, bias=layout != "interleaved")
    check_operations(layer, "silu")


@pytest.mark.parametrize("layout", ["concatenated", "ungated"])
def test_without_activation(layout):
    check_operations(Layer(random_ids(13, 3, 3), 3, LAYOUTS[layout]), None)


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
        assert (results[name][counts == 0] == 0).all(), name
    rows_without_pairs = (grouping.inverse < 0).all(1)
    assert (results["out"][rows_without_pairs] == 0).all()


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
    layout = layer.layout
    h, a = kernels.up(layer.x, layer.w1, layer.b1, grouping, layout, "silu")
    y = kernels.down(a, layer.w2, layer.b2, grouping, layout)
    arguments = (layer.dout, layer.w2, layer.b2, h, layer.weights, grouping, layout, "silu")
    dh, scaled_a, dweights = kernels.down_grad(*arguments)

    wide = torch.full((num_pairs + 4, 40), -7.0, device=DEVICE)
    out_h = wide[2:-2, :24]
    assert kernels.up(layer.x, layer.w1, layer.b1, grouping, layout, "silu", out_h=out_h)[0] is out_h
    assert torch.equal(out_h[:num_active], h[:num_active])
    assert (wide[:2] == -7).all()
    assert (wide[num_active + 2 :] == -7).all()
    assert (wide[:, 24:] == -7).all()

    out_a, out_y, out_dx = torch.empty_like(a), torch.empty_like(y), torch.empty_like(y)
    up_arguments = (layer.x, layer.w1, layer.b1, grouping, layout, "silu")
    no_h, same_a = kernels.up(*up_arguments, needs_h=False, out_a=out_a)
    assert no_h is None
    assert same_a is out_a
    assert torch.equal(out_a[:num_active], a[:num_active])
    assert kernels.up(*up_arguments, needs_h=False, out_h=out_h)[0] is out_h
    assert kernels.down(a, layer.w2, layer.b2, grouping, layout, out=out_y) is out_y
    assert torch.equal(out_y[:num_active], y[:num_active])
    assert kernels.up_grad(dh, layer.w1, grouping, layout, out=out_dx) is out_dx
    assert torch.equal(out_dx[:num_active], kernels.up_grad(dh, layer.w1, grouping, layout)[:num_active])

    out = torch.empty(11, 20, device=DEVICE)
    assert kernels.combine(y, grouping.inverse, layer.weights, out=out) is out
    assert torch.equal(out, kernels.combine(y, grouping.inverse, layer.weights))

    # dh may take the place of h.
    out_scaled_a = torch.empty_like(scaled_a)
    in_place = kernels.down_grad(*arguments, out_dh=h, out_scaled_a=out_scaled_a)
    assert in_place[0] is h
    assert in_place[1] is out_scaled_a
    assert torch.equal(h[:num_active], dh[:num_active])
    assert torch.equal(out_scaled_a[:num_active], scaled_a[:num_active])
    assert torch.equal(in_place[2][:num_active], dweights[:num_active])


def test_weight_grad_gives_only_what_is_asked_for():
    layer = Layer(random_ids(5, 2, 3), 3, LAYOUTS["concatenated"])
    grouping = kernels.group(layer.ids, 3)
    dh = torch.ones(grouping.num_pairs, 24, device=DEVICE)
    assert kernels.weight_grad(grouping, layer.layout, dh=dh) == (None, None, None, None)
    only_bias = kernels.weight_grad(grouping, layer.layout, dh=dh, gate_up_bias=True)
    assert only_bias.gate_up_proj is None
    counts = grouping.expert_offsets.diff()
    assert torch.equal(only_bias.gate_up_bias, counts[:, None].expand(3, 24).float())
    only_w2 = kernels.weight_grad(grouping, layer.layout, dout=layer.dout, scaled_a=dh[:, :12])
    assert only_w2.down_proj.shape == (3, 20, 12)
    assert only_w2.down_bias is None


def run_in_chunks(layer, row_offsets, sources, activation):
    """Run a layer chunk by chunk and give what must not depend on the chunks."""
    expected = reference.group(layer.ids, layer.num_experts, chunk_row_offsets=row_offsets, row_source=sources)
    grouping = kernels.group(
        layer.ids,
        layer.num_experts,
        chunk_row_offsets=row_offsets,
        chunk_pair_offsets=expected.chunk_pair_offsets,
        row_source=sources,
    )
    layout, width = layer.layout, layer.w1.shape[2 if layer.layout.transposed else 1]
    dh = layer.x.new_empty(grouping.num_pairs, width)
    scaled_a = layer.x.new_empty(grouping.num_pairs, layout.intermediate_size(width))
    outs, dxs, dweights = [], [], []
    for index in range(grouping.num_chunks):
        chunk = grouping.chunk(index)
        pairs = slice(*grouping.chunk_pair_offsets[index : index + 2])
        rows = slice(*row_offsets[index : index + 2])
        h, a = kernels.up(layer.x, layer.w1, layer.b1, chunk, layout, activation)
        y = kernels.down(a, layer.w2, layer.b2, chunk, layout)
        outs.append(kernels.combine(y, chunk.inverse, layer.weights[rows]))
        *_, pair_dweights = kernels.down_grad(
            layer.dout,
            layer.w2,
            layer.b2,
            h,
            layer.weights,
            chunk,
            layout,
            activation,
            out_dh=dh[pairs],
            out_scaled_a=scaled_a[pairs],
        )
        dweights.append(chunk.pairs_to_rows(pair_dweights))
        dxs.append(kernels.combine(kernels.up_grad(dh[pairs], layer.w1, chunk, layout), chunk.inverse))
    grads = kernels.weight_grad(
        grouping,
        layout,
        x=layer.x,
        dh=dh,
        dout=layer.dout,
        scaled_a=scaled_a,
        topk_weights=layer.weights,
        gate_up_bias=True,
        down_bias=True,
    )
    return torch.cat(outs), torch.cat(dxs), torch.cat(dweights), grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bits_do_not_depend_on_chunks(dtype):
    """One buffer sorted by source, then the same rows in four chunks: same bits per row and per weight."""
    num_rows, num_experts = 60, 3
    whole = Layer(random_ids(num_rows, 2, num_experts), num_experts, LAYOUTS["concatenated"], dtype)
    sources = torch.arange(num_rows, device=DEVICE) // 20
    reached = run_in_chunks(whole, (0, num_rows), sources, "silu")
    again = run_in_chunks(whole, (0, num_rows), sources, "silu")

    # Chunks 0 and 2 are small, chunk 1 has no row.
    chunk_of_row = torch.tensor([0] * 3 + [2] * 5 + [3] * 12, device=DEVICE).repeat(3)
    to_chunks = torch.argsort(chunk_of_row, stable=True)
    row_offsets = (0, 9, 9, 24, 60)
    parts = object.__new__(Layer)
    vars(parts).update(vars(whole))
    for name in ("ids", "x", "dout", "weights"):
        setattr(parts, name, getattr(whole, name)[to_chunks])
    chunked = run_in_chunks(parts, row_offsets, sources[to_chunks], "silu")

    for first, second, third in zip(reached[:3], again[:3], chunked[:3], strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[to_chunks], third)
    for name in reached[3]._fields:
        assert torch.equal(getattr(reached[3], name), getattr(again[3], name)), name
        assert torch.equal(getattr(reached[3], name), getattr(chunked[3], name)), name


def test_launches_from_several_threads():
    """Emulated ranks are threads, and the interpreter can't run two kernels at a time."""
    layers = [Layer(random_ids(9, 2, 3, seed=s), 3, LAYOUTS["concatenated"], seed=s) for s in range(4)]

    def run(layer):
        grouping = kernels.group(layer.ids, 3)
        _, a = kernels.up(layer.x, layer.w1, layer.b1, grouping, layer.layout, "silu")
        y = kernels.down(a, layer.w2, layer.b2, grouping, layer.layout)
        return kernels.combine(y, grouping.inverse, layer.weights)

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
    assert len(aot.record_launches(aot.Variant(), aot.TARGETS[target])) == 13
    with launch.recording(aot.TARGETS[target]):
        grouping = kernels.group(
            torch.empty(8, 2, dtype=torch.int64, device="meta"),
            5,
            chunk_row_offsets=(0, 3, 8),
            chunk_pair_offsets=(0, 6, 16),
            row_source=torch.empty(8, dtype=torch.int64, device="meta"),
        )
    assert grouping.source_order is not None
    assert grouping.source_order.shape == (16,)


def test_tiles_do_not_depend_on_the_number_of_rows():
    target = aot.TARGETS["sm_90"]
    with launch.recording(target):
        tiles = {
            launch.grouped_matmul_config("up", torch.empty(rows, 64, device="meta"), 64, 64, 8, 2)
            for rows in (0, 1, 100, 100000)
        }
    assert len(tiles) == 1
