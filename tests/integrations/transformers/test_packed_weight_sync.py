"""Exported weights of models whose experts are packed: the checkpoint's bytes, or those of the decoded model."""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from held_storages import HeldStorages
from processes import run_torchrun

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

VERSION = tuple(int(number) for number in importlib.metadata.version("transformers").split(".")[:2])
pytestmark = pytest.mark.skipif(VERSION < (5, 24), reason="transformers before 5.24 loads quantised models otherwise")
HAS_PEFT = importlib.util.find_spec("peft") is not None
WORKER = Path(__file__).parent / "weight_sync_worker.py"
FAMILIES = ("gpt_oss", "qwen3")


def cases(*kinds: str) -> list[str]:
    return [f"{kind}:{family}" for kind in kinds for family in FAMILIES]


@pytest.mark.thorough
def test_on_one_process(tmp_path: Path) -> None:
    run_torchrun(1, WORKER, str(tmp_path), cases=cases("packed", *["packed_adapted"] * HAS_PEFT))


@pytest.mark.thorough
def test_on_two_processes(tmp_path: Path) -> None:
    run_torchrun(2, WORKER, str(tmp_path), cases=cases("packed", *["packed_adapted"] * HAS_PEFT))


@pytest.mark.thorough
def test_on_four_processes(tmp_path: Path) -> None:
    run_torchrun(4, WORKER, str(tmp_path), cases=cases("packed", "packed_fully_sharded"))


def small_model() -> Any:
    from packed_checkpoints import gpt_oss_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(gpt_oss_config(), dtype=torch.bfloat16)


def check_decoded(model: Any, plain: Any) -> None:
    """Compare what comes with the weights of `plain`, decoded by the module's own reader, names and all."""
    from tritonmoe.integrations.transformers.packed.packed_experts import read_packed

    for layer, own in zip(plain.model.layers, model.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            experts = own.mlp.experts
            values, scales, is_transposed = read_packed(experts, name, lambda key, at=experts: getattr(at, key))
            decoded = tm.QuantizedWeight("nf4" if scales.dtype == torch.float32 else "mxfp4", values, scales).decode()
            swapped = is_transposed != experts.is_transposed
            getattr(layer.mlp.experts, name).data.copy_(decoded.mT if swapped else decoded)
    expected = dict(tm.export_weights(plain))
    found = dict(tm.export_weights(model, dequantize=True, bucket_bytes=5000))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("weight_format", ["nf4", "mxfp4"])
def test_what_was_packed_here_comes_decoded_alone(weight_format: Any) -> None:
    model = small_model()
    tmt.quantize_experts(model, weight_format)
    with pytest.raises(ValueError, match=rf"is {weight_format}, and the checkpoint of this model is not quantised"):
        tm.export_weights(model)
    check_decoded(model, small_model())


def test_what_bitsandbytes_has_packed_comes_decoded_alone() -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = small_model()
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
    with pytest.raises(ValueError, match=r"experts.gate_up_proj is packed by bitsandbytes, .*dequantize=True"):
        tm.export_weights(model)
    check_decoded(model, small_model())


@pytest.mark.parametrize("weight_format", ["nf4", "mxfp4"])
def test_few_experts_are_decoded_at_once(weight_format: Any) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = MixtralConfig(**sizes, **heads, num_local_experts=64)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    projection = model.model.layers[0].mlp.experts.gate_up_proj.nbytes
    tmt.quantize_experts(model, weight_format)
    for _ in tm.export_weights(model, dequantize=True):  # makes tables once
        pass
    iterator = tm.export_weights(model, dequantize=True, bucket_bytes=projection // 16)
    with HeldStorages() as held:
        for _, tensor in iterator:
            del tensor
    assert held.peak([]) < projection / 4


def test_packed_experts_are_not_loaded_into() -> None:
    model = small_model()
    weights = list(tm.export_weights(model))
    tmt.quantize_experts(model, "mxfp4")
    with pytest.raises(ValueError, match=r"gate_up_proj_blocks is quantised \(Parameter of torch.uint8\)"):
        tm.load_weights(model, weights)


def test_damaged_bytes_do_not_come() -> None:
    model = small_model()
    tmt.quantize_experts(model, "mxfp4")
    model.model.layers[1].mlp.experts.down_proj_scales.data[3, 2, 0] = 255
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        tm.export_weights(model, dequantize=True)


def test_other_quantised_weights_are_refused() -> None:
    model = small_model()
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    for dequantize in (False, True):
        with pytest.raises(ValueError, match=r"q_proj.weight is quantised \(Parameter of torch.float8_e4m3fn\)"):
            tm.export_weights(model, dequantize=dequantize)
