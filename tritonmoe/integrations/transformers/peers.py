"""Other implementations of the experts, as functions to compare with: transformers' own and Liger's."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from tritonmoe.integrations.transformers.discovery import ExpertsModule

__all__ = [
    "PEERS",
    "experts_function",
    "gpt_oss_experts_function",
    "liger_function",
    "peer_unusable_reason",
    "register_liger",
]

PEERS = ("eager", "grouped_mm", "batched_mm", "sonicmoe", "liger")


def peer_unusable_reason(peer: str, device: torch.device, *, plain: bool) -> str | None:
    """Say why `peer` can't run on this machine; None where it can be tried.

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
