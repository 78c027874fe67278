"""Models of transformers whose experts stay packed: loaded, run, adapted and saved, against decoded ones."""

import copy
import functools
import importlib.metadata
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from held_storages import LargestFloats
from packed_weights import random_weight
from processes import run_torchrun
from safetensors.torch import load_file
from same_bits import assert_same_bits
from torch import Tensor

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

VERSION = tuple(int(number) for number in importlib.metadata.version("transformers").split(".")[:2])
pytestmark = pytest.mark.skipif(VERSION < (5, 24), reason="transformers before 5.24 loads quantised models otherwise")
if VERSION >= (5, 24):
    from packed_checkpoints import SIZES, gpt_oss_config, gpt_oss_mxfp4, load_decoded, qwen3_fp8
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    QUANTIZERS = dict(AUTO_QUANTIZER_MAPPING)
    CHECKPOINTS = {"gpt_oss": gpt_oss_mxfp4, "qwen3": qwen3_fp8}
WORKER = Path(__file__).parent / "packed_worker.py"
IDS = torch.arange(24).view(2, 12) % 64


@pytest.fixture(autouse=True)
def quantizers_are_put_back() -> Iterator[None]:
    yield
    AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


@pytest.fixture(params=["gpt_oss", "qwen3"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, dict[str, Tensor], Path]:
    """A packed model, the same decoded by transformers, what is in the checkpoint, and where it is."""
    state = CHECKPOINTS[request.param](tmp_path)
    tmt.register()
    plain = load_decoded(tmp_path, experts_implementation="tritonmoe")
    tmt.register(packed=True)
    return load(tmp_path), plain, state, tmp_path


def dtypes_of_experts(model: Any) -> set[torch.dtype]:
    return {p.dtype for n, p in model.named_parameters() if ".experts." in n and "bias" not in n and "scale" not in n}


def test_loads_runs_and_saves(loaded: tuple[Any, Any, dict[str, Tensor], Path], tmp_path: Path) -> None:
    packed, plain, state, _ = loaded
    assert dtypes_of_experts(packed) <= {torch.uint8, torch.float8_e4m3fn}
    assert dtypes_of_experts(plain) == {torch.bfloat16}
    assert torch.equal(packed(IDS).logits, plain(IDS).logits)
    assert torch.equal(copy.deepcopy(packed)(IDS).logits, plain(IDS).logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(packed.generate(IDS, **settings), plain.generate(IDS, **settings))
    packed.set_experts_implementation("eager")
    with pytest.raises((ValueError, RuntimeError)):  # of bytes and of other dtypes
        packed(IDS)
    packed.set_experts_implementation("tritonmoe")
    packed.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    of_experts = {name: value for name, value in state.items() if ".experts." in name}
    assert_same_bits({name: saved[name] for name in of_experts}, of_experts)
    if not any("weight_scale_inv" in name for name in state):
        assert_same_bits(saved, state)
    AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)
    again = load_decoded(tmp_path / "saved", experts_implementation="tritonmoe")
    assert torch.equal(again(IDS).logits, plain(IDS).logits)


def test_a_packed_model_that_moves(loaded: tuple[Any, Any, dict[str, Tensor], Path]) -> None:
    """Pickled, on meta, where it says shapes, and from there back by load_state_dict(assign=True)."""
    packed, plain, _, _ = loaded
    expected = plain(IDS).logits
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IDS).logits, expected)
    away = copy.deepcopy(packed).to("meta")
    assert away(IDS.to("meta")).logits.shape == plain.to("meta")(IDS.to("meta")).logits.shape == expected.shape
    away.load_state_dict(packed.state_dict(), assign=True)
    for (name, buffer), own in zip(packed.named_buffers(), away.buffers(), strict=True):
        if own.is_meta:  # of positions, which are in no state dict
            module, _, key = name.rpartition(".")
            away.get_submodule(module).register_buffer(key, buffer, persistent=False)
    assert torch.equal(away(IDS).logits, expected)
    assert {parameter.requires_grad for parameter in away.parameters() if parameter.itemsize == 1} == {False}
    for one, other in ((packed, plain), (plain, packed)):
        with pytest.raises(RuntimeError, match="state_dict"):
            one.load_state_dict(other.state_dict(), assign=True)


