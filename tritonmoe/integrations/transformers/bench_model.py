"""For benchmarks: a random model that spends its time in its experts, and other implementations to compare with."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.integrations.transformers.discovery import ExpertsModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "PEERS",
    "ModelSizes",
    "experts_function",
    "gpt_oss_experts_function",
    "liger_function",
    "load_spread",
    "peer_unusable_reason",
    "qwen3_moe_model",
    "register_liger",
]


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


PEERS = ("eager", "grouped_mm", "batched_mm", "sonicmoe", "liger")


def peer_unusable_reason(peer: str, device: torch.device, *, plain: bool) -> str | None:
    """Return why `peer` can't run on this machine; None where it can be tried.

    Args:
        plain: SwiGLU without biases, concatenated, not transposed: all that Liger's function takes.
    """
    if peer == "liger":
        if not plain:
            return "its function takes only SwiGLU without biases, concatenated and not transposed"
        if device.type != "cuda":
            return "its kernels need a GPU"
        return None if importlib.util.find_spec("liger_kernel") else "the package liger-kernel is not installed"
    if importlib.util.find_spec("transformers") is None:
        return "the package transformers is not installed"
    if peer == "sonicmoe":
        if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
            return "its kernels need an NVIDIA GPU of capability 9.0 or newer"
        if importlib.util.find_spec("kernels") is None:
            return "the package kernels is not installed"
    return None


def experts_function(
    implementation: str, gate_up_proj: torch.nn.Parameter, down_proj: torch.nn.Parameter
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return (x, topk_ids, topk_weights) -> y of transformers' MixtralExperts with these very weights.

    Args:
        implementation: "eager", "grouped_mm", "batched_mm" or "sonicmoe".
        gate_up_proj: (E, 2F, D). down_proj: (E, D, F). Parameters stay the caller's: gradients arrive there.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    num_experts, width, model_width = gate_up_proj.shape
    config = MixtralConfig(hidden_size=model_width, intermediate_size=width // 2, num_local_experts=num_experts)
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = gate_up_proj, down_proj
    config._experts_implementation = implementation
    return module


def gpt_oss_experts_function(
    implementation: str,
    gate_up_proj: torch.nn.Parameter,
    down_proj: torch.nn.Parameter,
    gate_up_bias: torch.nn.Parameter,
    down_bias: torch.nn.Parameter,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return (x, topk_ids, topk_weights) -> y of transformers' GptOssExperts with these very weights.

    Args:
        implementation: as for experts_function.
        gate_up_proj: (E, D, 2F), gate and up interleaved. down_proj: (E, F, D).
        gate_up_bias: (E, 2F). down_bias: (E, D).
    """
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    num_experts, model_width, width = gate_up_proj.shape
    config = GptOssConfig(hidden_size=model_width, intermediate_size=width // 2, num_local_experts=num_experts)
    with torch.device("meta"):
        module = GptOssExperts(config)
    module.gate_up_proj, module.down_proj = gate_up_proj, down_proj
    module.gate_up_proj_bias, module.down_proj_bias = gate_up_bias, down_bias
    config._experts_implementation = implementation
    return module


def liger_function(
    gate_up_proj: torch.nn.Parameter, down_proj: torch.nn.Parameter
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return Liger-Kernel's fused MoE (0.8 or newer), (x, topk_ids, topk_weights) -> y, as experts_function does."""
    from liger_kernel.ops import LigerFusedMoEFunction

    def run(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x, gate_up_proj, down_proj, topk_ids.int(), topk_weights)

    return run


def register_liger() -> None:
    """Make "liger" an experts_implementation of transformers, for experts that liger_function takes.

    Liger itself replaces classes instead, for eight families; it runs the same function there.
    """
    from transformers.integrations.moe import ExpertsInterface

    def run(experts: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return liger_function(experts.gate_up_proj, experts.down_proj)(hidden_states, top_k_index, top_k_weights)

    ExpertsInterface.register("liger", run)
