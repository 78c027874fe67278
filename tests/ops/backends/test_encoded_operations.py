"""Products of codes against products of rounded numbers: operations, whole layers, and which of both a call takes."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from uninitialised import nan_filled_memory

import tritonmoe as tm
from tritonmoe.config.layer import ExpertLayout, KernelOptions
from tritonmoe.config.precision import BLOCKS
from tritonmoe.ops.backends import first_use, kernel_check, precision_choice, reference
from tritonmoe.ops.backends import torch as torch_backend
from tritonmoe.ops.backends import triton as triton_backend
from tritonmoe.ops.backends.encoded import EncodedOperations
from tritonmoe.ops.backends.kernel_check import Checked, CheckedLayer, Distance, check_layer
from tritonmoe.ops.backends.ops import CalledLayer, Operations
from tritonmoe.ops.backends.rounded import RoundedOperations
from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels import encode
from tritonmoe.ops.kernels.gpus import ARCHITECTURES, OTHER_ARCHITECTURES, architecture_like
from tritonmoe.tools.cli import env
from tritonmoe.transports import LocalTransport

CPU = torch.device("cpu")
LAYOUTS = {
    "gated": {},
    "interleaved": {"interleaved": True},
    "transposed": {"transposed": True},
    "ungated": {"gated": False, "activation": "relu2"},
}


def sqnr(value: torch.Tensor, exact: torch.Tensor) -> float:
    noise = (value.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise)) if noise else float("inf")


@pytest.mark.parametrize("name", [pytest.param("fp8_block", marks=pytest.mark.thorough), "mxfp8"])
@pytest.mark.parametrize("layout", [pytest.param(one, marks=pytest.mark.thorough) for one in LAYOUTS if one != "gated"])
def test_every_operation(name: str, layout: str) -> None:
    of = dict(LAYOUTS[layout])
    activation = of.pop("activation", "silu")
    precision = tm.ExpertPrecision(name)
    layer = CheckedLayer(
        name, torch.bfloat16, 20, ExpertLayout(**of), activation, 133, 70, num_experts=5, bias=True, precision=precision
    )
    checked = list(check_layer(layer, cast(Operations, EncodedOperations(precision)), CPU))
    assert len(checked) == 16
    assert [one for one in checked if not one.is_right] == []


def layer_tensors(ids: torch.Tensor, sizes: tuple[int, int], layout: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return x, gate weights and weights, whose blocks differ in size, and with them the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    (depth, units), gated = sizes, layout.get("gated", True)
    w1 = torch.randn(5, (2 if gated else 1) * units, depth, generator=generator) / depth**0.5
    w2 = torch.randn(5, depth, units, generator=generator) / units**0.5
    w1[:, ::2] *= 4
    w1[:, units:] *= 8
    w2[:, :, :32] *= 8
    if layout.get("transposed"):
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    x = torch.randn(len(ids), depth, generator=generator)
    x[:, 64:] *= 16
    tensors = {"x": x.bfloat16(), "gate_up_proj": w1.bfloat16(), "down_proj": w2.bfloat16()}
    return tensors | {"topk_weights": torch.rand(ids.shape, generator=generator)}


def run(backend: str, ids: torch.Tensor, tensors: dict, precision: tm.ExpertPrecision, layout: dict, **others: object):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = tm.moe_mlp(topk_ids=ids, **leaves, backend=backend, precision=precision, **layout, **others)
    generator = torch.Generator().manual_seed(9)
    out.backward(torch.randn(out.shape, generator=generator).bfloat16())
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def ids_of(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 4, (30, 2), generator=generator)  # the last expert is empty
    if name == "skipped":
        ids[torch.rand(30, 2, generator=generator) < 0.4] = -1
    if name == "one hot expert":
        ids[:, 0] = 2
    return {"no tokens": ids[:0], "one token": ids[:1], "all skipped": torch.full((3, 2), -1)}.get(name, ids)


IDS = ["no tokens", "one token", "all skipped", "skipped", "one hot expert"]


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        pytest.param(name, ids, marks=() if (name, ids) == ("fp8_block", "skipped") else pytest.mark.thorough)
        for name in BLOCKS
        for ids in IDS
    ],
)
def test_layers(name: str, ids: str) -> None:
    tensors = layer_tensors(ids_of(ids), (150, 40), {})
    with nan_filled_memory():
        found = run("triton", ids_of(ids), tensors, tm.ExpertPrecision(name), {})
    for of, value in run("reference", ids_of(ids), tensors, tm.ExpertPrecision(name), {}).items():
        assert found[of].isfinite().all(), of
        # Sums in another order round a number the other way now and then, and it becomes another code.
        assert not value.any() or sqnr(found[of], value) >= 35, of
        assert value.any() or not found[of].any(), of


@pytest.mark.thorough
@pytest.mark.parametrize("layout", [one for one in LAYOUTS if one != "gated"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("weight_gradients", ["bf16", "fp8"])
def test_layers_of_other_layouts(name: str, layout: str, weight_gradients: str) -> None:
    precision, of = tm.ExpertPrecision(name, weight_gradients), LAYOUTS[layout]
    ids = ids_of("skipped")
    tensors = layer_tensors(ids, (70, 129), of)
    others = {"save": "input"} if layout == "interleaved" else {}
    found = run("triton", ids, tensors, precision, of, **others)
    for name_of, value in run("reference", ids, tensors, precision, of).items():
        assert sqnr(found[name_of], value) >= 35, name_of


@pytest.mark.parametrize("num_chunks", [pytest.param(1, marks=pytest.mark.thorough), 3])
def test_a_chunk_encodes_its_own_rows(num_chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row once in each direction, and chunks change no bit."""
    ids, precision = ids_of("one hot expert").clamp(0, 3), tm.ExpertPrecision("fp8_block")
    tensors = layer_tensors(ids, (70, 40), {})
    expected = run("triton", ids, tensors, precision, {})
    ranges, right = [], encode.encode_rows

    def watched(rows: torch.Tensor, of: tm.ExpertPrecision, among: tuple[int, int] | None = None):
        if rows.shape[1] == 70:
            ranges.append(among)
        return right(rows, of, among)

    monkeypatch.setattr("tritonmoe.ops.backends.encoded.encode_rows", watched)
    others = {"num_experts": 5, "transport": LocalTransport(), "overlap": tm.OverlapConfig(num_chunks=num_chunks)}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = tm.expert_parallel_mlp(topk_ids=ids, **leaves, backend="triton", precision=precision, **others)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16())
    found = {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    rows = [row for among in ranges if among is not None for row in range(*among)]
    assert sorted(rows) == sorted([*range(30), *range(30)])


def test_chunks_of_experts_may_have_any_rows() -> None:
    offsets, places = torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    chunks = Grouping(places, offsets, places[:, None], None, offsets.expand(2, 3), (0, 1, 4), (0, 2, 4))
    assert [chunks.chunk(c).gathered_rows for c in range(2)] == [(0, 1), (1, 4)]
    for first, expected in ((0, [None, None]), (1, [(0, 1), None])):
        of_experts = replace(chunks, first_expert_chunk=first)
        assert [of_experts.chunk(c).gathered_rows for c in range(2)] == expected


# Which operations a call takes

CALLED = CalledLayer(ExpertLayout(), "silu", 64, 32, has_bias=False)
RIGHT = Checked("bf16", "up: h", {"largest": Distance(0.01, 0.02)})
WRONG = Checked("bf16", "down", {"largest": Distance(0.3, 0.02)})


def chosen(name: str, backend: str = "triton", ops: object = triton_backend) -> Operations:
    arguments = CPU, KernelOptions(), 4, 2, CALLED
    return precision_choice.operations_in(cast(Operations, ops), tm.ExpertPrecision(name), backend, *arguments)


def on(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    monkeypatch.setattr("tritonmoe.ops.kernels.launch.gpu_of", lambda device: architecture_like(gpu))


@pytest.mark.parametrize("gpu", [*ARCHITECTURES, *OTHER_ARCHITECTURES, "sm_103", "sm_121", "sm_110", "gfx1201"])
@pytest.mark.parametrize("name", BLOCKS)
def test_cards_without_the_instruction_emulate(gpu: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both, block = {"sm_100", "sm_103", "sm_120", "sm_121", "gfx950"}, {"sm_89", "sm_90"}
    on(monkeypatch, gpu)
    has_it = gpu in (both | block if name == "fp8_block" else both)
    assert type(chosen(name)) is (EncodedOperations if has_it else RoundedOperations)
    assert type(chosen(name, ops=torch_backend)) is type(chosen(name, ops=reference)) is RoundedOperations


@pytest.mark.parametrize("is_right", [True, False])
def test_auto_checks_products_of_codes_once(
    is_right: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    monkeypatch.setenv("TRITONMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_use, "_machine", lambda device: "a card")
    cases = []

    def check(layer: CheckedLayer, ops: Operations, device: torch.device) -> list[Checked]:
        assert type(ops) is EncodedOperations
        cases.append(layer)
        return [RIGHT if is_right else WRONG]

    monkeypatch.setattr(kernel_check, "check_layer", check)
    first_use._found.clear()
    precision_choice._are_seen_to_be_right.cache_clear()
    try:
        monkeypatch.setattr(first_use, "is_captured", lambda device: True)
        assert type(chosen("mxfp8", "auto")) is EncodedOperations, "a graph is captured: asked later"
        assert cases == []
        monkeypatch.setattr(first_use, "is_captured", lambda device: False)
        for _ in range(2):
            assert type(chosen("mxfp8", "auto")) is (EncodedOperations if is_right else RoundedOperations)
        assert {case.precision for case in cases} == {tm.ExpertPrecision("mxfp8")}
        assert len(cases) == 3
        assert type(chosen("mxfp8")) is EncodedOperations
        assert ("take products of rounded numbers in bf16 instead" in caplog.text) is not is_right
        assert ("in mxfp8) bfloat16 on a card" in (tmp_path / "checked.json").read_text()) if is_right else True
    finally:
        first_use._found.clear()
        precision_choice._are_seen_to_be_right.cache_clear()


def test_env_names_how_a_precision_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.collect()["expert_precisions"] == dict.fromkeys(BLOCKS, precision_choice.EMULATED)
    on(monkeypatch, "sm_90")
    monkeypatch.setattr(precision_choice, "triton_unusable_reason", lambda device: None)
    cuda = torch.device("cuda")
    assert precision_choice.how_computed("fp8_block", cuda) == "8-bit instructions of sm_90"
    assert precision_choice.how_computed("mxfp8", cuda) == precision_choice.EMULATED
