"""A small model whose experts have an ExpertPrecision, and its step; of the tests and of their ranks."""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

import tritonmoe as tm

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
PRECISION = tm.ExpertPrecision("mxfp8")
IDS = torch.arange(3, 51).view(4, 12)
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4), dtype=torch.bfloat16)


def step(model: nn.Module, ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    """Return the logits, and the gradient of the first layer's experts."""
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), dict(model.named_parameters())[GATE_UP].grad.clone()


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())
