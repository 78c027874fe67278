"""The experts function that transformers calls; its contract is in transformers/integrations/moe.py."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritonmoe.config.layer import Activation, is_fused
from tritonmoe.experts.arguments import check_plain
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.integrations.transformers.gates import choose_activation
from tritonmoe.integrations.transformers.sharding import expert_parallel_state
from tritonmoe.runtime.autograd import without_autocast

__all__ = ["experts_forward", "run_experts"]


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts of a transformers module on hidden_states (T, D); gives (T, D) in their dtype.

    Args:
        self: the experts module, made by transformers' `use_experts_implementation`.
        top_k_index: (T, K); ids of `self.num_experts` and above are routes to other ranks, and skipped.
        top_k_weights: (T, K).

    Under autocast everything is computed in the autocast dtype, else in that of the expert weights. Experts that
    `parallelize` has spread over ranks exchange their rows here. Raises TypeError where a weight is quantised.
    """
    state = expert_parallel_state(self)
    if state is None:
        return run_experts(self, hidden_states, top_k_index, top_k_weights, moe_mlp, self.down_proj.shape[0])
    return run_experts(self, hidden_states, top_k_index, top_k_weights, state.mlp, state.num_experts, state.local(self))


def run_experts(
    experts: Any,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    mlp: Callable[..., Tensor],
    num_experts: int,
    get: Callable[[str], Tensor] | None = None,
) -> Tensor:
    """Call `mlp` (moe_mlp, or expert_parallel_mlp with its ranks bound) with the weights and gate of `experts`.

    Args:
        num_experts: E of the ids, over all ranks.
        get: gives the tensor to compute with, by the parameter's name; None for the parameter itself.
    """
    has_gate = getattr(experts, "has_gate", True)
    has_bias = getattr(experts, "has_bias", False)
    up_name = "gate_up_proj" if has_gate else "up_proj"
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = getattr(experts, up_name).dtype

    def cast(name: str) -> Tensor:
        weight = getattr(experts, name) if get is None else get(name)
        check_plain(name, weight)  # a cast would take the numbers of a quantised one for its values
        return weight.to(dtype)

    activation, is_interleaved = choose_activation(experts)
    run = functools.partial(
        mlp,
        activation=activation if is_fused(activation) else _keep_dtype(activation),
        gated=has_gate,
        interleaved=is_interleaved,
        transposed=getattr(experts, "is_transposed", False),
        gate_up_bias=cast(f"{up_name}_bias") if has_bias else None,
        down_bias=cast("down_proj_bias") if has_bias else None,
    )
    weights = cast(up_name), cast("down_proj")
    rows = hidden_states.to(dtype)
    # the casts are done: autocast would now only round the fp32 sums inside
    with without_autocast(hidden_states.device):
        if getattr(experts, "has_post_expert_norm", False):
            out = _normed_experts(run, experts.post_expert_norm, rows, topk_ids, topk_weights, weights, num_experts)
        else:
            out = run(rows, topk_ids, topk_weights, *weights)
    return out.to(hidden_states.dtype)


def _keep_dtype(activation: Activation) -> Callable[[Tensor], Tensor]:
    """Wrap a gate that computes in another dtype than its rows."""
    assert callable(activation)
    return lambda rows: activation(rows).to(rows.dtype)


def _normed_experts(
    run: Callable[..., Tensor],
    norm: nn.Module,
    rows: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: tuple[Tensor, Tensor],
    num_experts: int,
) -> Tensor:
    """Norm each expert's output before it is weighted (muse_spark): K=1 on T*K rows, then the sum here."""
    num_tokens, top_k = topk_ids.shape
    is_routed = (topk_ids >= 0) & (topk_ids < num_experts)
    pair_rows = rows.repeat_interleave(top_k, dim=0)  # (T*K, D)
    unit_weights = torch.ones(num_tokens * top_k, 1, device=rows.device)
    pairs = norm(run(pair_rows, topk_ids.reshape(-1, 1), unit_weights, *weights))
    pairs = torch.where(is_routed.unsqueeze(2), pairs.view(num_tokens, top_k, rows.shape[1]), 0.0)
    pair_weights = torch.where(is_routed, topk_weights, 0.0)
    pair_weights = pair_weights.to(torch.promote_types(topk_weights.dtype, torch.float32))
    return (pairs * pair_weights.unsqueeze(2)).sum(dim=1)  # in fp32
