"""Serve-style generation: a patched model answers a batch of prompts of different lengths, and counts its experts.

    python examples/generate.py

The model is small and random (nothing is downloaded); with real weights, only from_config changes to from_pretrained.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tritonmoe.integrations import transformers as tmt


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    longest = 4 + arguments.prompts
    ids = torch.randint(1, 512, (arguments.prompts, longest))
    mask = torch.arange(longest)[None] >= torch.arange(arguments.prompts)[:, None]  # padded on the left
    ids = ids.masked_fill(~mask, 0)

    def answer() -> torch.Tensor:
        return model.generate(ids, attention_mask=mask.long(), max_new_tokens=arguments.new_tokens, do_sample=False)

    expected = answer()
    print(f"switched {tmt.patch(model).num_switched} experts modules")
    with tmt.collect_statistics(model) as statistics:
        started = time.perf_counter()
        texts = answer()
        elapsed_s = time.perf_counter() - started
    print(f"same tokens as eager: {torch.equal(texts, expected)}")
    print(f"{arguments.prompts * arguments.new_tokens / elapsed_s:.0f} tokens/s")
    print(statistics)


if __name__ == "__main__":
    main()
