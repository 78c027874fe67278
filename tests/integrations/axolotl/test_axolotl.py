"""axolotl's plug-in: its hooks on a model, and two steps of axolotl's own program, with and without LoRA.

axolotl wants Python 3.12, and its whole list of packages: where either is missing, these tests are skipped.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("axolotl", reason="axolotl is not installed: it wants Python 3.12")

from axolotl.utils.dict import DictDefault
from processes import ENVIRONMENT

from tritonmoe.integrations.axolotl import TritonMoEPlugin

NAME = "tritonmoe.integrations.axolotl.TritonMoEPlugin"
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_model(hidden_size: int = 32, moe_intermediate_size: int = 12, **settings: Any) -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=hidden_size,
        moe_intermediate_size=moe_intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, **settings)


@pytest.mark.parametrize("is_adapted", [False, True])
def test_hooks_choose_and_check(is_adapted: bool) -> None:
    plugin, cfg = TritonMoEPlugin(), DictDefault({"plugins": [NAME]})
    plugin.pre_model_load(cfg)
    model = make_model(experts_implementation=cfg.experts_implementation)
    if is_adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS))
    plugin.post_model_load(cfg, model)
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_other_experts_are_refused() -> None:
    plugin = TritonMoEPlugin()
    for other in (
        {"use_scattermoe": True},
        {"experts_implementation": "grouped_mm"},
        {"expert_parallel_size": 2},
    ):
        with pytest.raises(ValueError, match=f"asks for {next(iter(other))}.*only one experts implementation can"):
            plugin.pre_model_load(DictDefault(other))
    with pytest.raises(
        ValueError, match=r"experts of Qwen3MoeForCausalLM don't run through tritonmoe \(.*'grouped_mm'"
    ):
        plugin.post_model_load(DictDefault(), make_model(experts_implementation="grouped_mm"))
    with pytest.raises(ValueError, match=r"experts of Linear don't run through tritonmoe \(it has none\)"):
        plugin.post_model_load(DictDefault(), nn.Linear(2, 2))


def quantised_by_axolotl(model: nn.Module, **settings: Any) -> nn.Module:
    """Do with each expert weight what axolotl does where it is loaded to a GPU (quantize_moe_experts)."""
    moe_quant = pytest.importorskip("axolotl.monkeypatch.moe_quant")
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    moe_quant.reset_moe_load_state()
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            moe_quant.record_quantized_expert(path, module)
            for name in ("gate_up_proj", "down_proj"):
                parametrize.replace_parameter_4bit(module, name, quant_type="nf4", **settings)
    moe_quant.patch_peft_target_parameters_matching()
    return model


QUANTISED = {"quantize_moe_experts": True, "load_in_4bit": True}
PLAIN_SCALES = {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}


def test_lora_of_experts_in_four_bits() -> None:
    peft = pytest.importorskip("peft")
    plugin, cfg = TritonMoEPlugin(), DictDefault({"plugins": [NAME], **QUANTISED, **PLAIN_SCALES})
    plugin.pre_model_load(cfg)
    # bitsandbytes on a CPU decodes rows that end inside a block of 64 values wrongly.
    settings = {"experts_implementation": cfg.experts_implementation, "dtype": torch.bfloat16}
    models = [make_model(64, 64, **settings) for _ in range(2)]
    quantised_by_axolotl(models[0])
    for own, plain in zip(models[0].model.layers, models[1].model.layers, strict=True):  # type: ignore[arg-type, union-attr]
        for name in ("gate_up_proj", "down_proj"):
            getattr(plain.mlp.experts, name).data.copy_(getattr(own.mlp.experts, name))
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for model in models:
        torch.manual_seed(2)
        lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS, init_lora_weights=False)
        adapted = peft.get_peft_model(model, lora)
        plugin.post_model_load(cfg, adapted)
        result = adapted(input_ids=ids, labels=ids)
        result.loss.backward()
        factors = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        assert len(factors) == 8
        assert all(grad is not None and grad.any() for grad in factors.values())
        found.append(result.logits.detach())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_experts_that_would_be_decoded_whole_are_refused() -> None:
    plugin = TritonMoEPlugin()
    for other, says in (
        ({}, "bnb_4bit_use_double_quant: true"),
        ({**PLAIN_SCALES, "load_in_8bit": True}, "load_in_8bit"),
        ({**PLAIN_SCALES, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: fp4"),
        ({**PLAIN_SCALES, "nf4_backend": "torchao"}, "nf4_backend"),
        ({**PLAIN_SCALES, "qlora_sharded_model_loading": True}, "qlora_sharded_model_loading"),
    ):
        with pytest.raises(ValueError, match=f"quantize_moe_experts with {says}.*in NF4 with plain scales alone"):
            plugin.pre_model_load(DictDefault({**QUANTISED, **other}))
    cfg = DictDefault({"plugins": [NAME]})
    plugin.pre_model_load(cfg)
    model: Any = make_model(experts_implementation=cfg.experts_implementation)
    torch.nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.experts, "down_proj", nn.Identity())
    with pytest.raises(ValueError, match="down_proj would be decoded whole at every step, by Identity"):
        plugin.post_model_load(cfg, model)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="axolotl's program wants Python 3.12, and all its packages")
@pytest.mark.parametrize("is_adapted", [False, True])
def test_two_steps_of_axolotls_program(is_adapted: bool, tmp_path: Path) -> None:
    model: Any = make_model()
    model.save_pretrained(tmp_path / "model")
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *map(str, range(125))])}
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "model")
    texts = [json.dumps({"text": " ".join(str((n * place) % 125) for place in range(40))}) for n in range(1, 41)]
    (tmp_path / "data.jsonl").write_text("\n".join(texts))
    config: dict[str, Any] = {
        "base_model": str(tmp_path / "model"),
        "plugins": [NAME],
        "datasets": [{"path": str(tmp_path / "data.jsonl"), "type": "completion"}],
        "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "dataset_num_proc": 1,
        "use_cpu": True,
        "bf16": False,
        "sequence_len": 32,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "num_epochs": 1,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "logging_steps": 1,
    }
    if is_adapted:
        config |= {"adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q_proj"]}
        config |= {"lora_target_parameters": TARGETS, "lora_dropout": 0.0}
    (tmp_path / "config.yml").write_text(json.dumps(config))  # which is YAML too
    command = [sys.executable, "-m", "axolotl.cli.train", str(tmp_path / "config.yml")]
    # Without a network its telemetry waits for minutes at the end.
    environment = {**ENVIRONMENT, "AXOLOTL_DO_NOT_TRACK": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    history = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [0 < step["loss"] < 6 for step in history if "loss" in step] == [True, True]
    name = "adapter_model.safetensors" if is_adapted else "model.safetensors"
    assert (tmp_path / "out" / name).exists()