@pytest.mark.parametrize("expert_width", [96, 192])
def test_fp8_experts_of_other_widths_are_refused_by_their_width(expert_width: int, tmp_path: Path) -> None:
    qwen3_fp8(tmp_path, expert_width)
    tmt.register(packed=True)
    with pytest.raises(ValueError, match=rf"have F = {expert_width}, .* multiple of 128, .*dequantize=True"):
        load(tmp_path)
    decoded = transformers.FineGrainedFP8Config(dequantize=True)
    assert load(tmp_path, quantization_config=decoded)(IDS).logits.isfinite().all()  # the way out


def test_no_whole_decoded_weight_is_ever_made(tmp_path: Path) -> None:
    """In forward, generation, backward of PEFT's adapters, and save_pretrained."""
    gpt_oss_mxfp4(tmp_path, num_experts=32)
    tmt.register(packed=True)
    model = load(tmp_path)
    tm.QuantizedWeight.pack(torch.zeros(1, 32, 32), "mxfp4").decode()  # makes its tables
    with LargestFloats() as largest:
        model.save_pretrained(tmp_path / "saved")
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        own = adapted(model)
        own.gradient_checkpointing_enable()
        own(IDS, labels=IDS).loss.backward()
        own.save_pretrained(tmp_path / "adapters")
    few_experts = 2**15  # tiny experts are decoded some at a time
    assert max(largest.num_values.values()) <= few_experts < 32 * 64 * 32


