"""Packed weights: decoding, bit for bit, and experts with them against experts with decoded ones."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from held_storages import HeldStorages, LargestFloats
from packed_weights import FORMATS, PackedCase, random_weight
from same_bits import assert_same_bits
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.config.formats import WeightFormat
from tritonmoe.ops.backends import decoding

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def plain_decoded(weight: tm.QuantizedWeight) -> Tensor:
    """Return the weight by the definition, a value at a time in fp64."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for e in range(weight.shape[0]):
        for row in range(weight.shape[1]):
            for column in range(weight.shape[2]):
                if weight.format == "fp8":
                    value = float(weight.values[e, row, column])
                    scale = float(weight.scales[e, row // 128, column // 128])
                elif weight.format == "mxfp4":
                    byte = int(weight.values[e, row, column // 2])
                    code = byte >> 4 if column % 2 else byte & 15
                    value = e2m1[code & 7] * (-1 if code & 8 else 1)
                    scale = 2.0 ** (int(weight.scales[e, row, column // 32]) - 127)
                else:
                    byte = int(weight.values[e, row, column // 2])
                    value = decoding.NF4_VALUES[byte & 15 if column % 2 else byte >> 4]
                    scale = float(weight.scales[e, (row * weight.shape[2] + column) // 64])
                product = torch.tensor(value, dtype=torch.float32) * torch.tensor(scale, dtype=torch.float32)
                out[e, row, column] = product.to(torch.bfloat16)
    return out


@pytest.mark.parametrize("weight_format", FORMATS)
def test_decoding_by_the_definition(weight_format: WeightFormat) -> None:
    weight = random_weight(weight_format, (2, 3, 64) if weight_format != "fp8" else (2, 130, 6))
    assert torch.equal(weight.decode(), plain_decoded(weight))
    experts = zip(weight.values, weight.scales, strict=True)
    assert torch.equal(torch.stack([FORMATS[weight_format].decode(*one) for one in experts]), weight.decode())


@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_code_and_scale(weight_format: WeightFormat) -> None:
    """Also of experts of several parts, whose memory holds other values from before."""
    rows = 256
    if weight_format == "mxfp4":
        values = torch.arange(256).to(torch.uint8).repeat(253, 16, 1).view(253, 16, 256)
        weight = tm.QuantizedWeight(
            "mxfp4", values, torch.arange(253).to(torch.uint8).view(253, 1, 1).repeat(1, 16, 16)
        )
    elif weight_format == "fp8":
        codes = torch.arange(256)[(torch.arange(256) & 127) != 127].to(torch.uint8)
        values = codes.repeat(2, rows, 8).view(torch.float8_e4m3fn)
        weight = tm.QuantizedWeight("fp8", values, torch.logspace(-30, 20, 2 * 2 * 16).view(2, 2, 16))
    else:
        values = torch.arange(256).to(torch.uint8).repeat(2, rows, 5)
        weight = tm.QuantizedWeight("nf4", values, torch.logspace(-30, 30, 2 * rows * 40))
    experts = zip(weight.values, weight.scales, strict=True)
    assert_same_bits(weight.decode(), torch.stack([FORMATS[weight_format].decode(*one) for one in experts]))


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
def test_decoding_is_that_of_transformers() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 96, 4, 16), dtype=torch.uint8)
    scales = torch.randint(0, 253, (3, 96, 4), dtype=torch.uint8)
    weight = tm.QuantizedWeight("mxfp4", blocks, scales)
    theirs = mxfp4.convert_moe_packed_tensors(blocks.clone(), scales.clone())
    assert_same_bits(weight.decode().mT.contiguous(), theirs.contiguous())
    weight = random_weight("fp8", (2, 256, 384))
    one = getattr(fp8.Fp8Dequantize(None), "_dequantize_one", None)
    if one is None:
        pytest.skip("this release of transformers has another Fp8Dequantize")
    theirs = torch.stack([one(*pair, torch.bfloat16) for pair in zip(weight.values, weight.scales, strict=True)])
    assert_same_bits(weight.decode(), theirs)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_decoding_is_that_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(3, 96, 64).bfloat16(), blocksize=64, quant_type="nf4")
    weight = tm.QuantizedWeight("nf4", packed, state.absmax, (3, 96, 64))
    theirs = functional.dequantize_4bit(packed, state)
    assert_same_bits(weight.decode(), theirs)
    monkeypatch.setitem(decoding.DECODERS, "nf4", decoding.DECODERS["nf4"]._replace(foreign=lambda: None))
    assert_same_bits(weight.decode(), theirs)


TOKENS = {"torch": (0, 1, 9, 60, 900), "reference": (0, 1, 9, 60), "triton": (0, 1, 9)}


MARKS = {("triton", 1): pytest.mark.slow, ("triton", 9): pytest.mark.thorough}


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("backend", "num_tokens"),
    [pytest.param(name, count, marks=MARKS.get((name, count), ())) for name in TOKENS for count in TOKENS[name]],
)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("save", ["hidden", "input"])
def test_bits_are_those_of_decoded_weights(
    save: str, rank: int, transposed: bool, weight_format: WeightFormat, backend: str, num_tokens: int
) -> None:
    case = PackedCase(
        weight_format, num_tokens, transposed=transposed, rank=rank, bias=bool(rank), dropout=0.2 if rank else 0
    )
    options = {"backend": backend, "save": save}
    assert_same_bits(case.run(decoded=False, **options), case.run(decoded=True, **options))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("sizes", [(96, 160), (128, 128), (320, 64), (64, 32), (160, 384)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hot", [False, True])
def test_bits_of_other_sizes(hot: bool, threads: int, sizes: tuple[int, int], weight_format: WeightFormat) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for num_tokens, num_experts, top_k in ((700, 16, 4), (64, 64, 8), (300, 2, 1)):
            case = PackedCase(weight_format, num_tokens, num_experts, top_k, *sizes, interleaved=True, hot=hot)
            assert_same_bits(case.run(decoded=False), case.run(decoded=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("gated", [True, False])
def test_a_callable_activation(gated: bool) -> None:
    case = PackedCase("nf4", gated=gated, rank=2)

    def activation(h: Tensor) -> Tensor:
        return torch.tanh(h[:, : h.shape[1] // 2]) * h[:, h.shape[1] // 2 :] if gated else torch.tanh(h)

    assert_same_bits(case.run(decoded=False, activation=activation), case.run(decoded=True, activation=activation))


def test_one_of_two_weights_is_packed() -> None:
    case = PackedCase("mxfp4")
    up, down = case.weights()
    x, ids, weights = case.leaves()["x"].detach(), case.topk_ids(), case.leaves()["topk_weights"].detach()
    plain = down.decode().requires_grad_()
    results = []
    for given in (up, up.decode()):
        plain.grad = None
        y = tm.moe_mlp(x, ids, weights, given, plain)
        y.backward(case.dout())
        assert plain.grad is not None
        results.append([y.detach(), plain.grad])
    assert_same_bits(*results)


def test_autocast_and_inference() -> None:
    case = PackedCase("nf4", rank=2)
    up, down = case.weights()
    x = case.leaves()["x"].detach().float()
    ids, weights = case.topk_ids(), case.leaves()["topk_weights"].detach()
    expected = tm.moe_mlp(x.bfloat16(), ids, weights, up.decode(), down.decode())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(tm.moe_mlp(x, ids, weights, up, down), expected)
    with torch.inference_mode():
        assert_same_bits(tm.moe_mlp(x.bfloat16(), ids, weights, up, down).clone(), expected)
    with pytest.raises(TypeError, match="cast x to bf16"), torch.autocast("cpu", torch.float16):
        tm.moe_mlp(x, ids, weights, up, down)
    assert_same_bits(tm.moe_mlp(x.bfloat16(), ids, weights, up, down), expected)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_operator_and_flops(weight_format: WeightFormat) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case, counts = PackedCase(weight_format, rank=2), []
    for decoded in (False, True):
        with FlopCounterMode(display=False) as counter:
            found = case.run(decoded=decoded)
        counts.append(counter.get_total_flops())
        assert_same_bits(found, case.run(decoded=True))
    assert counts[0] == counts[1] > 0


@pytest.mark.thorough
def test_compiled() -> None:
    case = PackedCase("mxfp4")
    up, down = case.weights()

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return tm.moe_mlp(x, ids, weights, up, down)

    leaves = case.leaves()
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        for leaf in leaves.values():
            leaf.grad = None
        function(leaves["x"], case.topk_ids(), leaves["topk_weights"]).backward(case.dout())
        assert_same_bits(
            {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None},
            {name: value for name, value in case.run(decoded=True).items() if name != "y"},
        )


@pytest.mark.parametrize("weight_format", FORMATS)
def test_no_whole_decoded_weight_is_ever_made(weight_format: WeightFormat) -> None:
    """One expert is the most that is decoded at a time, in forward and backward."""
    case = PackedCase(weight_format, num_tokens=24, num_experts=16, top_k=2, hidden=256, intermediate=128, rank=2)
    up, down = case.weights()
    leaves = case.leaves()
    given = {**case.keywords(leaves), "backend": "torch"}
    decoding._threads.__dict__.clear()
    with HeldStorages() as held:
        y = tm.moe_mlp(leaves["x"], case.topk_ids(), leaves["topk_weights"], up, down, **given)  # type: ignore[arg-type]
        y.backward(case.dout())
    expert_bytes = up.shape[1] * up.shape[2] * 2
    tables = 2**16 * 8 + 2**13
    assert max(held.num_bytes) <= max(2 * expert_bytes, tables), sorted(held.num_bytes)[-3:]
    assert up.decode().nbytes > max(2 * expert_bytes, tables)


@pytest.mark.parametrize(
    ("weight_format", "transposed", "save"),
    [
        pytest.param("mxfp4", True, "hidden", marks=pytest.mark.slow),
        pytest.param("fp8", False, "hidden", marks=pytest.mark.thorough),
        pytest.param("nf4", False, "input", marks=pytest.mark.slow),
    ],
)
def test_kernels_make_no_decoded_expert(weight_format: WeightFormat, transposed: bool, save: str) -> None:
    """Not even one: a tile is decoded where it is loaded."""
    case = PackedCase(weight_format, 3, 6, 2, hidden=64, intermediate=128, rank=2, bias=True, transposed=transposed)
    up, down = case.weights()
    leaves = case.leaves()
    given = {**case.keywords(leaves), "backend": "triton", "save": save}
    with LargestFloats() as largest:
        y = tm.moe_mlp(leaves["x"], case.topk_ids(), leaves["topk_weights"], up, down, **given)  # type: ignore[arg-type]
        y.backward(case.dout())
    most = max(largest.num_values.items(), key=lambda made: made[1])
    assert most[1] < down.shape[1] * down.shape[2], most


WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "format": (lambda: tm.QuantizedWeight("fp4", *nothing()), ValueError, "must be one of mxfp4, fp8, nf4"),  # type: ignore[arg-type]
    "other format": (lambda: tm.QuantizedWeight("nf4", *nothing()), TypeError, "of 'mxfp4', not of 'nf4'"),
    "cast": (
        lambda: tm.QuantizedWeight("nf4", torch.zeros(2, 4, 32, dtype=torch.uint8), torch.ones(2, 4).half()),
        TypeError,
        "leave the experts out of that cast",
    ),
    "scale": (
        lambda: tm.QuantizedWeight("mxfp4", nothing()[0], torch.full((2, 4, 1), 253, dtype=torch.uint8)),
        ValueError,
        r"2\*\*\(253 - 127\)",
    ),
    "not a number": (
        lambda: tm.QuantizedWeight(
            "fp8", torch.full((1, 2, 2), torch.nan).to(torch.float8_e4m3fn), torch.ones(1, 1, 1)
        ),
        ValueError,
        "not a number",
    ),
    "infinite scale": (
        lambda: tm.QuantizedWeight("nf4", torch.zeros(1, 2, 32, dtype=torch.uint8), torch.full((1, 2), torch.inf)),
        ValueError,
        r"a scale of an nf4 weight is inf, and bf16 holds 1 times at most 3\.3895e\+38",
    ),
    "no blocks": (
        lambda: tm.QuantizedWeight("mxfp4", torch.zeros(1, 4, 20, dtype=torch.uint8), nothing()[1]),
        ValueError,
        "32 values along the last axis",
    ),
    "half a block": (
        lambda: tm.QuantizedWeight("nf4", torch.zeros(1, 3, 16, dtype=torch.uint8), torch.ones(2)),
        ValueError,
        "64 values of an expert",
    ),
    "no shape": (
        lambda: tm.QuantizedWeight("nf4", torch.zeros(64, 1, dtype=torch.uint8), torch.ones(2)),
        ValueError,
        "give it as the argument `shape`",
    ),
    "scales": (
        lambda: tm.QuantizedWeight("mxfp4", nothing()[0], nothing()[1][:1]),
        ValueError,
        r"has scales \(2, 4, 1\)",
    ),
    "gradient": (
        lambda: tm.QuantizedWeight(
            "fp8", torch.zeros(1, 2, 2).to(torch.float8_e4m3fn), torch.ones(1, 1, 1, requires_grad=True)
        ),
        ValueError,
        "train adapters",
    ),
    "sparse values": (
        lambda: tm.QuantizedWeight("mxfp4", nothing()[0].to_sparse(), nothing()[1]),
        TypeError,
        r"are dense, got torch.sparse_coo: call to_dense\(\)",
    ),
    "sparse scales": (
        lambda: tm.QuantizedWeight("mxfp4", nothing()[0], nothing()[1].to_sparse()),
        TypeError,
        "are dense, got torch.sparse_coo",
    ),
}


def nothing() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 4, 16, dtype=torch.uint8), torch.zeros(2, 4, 1, dtype=torch.uint8)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    make, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        make()


def test_what_experts_refuse() -> None:
    case = PackedCase("nf4")
    up, down = case.weights()
    x, ids, weights = case.leaves()["x"].detach(), case.topk_ids(), case.leaves()["topk_weights"].detach()
    with pytest.raises(TypeError, match="cast x to bf16"):
        tm.moe_mlp(x.float(), ids, weights, up, down)
    with pytest.raises(ValueError, match="batch_invariant"):
        tm.moe_mlp(x, ids, weights, up, down, batch_invariant=True)
    with pytest.raises(ValueError, match=r"down_proj must be \(E, F, D\)"):
        tm.moe_mlp(x, ids, weights, up, down, transposed=True)
    with pytest.raises(TypeError, match=r"Make a QuantizedWeight of these tensors"):
        tm.moe_mlp(x, ids, weights, up.values, down.values)
    odd = [random_weight("fp8", size) for size in ((8, 192, 64), (8, 64, 96))]
    with pytest.raises(ValueError, match="F = 96 is not a multiple of 128"):
        tm.moe_mlp(x, ids, weights, *odd)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("weight_format", ["fp8", "nf4"])
def test_the_largest_scale(weight_format: WeightFormat, backend: str) -> None:
    """With it every value is one of bf16; a larger one would make inf, and NaN of an fp8 zero, and is refused."""
    case = PackedCase(weight_format, num_tokens=4, num_experts=2, top_k=1)
    up, down = case.weights()
    x, ids = torch.zeros(4, case.hidden, dtype=torch.bfloat16), torch.zeros(4, 1, dtype=torch.int64)
    x[:, 0] = 2.0**-128

    def run() -> Tensor:
        return tm.moe_mlp(x, ids, torch.ones(4, 1), up, down, backend=backend)

    limit = FORMATS[weight_format].largest_scale
    up.scales.fill_(limit)
    assert up.decode().abs().max() == torch.finfo(torch.bfloat16).max
    assert run().isfinite().all()
    for scale in (limit * 1.00001, -limit * 1.00001, torch.inf, -torch.inf, torch.nan):
        down.scales.fill_(1.0)
        down.scales.view(-1)[-1] = scale
        with pytest.raises(ValueError, match=f"a scale of an {weight_format} weight is .*the checkpoint is damaged"):
            run()


def test_a_scale_that_is_written_to_is_looked_at_again() -> None:
    case = PackedCase("mxfp4")
    up, down = case.weights()
    x, ids, weights = case.leaves()["x"].detach(), case.topk_ids(), case.leaves()["topk_weights"].detach()
    tm.moe_mlp(x, ids, weights, up, down)
    up.scales.fill_(255)
    with pytest.raises(ValueError, match="255 is not a number"):
        tm.moe_mlp(x, ids, weights, up, down)


def test_a_parameter_as_it_is_in_a_module() -> None:
    weight = random_weight("mxfp4", (2, 4, 64))
    values, scales = (nn.Parameter(t, requires_grad=False) for t in (weight.values, weight.scales))
    assert_same_bits(tm.QuantizedWeight("mxfp4", values, scales).decode(), weight.decode())
