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


def make_model(**settings: Any) -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=32,
        moe_intermediate_size=12,
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
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    history = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [0 < step["loss"] < 6 for step in history if "loss" in step] == [True, True]
    name = "adapter_model.safetensors" if is_adapted else "model.safetensors"
    assert (tmp_path / "out" / name).exists()
