"""Fine-tune a small gpt-oss-like model in bf16 and with its experts in 4 bits, on a CPU, and compare.

python examples/quantised_experts.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel

from tritonmoe.integrations import transformers as tmt


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        layer_types=["full_attention", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tmt.patch(model)
    return model


def train(model: PreTrainedModel, num_steps: int = 20) -> list[float]:
    torch.manual_seed(1)
    adapters = LoraConfig(
        r=4, lora_alpha=8, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    adapted = get_peft_model(model, adapters)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    ids = torch.arange(128).view(4, 32) * 7 % 64
    losses = []
    for _ in range(num_steps):
        loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    plain, packed = make_model(), make_model()
    report = tmt.quantize_experts(packed, "mxfp4")
    print(report)
    for name, model in (("bf16", plain), ("mxfp4", packed)):
        losses = train(model)
        print(f"{name}: first loss {losses[0]:.3f}, last loss {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
