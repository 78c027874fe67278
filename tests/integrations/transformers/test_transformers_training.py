"""What surrounds the experts of a patched model: PEFT, torch.compile, short decodes, checkpoints that save top-k."""

import importlib.util

import pytest
import torch
import transformers
from large_weights import draw_large_weights
from torch import nn
from transformers import AutoModelForCausalLM

from tritonmoe.integrations.transformers import patch

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def qwen3_moe() -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**SIZES), experts_implementation="eager")
    draw_large_weights(model)
    return model


def token_ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_sequences", [1, 2, 5, 8])
def test_decoding_one_to_eight_tokens_at_a_time(num_sequences):
    model = qwen3_moe().eval()
    prompts = token_ids(num_sequences, 4)
    expected = model.generate(prompts, max_new_tokens=6, do_sample=False)
    patch(model)
    assert torch.equal(model.generate(prompts, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_peft_target_parameters():
    from peft import LoraConfig, get_peft_model

    gradients = []
    for is_patched in (False, True):
        torch.manual_seed(3)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
        model = get_peft_model(qwen3_moe(), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if is_patched:
            assert patch(model).num_switched == 2
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, ours = gradients
    assert len(ours) == 2 * 2 * 2
    for name, grad in plain.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.thorough
def test_torch_compile():
    model = qwen3_moe()
    patch(model)
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        output = forward(input_ids=token_ids(), labels=token_ids())
        output.loss.backward()
        results.append({"logits": output.logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, atol=1e-6, rtol=1e-4, msg=name)
