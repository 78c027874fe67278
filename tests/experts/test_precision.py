"""Experts in an ExpertPrecision: the grid, the layer on it, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.precision import decode, encode, rounded, rounded_rows
from tritonmoe.expert_parallel import operator, whole_call
from tritonmoe.expert_parallel.layer_pass import BackwardPass
from tritonmoe.expert_parallel.state import state_of
from tritonmoe.ops.backends import precision_choice
from tritonmoe.ops.backends.rounded import rounded_weight
from tritonmoe.transports import LocalTransport, Transport

PRECISIONS = [tm.ExpertPrecision(form, gradients) for form in ("fp8_block", "mxfp8") for gradients in ("bf16", "fp8")]
ALL_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
SHAPES = {"T": 70, "D": 160, "F": 96, "E": 5, "K": 2}


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)


def least_scale(largest: float) -> int:
    """Return the exponent of the least power of two that is at least largest / 448, by the definition."""
    mantissa, exponent = math.frexp(largest / 448)
    return exponent - (mantissa == 0.5)


@pytest.mark.parametrize("largest", [448.0, 450.0, 300.0, 1.0, 1e-30, 1.5e-33, 2.9e38])
def test_every_number_becomes_the_nearest_code(largest):
    beside = torch.tensor(largest).bfloat16()
    numbers = ALL_BF16[ALL_BF16.abs() <= beside]
    matrix = torch.stack([numbers, beside.expand(len(numbers))], 1)
    codes, scales = encode(matrix, (1, 2))
    power = least_scale(float(beside))
    assert scales.unique().tolist() == [power + 127]
    nearest = (numbers.double() / 2.0**power).float().to(torch.float8_e4m3fn)
    assert torch.equal(codes[:, 0].float(), nearest.float())
    assert not (codes.view(torch.uint8) == 0x80).any()
    exact = codes.double() * 2.0**power
    assert torch.equal(decode(codes, scales, (1, 2)).double(), exact)
    assert torch.equal(rounded(matrix, (1, 2)).double(), exact)


def test_numbers_that_are_not_finite_and_small_blocks():
    codes, scales = encode(ALL_BF16.unsqueeze(1), (1, 1))
    is_finite, is_small = ALL_BF16.abs().double() <= 448 * 2.0**119, ALL_BF16.abs().double() <= 448 * 2.0**-118
    assert (scales[:, 0] == 255).equal(~is_finite)
    assert (scales[:, 0] == 0).equal(is_finite & is_small)
    assert not codes[is_small | ~is_finite].view(torch.uint8).any()
    values = rounded(ALL_BF16.unsqueeze(1), (1, 1))[:, 0]
    assert values.isnan().equal(~is_finite)
    assert not bits(values[is_small & is_finite]).any()
    assert (values.float().abs() >= torch.finfo(torch.float32).tiny).equal(is_finite & ~is_small)
    block = torch.tensor([[1.0, float("nan"), 2.0, 3.0]]).bfloat16()
    assert rounded(block, (1, 2)).isnan().tolist() == [[True, True, False, False]]


def test_the_default_dtype_changes_nothing():
    expected = encode(ALL_BF16.unsqueeze(1), (1, 1))
    torch.set_default_dtype(torch.float16)
    try:
        found = encode(ALL_BF16.unsqueeze(1), (1, 1))
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 70), st.integers(0, 70), st.sampled_from([(1, 32), (32, 1), (16, 16), (1, 7)]), st.integers())
def test_rounding_again_changes_nothing(rows, columns, block, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    spread = torch.randn(rows, columns, generator=generator) * 3
    matrix = (torch.randn(rows, columns, generator=generator) * spread.exp()).bfloat16()
    once = rounded(matrix, block)
    assert torch.equal(bits(rounded(once, block)), bits(once))
    assert torch.equal(bits(decode(*encode(matrix, block), block)), bits(once))
    assert torch.equal(bits(rounded(matrix.T, block[::-1]).T), bits(once))


def test_a_weight_is_rounded_along_what_a_product_sums_over():
    weight = torch.randn(2, 70, 200).bfloat16()
    weight[:, 10, 5] = 1e5  # a block of codes with this value among them holds no difference below 0.5
    for precision in (tm.ExpertPrecision("fp8_block"), tm.ExpertPrecision("mxfp8")):
        along = [rounded_weight(weight, precision, depth) for depth in (1, 2)]
        assert torch.equal(*along) == precision.is_symmetric
    of_columns, of_rows = along
    assert torch.equal(of_rows[0], rounded_rows(weight[0], precision))
    assert torch.equal(of_columns[1].T, rounded_rows(weight[1].T, precision))


def operands(dtype=torch.bfloat16, layout=None, bias=True, seed=0):
    """Return a layer's tensors, with experts without tokens, a hot one and skipped ids."""
    generator = torch.Generator().manual_seed(seed)
    layout = layout or {}
    transposed, gated = layout.get("transposed", False), layout.get("gated", True)

    def random(*shape, by=1.0):
        return (torch.randn(*shape, generator=generator) * by).bfloat16().to(dtype)

    T, D, F, E, K = SHAPES.values()
    w1, w2 = random(E, 2 * F if gated else F, D, by=D**-0.5), random(E, D, F, by=F**-0.5)
    if transposed:
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    ids = torch.randint(-1, E, (T, K), generator=generator)
    ids[ids == 3] = 2
    tensors = {
        "x": random(T, D),
        "topk_weights": torch.rand(T, K, generator=generator).to(torch.float64 if dtype == torch.float64 else None),
        "gate_up_proj": w1,
        "down_proj": w2,
    }
    if bias:
        tensors |= {"gate_up_bias": random(E, w1.shape[2 if transposed else 1]), "down_bias": random(E, D)}
    return ids, {name: tensor.requires_grad_() for name, tensor in tensors.items()}, random(T, D)


