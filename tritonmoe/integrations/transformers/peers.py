"""The experts implementations that transformers itself has, as functions to compare with."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["experts_function"]


def experts_function(
    implementation: str, gate_up_proj: torch.nn.Parameter, down_proj: torch.nn.Parameter
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Give (x, topk_ids, topk_weights) -> y of transformers' MixtralExperts with these very weights.

    Args:
        implementation: "eager", "grouped_mm" or "batched_mm".
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