def lora(**settings: Any) -> Any:
    """Return the configuration of random adapters: of the experts, where the settings name nothing else."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    experts = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    return peft.LoraConfig(**{"r": 2, "init_lora_weights": False, **experts, **settings})


def adapted(model: Any) -> Any:
    return pytest.importorskip("peft").get_peft_model(model, lora())


def trained(model: Any, num_steps: int, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Train adapters; return the losses, and the adapter's file."""
    optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), []
    for _ in range(num_steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    return losses, load_file(folder / "adapter_model.safetensors")


@pytest.mark.thorough
def test_adapters_of_peft_train_as_on_decoded_weights(
    loaded: tuple[Any, Any, dict[str, Tensor], Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    packed, plain, _, folder = loaded
    before = {name: parameter.detach().clone() for name, parameter in packed.named_parameters()}
    model = adapted(packed)
    losses, file = trained(model, 10, tmp_path / "packed")
    expected, expected_file = trained(adapted(plain), 10, tmp_path / "plain")
    assert losses == expected
    assert_same_bits(file, expected_file)
    back = model.unload()
    assert_same_bits(dict(back.named_parameters()), before)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "packed")
    assert torch.equal(again(IDS).logits, peft.PeftModel.from_pretrained(back, tmp_path / "packed")(IDS).logits)
    AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)
    merged = peft.PeftModel.from_pretrained(load_decoded(folder), tmp_path / "packed").merge_and_unload()
    assert torch.isfinite(merged(IDS).logits).all()


@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_refused_merge_changes_nothing(is_mixed: bool, tmp_path: Path) -> None:
    """Of a model with adapters of dense layers too, which PEFT would merge and unwrap before the experts."""
    peft = pytest.importorskip("peft")
    model = mixtral()
    tmt.quantize_experts(model, "nf4")
    config = lora(target_modules=["q_proj", "o_proj"])
    own = peft.PeftMixedModel(model, config) if is_mixed else peft.get_peft_model(model, config)
    own.add_adapter("second", config)
    kept = peft.get_peft_model_state_dict

    def all_of_it() -> dict[str, Tensor]:
        if not is_mixed:
            own.save_pretrained(tmp_path)
        file = {} if is_mixed else load_file(tmp_path / "adapter_model.safetensors")
        return {**own.state_dict(), **file, "logits": own(IDS).logits, **kept(own, adapter_name="second")}

    before = {name: value.clone() for name, value in all_of_it().items()}
    calls = {
        "merge_and_unload": [{}, {"safe_merge": True}, {"adapter_names": ["second"]}],
        "merge_adapter": [{}, {"safe_merge": True}, {"adapter_names": ["second"]}],
    }
    refusal = r"is packed in 4 or 8 bits, .*so nothing was merged. tm.export_weights.*Or save the adapter"
    for name, settings in calls.items():
        for one in settings:
            with pytest.raises(ValueError, match=refusal):
                getattr(own.base_model, name)(**one)
            assert_same_bits(all_of_it(), before, name)
    with pytest.raises((ValueError, NotImplementedError)):  # of PEFT, which doesn't mix adapters of parameters
        own.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    assert_same_bits(all_of_it(), before)


def test_what_peft_does_with_adapters_of_packed_experts_except_merging_them() -> None:
    peft = pytest.importorskip("peft")
    model = mixtral()
    tmt.quantize_experts(model, "mxfp4")
    state, logits = {name: value.clone() for name, value in model.state_dict().items()}, model(IDS).logits
    config, dense = lora(target_modules=["q_proj"]), lora(target_modules=["q_proj"], target_parameters=[])
    own = peft.get_peft_model(model, config)
    first = own(IDS).logits
    for name, one in (("second", config), ("dense", dense), ("dense2", dense)):
        own.add_adapter(name, one)
    own.set_adapter("second")
    second = own(IDS).logits
    assert not torch.equal(first, second)
    with own.disable_adapter():
        assert torch.equal(own(IDS).logits, logits)
    own.add_weighted_adapter(["dense", "dense2"], [1.0, 1.0], "sum", combination_type="cat")
    own.set_adapter("sum")
    summed = own(IDS).logits
    merged = copy.deepcopy(own)
    merged.merge_adapter()  # no adapter of experts is among these
    torch.testing.assert_close(merged(IDS).logits, summed, rtol=0.05, atol=0.02)
    own.set_adapter("default")
    assert torch.equal(own(IDS).logits, first)
    own.delete_adapter("default")
    own.set_adapter("second")
    assert torch.equal(own(IDS).logits, second)
    back = own.unload()
    assert_same_bits(dict(back.state_dict()), state)
    assert torch.equal(back(IDS).logits, logits)


def test_adapters_that_peft_would_multiply_out_are_refused() -> None:
    """bitsandbytes' weights would be read without them."""
    models = [mixtral()]
    tmt.quantize_experts(models[0], "nf4")
    if importlib.util.find_spec("bitsandbytes"):
        models.append(parametrised_by_bitsandbytes())
        tmt.patch(models[1])
    for model in models:
        own = adapted(model)
        own.add_adapter("second", own.peft_config["default"])
        own.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match="whose weight is packed, since 2 adapters are active at once"):
            own(IDS)
        own.base_model.set_adapter("second")
        assert own(IDS).logits.isfinite().all()


