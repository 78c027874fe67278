"""TRL's SFTTrainer on experts that stay packed: adapters train as on decoded ones, and load in plain PEFT."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("datasets", reason="trl is not installed")
pytest.importorskip("trl")
pytest.importorskip("peft")

import datasets
import peft
from safetensors.torch import load_file
from same_bits import assert_same_bits
from test_replayed_routing import make_tokenizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from trl import SFTConfig, SFTTrainer

from tritonmoe.integrations import transformers as tmt

sys.path.insert(0, str(Path(__file__).parents[1] / "transformers"))

from packed_checkpoints import gpt_oss_mxfp4, load_decoded, qwen3_fp8

CHECKPOINTS = {"gpt_oss": gpt_oss_mxfp4, "qwen3": qwen3_fp8}
QUANTIZERS = dict(AUTO_QUANTIZER_MAPPING)
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TEXTS = ["4 8 15 16 23 42", "1 2 3 5 8 13 21 34 55", "7 7 7 9", "3 1 4 1 5 9 2 6"]
IDS = torch.arange(24).view(2, 12) % 64


@pytest.fixture(autouse=True)
def quantizers_are_put_back() -> Iterator[None]:
    yield
    AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)


def load(folder: Path, *, packed: bool) -> Any:
    AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)
    tmt.register(packed=packed)
    if not packed:
        return load_decoded(folder, experts_implementation="tritonmoe")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def trained(model: Any, folder: Path, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of three steps and the adapter's file."""
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = SFTTrainer(
        model,
        args=SFTConfig(output_dir=str(folder), **(arguments | settings)),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=make_tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=TARGETS, lora_dropout=0.0),
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.train()
    trainer.save_model()
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    return losses, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": False, "packing": True, "max_length": 16}], ids=str
)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_adapters_train_as_on_decoded_experts(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    CHECKPOINTS[name](tmp_path / "checkpoint")
    packed, plain = (load(tmp_path / "checkpoint", packed=is_packed) for is_packed in (True, False))
    before = {key: value.detach().clone() for key, value in packed.state_dict().items() if ".experts." in key}
    losses, file = trained(packed, tmp_path / "packed", **settings)
    expected, expected_file = trained(plain, tmp_path / "plain", **settings)
    assert losses == expected
    assert len(losses) == 3
    assert_same_bits(file, expected_file)
    assert any(".experts." in key for key in file)
    after = {
        key.replace(".base_layer", "").removeprefix("base_model.model."): v for key, v in packed.state_dict().items()
    }
    assert_same_bits({key: after[key] for key in before}, before)
    AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)
    plainly = load_decoded(tmp_path / "checkpoint")
    adapted = peft.PeftModel.from_pretrained(plainly, tmp_path / "packed")
    ours = peft.PeftModel.from_pretrained(load(tmp_path / "checkpoint", packed=True), tmp_path / "packed")
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS).logits, ours(IDS).logits, rtol=5e-2, atol=5e-2)
