"""`python -m bench.routing_replay`: how many tokens bf16 sends to other experts than fp32, and how many in a replay."""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tritonmoe.integrations import transformers as tmt
from tritonmoe.tools.benchmarks.timing import write_json

__all__ = ["measure"]

NUM_TOKENS = 1024
MODELS = ((8, 32, 4), (16, 64, 8), (24, 128, 8))
"""Layers, E, K."""


@torch.no_grad()
def measure(num_layers: int, num_experts: int, top_k: int) -> dict[str, float]:
    """Record a random model in fp32, and compare it with itself in bf16, by its own choice and under a replay."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"head_dim": 32}  # the annotations of its class leave it out
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        **settings,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # transformers' own start is so flat that all experts are alike
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    ids = torch.randint(256, (NUM_TOKENS // 128, 128))
    with tmt.record_routing(model) as recording:
        truth = model(ids).logits
    with tmt.replay_routing(model, recording):
        assert torch.equal(model(ids).logits, truth)
    rounded = copy.deepcopy(model).bfloat16()
    with tmt.record_routing(rounded) as own:
        logits = rounded(ids).logits
    with tmt.replay_routing(rounded, recording), tmt.record_routing(rounded) as replayed:
        replayed_logits = rounded(ids).logits
    return {
        "layers": num_layers,
        "num_experts": num_experts,
        "top_k": top_k,
        "tokens": NUM_TOKENS,
        "equal_ids": _mean(recording.agreement(own)),
        "equal_tokens": _mean(recording.token_agreement(own)),
        "equal_ids_replayed": _mean(recording.agreement(replayed)),
        "kl": _kl(truth, logits),
        "kl_replayed": _kl(truth, replayed_logits),
        "bytes_per_token": sum(layer.topk_ids.nbytes for layer in recording.layers.values()) / NUM_TOKENS,
    }


def _mean(shares: dict[str, float]) -> float:
    return sum(shares.values()) / len(shares)


def _kl(truth: Tensor, logits: Tensor) -> float:
    expected, actual = truth.double().log_softmax(dim=-1), logits.double().log_softmax(dim=-1)
    return float((expected.exp() * (expected - actual)).sum(dim=-1).mean())


def main() -> None:
    """Measure all models, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.routing_replay", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    results = []
    for model in MODELS:
        results.append(measure(*model))
        print(results[-1], flush=True)
    write_json(arguments.json, "routing_replay", results)


if __name__ == "__main__":
    main()