@pytest.mark.thorough
def test_trainer(loaded: tuple[Any, Any, dict[str, Tensor], Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    packed, plain, _, _ = loaded
    files = []
    for number, model in enumerate((packed, plain)):
        own = adapted(model)
        own.config.use_cache = False
        rows = [{"input_ids": row, "labels": row} for row in IDS]
        folder = tmp_path / f"trainer{number}"
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=3, use_cpu=True, report_to=[], save_strategy="no", per_device_train_batch_size=2
        )
        trainer = transformers.Trainer(own, arguments, train_dataset=rows)
        trainer.train()
        trainer.save_model()
        files.append(load_file(folder / "adapter_model.safetensors"))
    assert_same_bits(files[0], files[1])


def mixtral() -> Any:
    torch.manual_seed(2)
    config = transformers.MixtralConfig(
        **SIZES, hidden_size=64, head_dim=32, num_local_experts=4, num_experts_per_tok=2, intermediate_size=96
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def plain_gpt_oss() -> Any:
    torch.manual_seed(2)
    return transformers.AutoModelForCausalLM.from_config(gpt_oss_config(), dtype=torch.bfloat16)


@pytest.mark.parametrize("weight_format", ["nf4", "mxfp4"])
@pytest.mark.parametrize("make", [mixtral, plain_gpt_oss])
def test_quantize_experts_of_a_model(make: Any, weight_format: Any) -> None:
    from tritonmoe.integrations.transformers.packed.packed_experts import read_packed

    model = make()
    before = copy.deepcopy(model)
    report = tmt.quantize_experts(model, weight_format)
    assert [layer.name for layer in report.layers] == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    assert all(0.05 < error < 0.15 for layer in report.layers for error in layer.errors.values()), str(report)
    assert all(0.25 < layer.bytes_after / layer.bytes_before < 0.29 for layer in report.layers)
    for layer, plain in zip(model.model.layers, before.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            own = layer.mlp.experts
            values, scales, is_transposed = read_packed(own, name, lambda key, own=own: getattr(own, key))
            decoded = tm.QuantizedWeight(weight_format, values, scales).decode()
            swapped = is_transposed != bool(getattr(own, "is_transposed", False))
            getattr(plain.mlp.experts, name).data.copy_(decoded.mT if swapped else decoded)
    tmt.patch(before)
    assert torch.equal(model(IDS).logits, before(IDS).logits)
    with pytest.raises(ValueError, match="are packed already"):
        tmt.quantize_experts(model, weight_format)
    with pytest.raises(ValueError, match="save the adapters"):
        model.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="packed weight of experts"):
        _ = model.model.layers[0].mlp.experts.gate_up_proj + 1
    assert model.to(torch.float32).to(torch.bfloat16)(IDS).logits.isfinite().all()


def test_quantize_experts_refuses_and_changes_nothing() -> None:
    model = mixtral()
    for wrong, words in (("fp8", "'nf4' or 'mxfp4'"), ("int4", "must be one of")):
        with pytest.raises(ValueError, match=words):
            tmt.quantize_experts(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to switch"):
        tmt.quantize_experts(torch.nn.Linear(2, 2), "nf4")
    bad = model.model.layers[1].mlp.experts.down_proj
    bad.data[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="largest magnitude is nan"):
        tmt.quantize_experts(model, "nf4")
    assert dtypes_of_experts(model) == {torch.bfloat16}
    model = mixtral()
    model.model.layers[1].mlp.forward = lambda rows: rows  # as a library of kernels replaces one
    with pytest.raises(ValueError, match="has taken the place of the forward"):
        tmt.quantize_experts(model, "nf4")
    assert dtypes_of_experts(model) == {torch.bfloat16}


@pytest.mark.parametrize("weight_format", ["nf4", "mxfp4"])
def test_blocks_that_share_experts_share_them_packed(weight_format: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, own = mixtral(), mixtral()
    for one in (model, own):
        one.model.layers[1].mlp.experts = one.model.layers[0].mlp.experts
    own.model.layers[1].mlp.experts = copy.deepcopy(own.model.layers[0].mlp.experts)
    assert [len(tmt.quantize_experts(one, weight_format).layers) for one in (model, own)] == [1, 2]
    assert model.model.layers[1].mlp.experts is model.model.layers[0].mlp.experts
    assert torch.equal(model(IDS).logits, own(IDS).logits)
    plain = mixtral()
    plain.model.layers[1].mlp.experts = plain.model.layers[0].mlp.experts
    report = tmt.patch(plain)
    assert (report.num_switched, report.left) == (1, ())
    assert not [record for record in caplog.records if "left" in record.getMessage()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_models_in_other_dtypes_say_that_their_experts_compute_in_bf16(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tritonmoe.integrations.transformers import experts as of_experts

    monkeypatch.setattr(of_experts, "_say_rounded", functools.cache(of_experts._say_rounded.__wrapped__))
    model, plain = mixtral().to(dtype), mixtral()
    for one in (model, plain):
        assert "in nf4, computed in bf16: " in str(tmt.quantize_experts(one, "nf4"))
    plain(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(IDS).logits.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(TypeError, match=r"under torch\.autocast with bf16"):
        model(IDS)
    assert not caplog.records  # only a forward knows whether rows are rounded
    layers = [one.model.layers[0].mlp.experts for one in (model, plain)]
    x, ids, weights = (
        torch.randn(5, 64).to(dtype),
        torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2]]),
        torch.rand(5, 2),
    )
    own = layers[0](x, ids, weights)
    assert_same_bits(own, layers[1](x.to(torch.bfloat16), ids, weights).to(dtype))
    assert model(IDS).logits.dtype == dtype
    assert [record.getMessage() for record in caplog.records if "compute in bf16" in record.getMessage()] == [
        f"packed experts compute in bf16: this model's rows are {dtype}, and are rounded to bf16 before the experts, "
        f"whose results are {dtype} again. Load the model in bf16, or call it under torch.autocast in bf16, if that is "
        "not meant"
    ]
    layer = tm.MoELayer(tm.MoEConfig(hidden_size=64, intermediate_size=64, num_experts=4, top_k=2)).to(dtype)
    tmt.quantize_experts(layer, "nf4")
    with pytest.raises(TypeError, match="cast x to bf16"):
        layer(x)


@pytest.mark.parametrize("weight_format", ["nf4", "mxfp4"])
def test_quantize_experts_of_layers(weight_format: Any) -> None:
    config = tm.MoEConfig(hidden_size=64, intermediate_size=64, num_experts=4, top_k=2)
    torch.manual_seed(3)
    layer = tm.MoELayer(config).to(torch.bfloat16)
    experts, plain = layer.grouped_experts, copy.deepcopy(layer)
    weights = [
        tm.QuantizedWeight.pack(getattr(plain.grouped_experts, n), weight_format) for n in ("gate_up_proj", "down_proj")
    ]
    tmt.quantize_experts(layer, weight_format)
    assert experts.config.weight_format == weight_format
    for name, weight in zip(("gate_up_proj", "down_proj"), weights, strict=True):
        getattr(plain.grouped_experts, name).data.copy_(weight.decode())
    x = torch.randn(9, 64).to(torch.bfloat16)
    assert torch.equal(layer(x), plain(x))
    with pytest.raises(ValueError, match="packed already"):
        tmt.quantize_experts(layer, weight_format)


def test_transformers_own_fp8_experts() -> None:
    """What from_pretrained makes on a GPU: the registry of transformers' FP8 experts has tritonmoe as well."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    tmt.register()
    config = transformers.Qwen3MoeConfig(hidden_size=128, moe_intermediate_size=128, num_experts=4)
    config._experts_implementation = "tritonmoe"
    kind = use_experts_implementation(experts_class=FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    experts = kind(config=config, block_size=(128, 128)).requires_grad_(False)
    up, down = random_weight("fp8", (4, 256, 128)), random_weight("fp8", (4, 128, 128), 1)
    for name, weight in (("gate_up_proj", up), ("down_proj", down)):
        getattr(experts, name).data.copy_(weight.values)
        getattr(experts, f"{name}_scale_inv").data.copy_(weight.scales)
    x, ids = torch.randn(5, 128).to(torch.bfloat16), torch.tensor([[0, 1], [2, 3], [1, 0], [3, 3], [0, 2]])
    weights = torch.rand(5, 2)
    assert_same_bits(experts(x, ids, weights), tm.moe_mlp(x, ids, weights, up.decode(), down.decode()))
    with pytest.raises(TypeError, match="leave the experts out of that cast"):
        experts.to(torch.bfloat16)(x, ids, weights)


def parametrised_by_bitsandbytes() -> Any:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = mixtral()
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
    return model


def test_experts_that_bitsandbytes_parametrises() -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model, ours = parametrised_by_bitsandbytes(), mixtral()
    tmt.quantize_experts(ours, "nf4")
    assert tmt.patch(model).num_switched == 2
    assert torch.equal(model(IDS).logits, ours(IDS).logits)
    with torch.no_grad():
        assert torch.equal(adapted(model)(IDS).logits, adapted(ours)(IDS).logits)
    double = mixtral()
    parametrize.replace_parameter_4bit(
        double.model.layers[0].mlp.experts, "gate_up_proj", quant_type="nf4", compress_statistics=True
    )
    tmt.patch(double)
    with pytest.raises(ValueError, match="with scales that are quantised too"):
        double(IDS)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3"])
def test_over_ranks(name: str, tmp_path: Path) -> None:
    CHECKPOINTS[name](tmp_path / "checkpoint")
    run_torchrun(2, WORKER, str(tmp_path), cases=["logits", "adapters", "saved"])
