"""Small quantised checkpoints, with the keys and bytes that published ones have."""

import json
from pathlib import Path
from typing import Any

import torch
from packed_weights import random_weight
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    Mxfp4Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def load_decoded(folder: Path, **options: Any) -> Any:
    """Load what a checkpoint says as bf16: left to itself, transformers takes kernels from its hub for MXFP4."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    decodes = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}[method](dequantize=True)
    options = {"dtype": torch.bfloat16, **options}
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=decodes, **options)


def gpt_oss_config(num_experts: int = 4) -> GptOssConfig:
    layers = {"layer_types": ["full_attention"] * 2, "num_experts_per_tok": 2, "num_local_experts": num_experts}
    return GptOssConfig(**SIZES, **layers, hidden_size=64, head_dim=32, intermediate_size=32)


def gpt_oss_mxfp4(folder: Path, num_experts: int = 4) -> dict[str, Tensor]:
    """Write a gpt-oss checkpoint in MXFP4; give what is in its file."""
    state = _written(gpt_oss_config(num_experts), folder)
    for layer in range(2):
        for name, (width, depth) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
            key = f"model.layers.{layer}.mlp.experts.{name}"
            del state[key]
            weight = random_weight("mxfp4", (num_experts, width, depth), seed=layer)
            state[f"{key}_blocks"] = weight.values.unflatten(2, (-1, 16)).clone()
            state[f"{key}_scales"] = weight.scales
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _write(state, folder, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})


def qwen3_fp8(folder: Path, expert_width: int = 128) -> dict[str, Tensor]:
    """Write a Qwen3 checkpoint in FP8 blocks, one key for each expert; give what is in its file."""
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": expert_width}
    state = {}
    for name, value in _written(
        Qwen3MoeConfig(**SIZES, **routed, hidden_size=128, intermediate_size=128, head_dim=64), folder
    ).items():
        state[name] = value
        if value.dim() == 2 and "proj" in name:
            weight = random_weight("fp8", (1, *value.shape), seed=len(state))
            state[name], state[f"{name}_scale_inv"] = weight.values[0].clone(), weight.scales[0].clone()
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return _write(state, folder, {**config, "modules_to_not_convert": ["lm_head"]})


def _written(config: PreTrainedConfig, folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _write(state: dict[str, Tensor], folder: Path, quantization: dict[str, object]) -> dict[str, Tensor]:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return state