def run(precision, dtype=torch.bfloat16, layout=None, bias=True, **others):
    ids, tensors, dout = operands(dtype, layout, bias)
    out = tm.moe_mlp(topk_ids=ids, precision=precision, **tensors, **(layout or {}), **others)
    out.backward(dout)
    return {"out": out.detach(), **{name: tensor.grad for name, tensor in tensors.items()}}


def sqnr(value: Tensor, exact: Tensor) -> float:
    noise = (value.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


def by_hand(precision: tm.ExpertPrecision):
    """Return what a gated silu layer with biases computes, expert by expert in fp64 of rounded operands."""
    ids, tensors, dout = operands()
    grads = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
    out = torch.zeros_like(dout, dtype=torch.float64)
    x, dy = (rounded_rows(rows.detach(), precision) for rows in (tensors["x"], dout))
    block = (precision.block, 1)
    tokens = (lambda rows: rounded(rows, block)) if precision.weight_gradients == "fp8" else lambda rows: rows
    for e in range(SHAPES["E"]):
        rows, slots = (ids == e).nonzero(as_tuple=True)
        w1, w2 = tensors["gate_up_proj"][e].detach(), tensors["down_proj"][e].detach()
        (w1_of_rows, w2_of_rows), (w1_of_grads, w2_of_grads) = (
            [rounded_weight(w[None], precision, depth)[0].double() for w in (w1, w2)] for depth in (2, 1)
        )
        h = (x[rows].double() @ w1_of_rows.T + tensors["gate_up_bias"][e].double()).bfloat16().detach()
        h_exact = h.double().requires_grad_()
        gate, up = h_exact.chunk(2, 1)
        a_exact = torch.nn.functional.silu(gate) * up
        a = a_exact.detach().bfloat16()
        y = rounded_rows(a, precision).double() @ w2_of_rows.T + tensors["down_bias"][e].double()
        s = tensors["topk_weights"].detach()[rows, slots].double()[:, None]
        out.index_add_(0, rows, s * y.bfloat16().double())
        g = dy[rows].double() @ w2_of_grads
        grads["topk_weights"][rows, slots] = (g * a_exact).sum(1).detach() + dy[rows].double() @ tensors["down_bias"][
            e
        ].double()
        (dh,) = torch.autograd.grad(a_exact, h_exact, s * g)
        dh = dh.bfloat16()
        grads["x"].index_add_(0, rows, (rounded_rows(dh, precision).double() @ w1_of_grads).bfloat16().double())
        grads["gate_up_proj"][e] = tokens(dh).double().T @ tokens(x[rows]).double()
        grads["down_proj"][e] = tokens(dy[rows]).double().T @ tokens((s * a.double()).bfloat16()).double()
        grads["gate_up_bias"][e], grads["down_bias"][e] = dh.double().sum(0), (dy[rows].double() * s).sum(0)
    return {"out": out.detach(), **grads}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_layer_multiplies_rounded_operands(precision, backend):
    found, exact = run(precision, backend=backend), by_hand(precision)
    wide = run(None, torch.float64, backend="reference")
    for name, value in found.items():
        # Sums in another order round h, y or dh the other way now and then, and one of these numbers to another code.
        assert sqnr(value, exact[name]) >= 35, name
        assert 23 <= sqnr(value, wide[name]) <= 34, name


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    "layout",
    [{"transposed": True}, {"interleaved": True}, {"gated": False, "activation": "relu2"}],
    ids=lambda layout: next(iter(layout)),
)
def test_layouts(precision, layout):
    layout = {"activation": "silu", **layout}
    found = run(precision, layout=layout, backend="torch")
    assert found.keys() == run(precision, layout=layout, backend="reference", save="input").keys()
    for name, value in run(precision, layout=layout, backend="reference", save="input").items():
        assert sqnr(found[name], value) >= 35, name


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_ways_to_run_give_the_same_bits(precision):
    expected = run(precision, backend="torch")
    for others in ({"save": "input"}, {"activation": lambda h: _silu_of(h)}):
        found = run(precision, backend="torch", **others)
        differing = {name for name, value in found.items() if not torch.equal(value, expected[name])}
        assert differing == set() or (others.keys() == {"activation"} and sqnr(found["out"], expected["out"]) > 38)
    ids, tensors, dout = operands()
    out = torch.compile(tm.moe_mlp, backend="aot_eager", fullgraph=True)(
        topk_ids=ids, precision=precision, backend="torch", **tensors
    )
    out.backward(dout)
    assert torch.equal(out, expected["out"])
    for name, tensor in tensors.items():
        assert torch.equal(tensor.grad, expected[name]), name


