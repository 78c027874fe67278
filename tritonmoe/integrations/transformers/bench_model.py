"""A random model that spends its time in its experts, for benchmarks."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonmoe.config.overlap import OverlapConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelSizes", "load_spread", "qwen3_moe_model"]


class ModelSizes(NamedTuple):
    """The sizes of a Qwen3-MoE language model; its attention has eight heads."""

    num_layers: int = 4
    hidden_size: int = 512
    intermediate_size: int = 256
    """Of one expert."""
    num_experts: int = 64
    top_k: int = 8
    vocab_size: int = 2048


def qwen3_moe_model(
    sizes: ModelSizes,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    skew: float = 0.0,
) -> "PreTrainedModel":
    """Return a random Qwen3-MoE language model with a small vocabulary, so that its experts are most of its work.

    Args:
        skew: 0 leaves the random router as it is, almost uniform for random rows and far from that for rows that are
            alike, as those of later layers are; above, -skew * log(e + 1) is added to the logit of expert e, a Zipf
            distribution's.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from tritonmoe.integrations.transformers import register

    register()
    torch.manual_seed(0)
    settings: dict[str, Any] = {"head_dim": sizes.hidden_size // 8}  # the annotations of its class leave it out
    config = Qwen3MoeConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        moe_intermediate_size=sizes.intermediate_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=sizes.hidden_size**-0.5)
    if skew:
        head_start = -skew * torch.arange(1, sizes.num_experts + 1, device=device).log()
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(functools.partial(_skewed, head_start, sizes.top_k))
    return model


def _skewed(
    head_start: Tensor, top_k: int, gate: nn.Module, arguments: tuple[Tensor, ...], output: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Route again with a head start for some experts; router outputs are (logits, weights, ids)."""
    weight = gate.get_parameter("weight")
    rows = arguments[0].reshape(-1, weight.shape[1])
    logits = torch.nn.functional.linear(rows, weight).float() + head_start
    weights, ids = logits.softmax(-1).topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    return (logits.to(output[0].dtype), weights.to(output[1].dtype), ids)


def load_spread(directory: Path, num_ranks: int, ep_implementation: str, overlap: OverlapConfig) -> "PreTrainedModel":
    """Return a saved model spread over all ranks: dense weights sharded by FSDP, experts by `ep_implementation`.

    Args:
        overlap: the chunks of "tritonmoe", of all models that it spreads.
    Raises:
        ImportError: transformers is older than 5.23.
    """
    from transformers import AutoModelForCausalLM

    from tritonmoe.integrations.transformers import register

    register(overlap)
    from transformers.distributed import DistributedConfig

    layout = DistributedConfig(fsdp_size=num_ranks, ep_size=num_ranks, ep_implementation=ep_implementation)
    return AutoModelForCausalLM.from_pretrained(directory, distributed_config=layout, dtype="auto")