def _silu_of(h: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, 1)
    return (torch.nn.functional.silu(gate) * up).to(h.dtype)


def test_outliers_and_a_step_without_tokens():
    precision = tm.ExpertPrecision("mxfp8", "fp8")
    w1, w2 = torch.randn(3, 64, 64).bfloat16().requires_grad_(), torch.randn(3, 64, 32).bfloat16().requires_grad_()
    x = torch.zeros(0, 64).bfloat16().requires_grad_()
    out = tm.moe_mlp(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), w1, w2, precision=precision)
    out.sum().backward()
    assert out.shape == (0, 64)
    assert not w1.grad.any()
    assert not w2.grad.any()


def test_one_number_that_is_not_finite_is_seen():
    ids, tensors, _ = operands()
    x = tensors["x"].detach().clone()
    ids[4] = torch.tensor([0, 1])
    x[4, 7] = float("inf")
    out = tm.moe_mlp(**tensors | {"x": x}, topk_ids=ids, precision=PRECISIONS[0])
    assert out[4].isnan().all()
    assert out[torch.arange(len(out)) != 4].isfinite().all()


@pytest.mark.parametrize("precision", [PRECISIONS[1], PRECISIONS[2]], ids=str)
@pytest.mark.parametrize(("num_ranks", "overlap"), [(1, 4), (2, 1), (2, 3), (4, 2)])
def test_ranks_and_chunks_change_what_they_change_in_bf16(precision, num_ranks, overlap):
    T, D, F, E, K = 24, 160, 64, 8, 2
    generator = torch.Generator().manual_seed(3)
    whole = {
        "x": torch.randn(T, D, generator=generator).bfloat16(),
        "topk_weights": torch.rand(T, K, generator=generator),
        "gate_up_proj": (torch.randn(E, 2 * F, D, generator=generator) / D**0.5).bfloat16(),
        "down_proj": (torch.randn(E, D, F, generator=generator) / F**0.5).bfloat16(),
    }
    ids, dout = torch.randint(0, E, (T, K), generator=generator), torch.randn(T, D, generator=generator).bfloat16()

    def of_rank(transport: Transport):
        def part(tensor):
            return tensor.chunk(transport.size)[transport.rank].clone()

        tensors = {name: part(tensor).requires_grad_() for name, tensor in whole.items()}
        out = tm.expert_parallel_mlp(
            topk_ids=part(ids),
            num_experts=E,
            transport=transport,
            overlap=tm.OverlapConfig(num_chunks=overlap),
            precision=precision,
            backend="torch",
            **tensors,
        )
        out.backward(part(dout))
        return out.detach(), *[tensor.grad for tensor in tensors.values()]

    (expected,) = (of_rank(LocalTransport()),) if num_ranks == 1 else (None,)
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in whole.items()}
    out = tm.moe_mlp(topk_ids=ids, precision=precision, backend="torch", **tensors)
    out.backward(dout)
    parts = [expected] if expected else tm.run_on_emulated_ranks(of_rank, num_ranks)
    found = [torch.cat(values) for values in zip(*parts, strict=True)]
    for value, tensor in zip(found[1:], tensors.values(), strict=True):
        assert torch.equal(value, tensor.grad)
    if num_ranks == 1:
        assert torch.equal(found[0], out)
    else:  # the sums of a token's experts are rounded on each rank
        assert sqnr(found[0], out) > 40


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_received_rows_are_kept_as_codes(backend, monkeypatch):
    kept = []

    class Watched(BackwardPass):
        def __init__(self, call, of_call, *others):
            kept.append(of_call.received.x.dtype)
            super().__init__(call, of_call, *others)

    for module in (operator, whole_call):
        monkeypatch.setattr(module, "BackwardPass", Watched)
    config = tm.MoEConfig(64, 32, 4, 2, expert_precision=PRECISIONS[2])
    layer = tm.MoELayer(config, LocalTransport(), dtype=torch.bfloat16)
    run_layer = layer if backend is None else torch.compile(layer, backend=backend)
    run_layer(torch.randn(20, 64).bfloat16()).sum().backward()
    assert kept == [torch.uint8]


def test_kernels_groupings_have_room_behind_the_last_pair():
    """Skipped pairs and a capacity leave positions without a pair, which gradients of weights in FP8 pass over."""
    generator = torch.Generator().manual_seed(0)
    T, D, F, E = 20, 32, 16, 4
    x, dout = torch.randn(2, T, D, generator=generator).bfloat16()
    weights = (
        torch.randn(E, 2 * F, D, generator=generator).bfloat16(),
        torch.randn(E, D, F, generator=generator).bfloat16(),
    )
    ids = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(T)])
    ids[3, 1], ids[7, 0] = -1, E

    def gradients(backend, capacity):
        def of_rank(transport: Transport):
            own = [weight.chunk(2)[transport.rank].clone().requires_grad_() for weight in weights]
            y = tm.expert_parallel_mlp(
                x.chunk(2)[transport.rank],
                ids.chunk(2)[transport.rank],
                torch.ones(T // 2, 2),
                *own,
                num_experts=E,
                transport=transport,
                overlap=tm.OverlapConfig(1, capacity=capacity),
                precision=tm.ExpertPrecision("mxfp8", "fp8"),
                backend=backend,
            )
            y.backward(dout.chunk(2)[transport.rank])
            return [weight.grad for weight in own]

        return [torch.cat(of_both) for of_both in zip(*tm.run_on_emulated_ranks(of_rank, 2), strict=True)]

    for value, exact in zip(gradients("triton", 3.0), gradients("reference", None), strict=True):
        assert sqnr(value, exact) > 35


def test_layers_in_two_precisions_are_tuned_apart():
    transport = LocalTransport()
    for precision in (None, *PRECISIONS[:2]):
        config = tm.MoEConfig(64, 32, 4, 2, expert_precision=precision)
        tm.MoELayer(config, transport, dtype=torch.bfloat16)(torch.randn(20, 64).bfloat16())
    assert len(state_of(transport).choosers) == 3


def test_parameters_stay_in_fp32_under_autocast():
    config = tm.MoEConfig(64, 32, 4, 2, expert_precision=tm.ExpertPrecision("fp8_block"))
    layer = tm.MoELayer(config)
    x = torch.randn(20, 64)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert layer.experts.gate_up_proj.grad.dtype == torch.float32
    plain = tm.MoELayer(tm.MoEConfig(64, 32, 4, 2))
    plain.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert 20 < sqnr(layer(x), plain(x)) < 40


def test_refusals():
    ids, tensors, _ = operands(torch.float32)
    precision = PRECISIONS[0]
    with pytest.raises(TypeError, match=r"rounds bf16 rows and weights, and these are torch.float32: run the layer"):
        tm.moe_mlp(topk_ids=ids, precision=precision, **tensors)
    ids, tensors, _ = operands(bias=False)
    packed = {name: tm.QuantizedWeight.pack(tensors[name].detach(), "mxfp4") for name in ("gate_up_proj", "down_proj")}
    with pytest.raises(ValueError, match="packed ones are frozen"):
        tm.moe_mlp(topk_ids=ids, precision=precision, **tensors | packed)
    a, b = torch.randn(5, 4, 160).bfloat16(), torch.randn(5, 192, 4).bfloat16()
    with pytest.raises(ValueError, match="experts with adapters don't compute in"):
        tm.moe_mlp(topk_ids=ids, precision=precision, adapters=tm.ExpertAdapters(a, b), **tensors)
    with pytest.raises(ValueError, match="format must be one of 'fp8_block', 'mxfp8', got 'fp4'"):
        tm.ExpertPrecision("fp4")
    with pytest.raises(ValueError, match=r"format must be one of 'fp8_block', 'mxfp8', got \[\]"):
        tm.ExpertPrecision([])
    with pytest.raises(ValueError, match="weight_gradients must be 'bf16' or 'fp8', got 'int8'"):
        tm.ExpertPrecision("mxfp8", "int8")
    with pytest.raises(TypeError, match="expert_precision must be an ExpertPrecision or None, got 'mxfp8'"):
        tm.MoEConfig(64, 32, 4, 2, expert_precision="mxfp8")
    with pytest.raises(ValueError, match="leave one of them out"):
        tm.MoEConfig(64, 32, 4, 2, expert_precision=precision, weight_format="mxfp4")
    for overlap, message in (
        (tm.OverlapConfig(wire_dtype=torch.float8_e4m3fn), "rounded twice: leave wire_dtype out"),
        (tm.OverlapConfig(memory_budget_bytes=10**9), "doesn't count the rounded copies of rows and weights"),
    ):
        with pytest.raises(ValueError, match=message):
            tm.expert_parallel_mlp(
                topk_ids=ids, num_experts=5, transport=LocalTransport(), overlap=overlap, precision=precision, **tensors
            )


def test_what_is_emulated_is_said_once(caplog):
    precision_choice._say_emulated.cache_clear()
    for _ in range(2):
        run(PRECISIONS[2])
    (record,) = caplog.records
    assert record.getMessage().startswith("experts in mxfp8 are emulated: bf16 products of rounded numbers, which take")


def test_ranks_agree_on_the_precision():
    def of_rank(transport: Transport):
        ids, tensors, _ = operands(bias=False)
        precision = PRECISIONS[transport.rank]
        weights = {name: tensors[name][:4].chunk(2)[transport.rank] for name in ("gate_up_proj", "down_proj")}
        tm.expert_parallel_mlp(
            topk_ids=ids.clamp(0, 3), num_experts=4, transport=transport, precision=precision, **tensors | weights
        )

    with pytest.raises(tm.CountMismatch, match="expert_precision"):
        tm.run_on_emulated_ranks(of_rank, 2)
