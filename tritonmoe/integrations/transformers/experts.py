"""The experts function that transformers calls; its contract is in transformers/integrations/moe.py."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from tritonmoe.config.activations import Activation, is_fused
from tritonmoe.config.layer import PerWeight
from tritonmoe.expert_parallel.state import abort_call
from tritonmoe.experts.adapters import names_of, noted_factors, notes_on
from tritonmoe.experts.arguments import check_plain
from tritonmoe.experts.moe_mlp import run_experts
from tritonmoe.experts.spec import ExpertSpec, expert_spec
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.integrations.transformers.discovery import ExpertsModule
from tritonmoe.integrations.transformers.gates import choose_activation
from tritonmoe.integrations.transformers.packed.packed_experts import (
    is_packed_experts,
    is_packed_weight,
    num_experts_of,
    read_packed,
    up_name,
)
from tritonmoe.placement.expert_shards import ExpertShards, shards_of
from tritonmoe.placement.offloaded import OffloadedExperts, offloaded_of, runs_outside_graphs
from tritonmoe.runtime.autograd import is_autocast_on, outside_graphs, without_autocast

__all__ = ["PRECISION", "experts_forward", "weights_of"]

logger = logging.getLogger(__name__)

PRECISION = "expert_precision"
"""The attribute that set_expert_precision() puts on a module of experts."""
Run: TypeAlias = Callable[[ExpertSpec, CallTensors[Tensor]], Tensor]
"""Runs experts whose rows and weights have one dtype, on one device or over ranks, and gives (T, D)."""


def experts_forward(self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts of a transformers module on hidden_states (T, D); gives (T, D) in their dtype.

    Args:
        self: the experts module, made by transformers' `use_experts_implementation`.
        top_k_index: (T, K); ids of `self.num_experts` and above are routes to other ranks, and skipped.
        top_k_weights: (T, K).

    Under autocast everything is computed in the autocast dtype, else in that of the expert weights. Experts that
    `parallelize` has spread over ranks exchange their rows here. Packed weights are decoded one expert at a time, and
    compute in bf16: a warning says once where hidden_states are rounded to it. Raises TypeError where a weight is
    quantised otherwise.
    """
    if torch.compiler.is_compiling() and runs_outside_graphs(self):
        return _forward_outside_graphs(self, hidden_states, top_k_index, top_k_weights)
    shards = shards_of(self)
    run: Run = run_experts if shards is None else shards.run
    num_experts = num_experts_of(self) if shards is None else shards.num_experts
    try:
        dtype = _computing_dtype(self, hidden_states)
        if (offloaded := offloaded_of(self)) is None:
            weights, is_transposed = weights_of(self, dtype, shards)
        else:
            weights = _offloaded_weights(self, offloaded, hidden_states, dtype)
            is_transposed = offloaded.is_transposed
        activation, is_interleaved = choose_activation(self)
        if not is_fused(activation):
            activation = _keep_dtype(activation)
        spec = expert_spec(
            activation=activation,
            gated=getattr(self, "has_gate", True),
            interleaved=is_interleaved,
            transposed=is_transposed,
            precision=getattr(self, PRECISION, None),
        )
        if notes := notes_on(self):
            factors = noted_factors(notes, dtype, range(num_experts) if shards is None else shards.expert_ids)
            spec, weights = replace(spec, adapters=names_of(notes)), weights._replace(**factors)
        inputs = CallTensors(hidden_states.to(dtype), top_k_index, top_k_weights, weights)
    except Exception:  # whatever this rank refuses, the others wait for its word
        if shards is not None:
            abort_call(shards.transport)
        raise
    # the casts are done: autocast would now only round the fp32 sums inside
    with without_autocast(hidden_states.device):
        if getattr(self, "has_post_expert_norm", False):
            out = _normed_experts(run, spec, inputs, self.post_expert_norm, num_experts)
        else:
            out = run(spec, inputs)
    return out.to(hidden_states.dtype)


def _computing_dtype(experts: ExpertsModule, rows: Tensor) -> torch.dtype:
    if is_autocast_on(rows.device):
        return torch.get_autocast_dtype(rows.device.type)
    if not is_packed_experts(experts):
        return getattr(experts, up_name(experts)).dtype
    if rows.dtype != torch.bfloat16 and not torch.compiler.is_compiling():
        _say_rounded(rows.dtype)
    return torch.bfloat16


@cache
def _say_rounded(dtype: torch.dtype) -> None:
    """Log once that experts compute in another dtype than the model around them."""
    logger.warning(
        "packed experts compute in bf16: this model's rows are %s, and are rounded to bf16 before the experts, whose "
        "results are %s again. Load the model in bf16, or call it under torch.autocast in bf16, if that is not meant",
        dtype,
        dtype,
    )


def weights_of(
    experts: ExpertsModule, dtype: torch.dtype, shards: ExpertShards | None
) -> tuple[PerWeight[Tensor], bool]:
    """Return the weights to compute with, in this dtype where they are not packed, and whether they are transposed."""

    def take(name: str) -> Tensor:
        return getattr(experts, name) if shards is None else shards.local_parameter(experts, name)

    def cast(name: str) -> Tensor:
        weight = take(name)
        check_plain(name, weight)  # a cast would take the numbers of a quantised one for its values
        return weight.to(dtype)

    up, has_bias = up_name(experts), getattr(experts, "has_bias", False)
    is_transposed = getattr(experts, "is_transposed", False)
    (up_weight, up_scales, is_transposed), (down, down_scales, _) = (
        read_packed(experts, name, take) if is_packed_weight(experts, name) else (cast(name), None, is_transposed)
        for name in (up, "down_proj")
    )
    weights = PerWeight(
        up_weight,
        cast(f"{up}_bias") if has_bias else None,
        down,
        cast("down_proj_bias") if has_bias else None,
        gate_up_scales=up_scales,
        down_scales=down_scales,
    )
    return weights, is_transposed


def _offloaded_weights(
    experts: ExpertsModule, offloaded: OffloadedExperts, rows: Tensor, dtype: torch.dtype
) -> PerWeight[Tensor]:
    """Return the weights of a call whose projections stay elsewhere, and whose biases are here."""
    biases: list[Tensor] = []
    if getattr(experts, "has_bias", False):
        shards = shards_of(experts)
        for name in (f"{up_name(experts)}_bias", "down_proj_bias"):
            bias = getattr(experts, name) if shards is None else shards.local_parameter(experts, name)
            biases.append(bias.to(dtype))
    return offloaded.weights(experts, rows, *biases)


_forward_outside_graphs = outside_graphs(experts_forward)


def _keep_dtype(activation: Activation) -> Callable[[Tensor], Tensor]:
    """Wrap a gate that computes in another dtype than its rows."""
    assert callable(activation)
    return lambda rows: activation(rows).to(rows.dtype)


def _normed_experts(
    run: Run, spec: ExpertSpec, inputs: CallTensors[Tensor], norm: nn.Module, num_experts: int
) -> Tensor:
    """Norm each expert's output before it is weighted (muse_spark): K=1 on T*K rows, then the sum here."""
    rows, topk_ids, topk_weights, weights, *_ = inputs
    num_tokens, top_k = topk_ids.shape
    is_routed = (topk_ids >= 0) & (topk_ids < num_experts)
    pair_rows = rows.repeat_interleave(top_k, dim=0)  # (T*K, D)
    unit_weights = torch.ones(num_tokens * top_k, 1, device=rows.device)
    pairs = norm(run(spec, CallTensors(pair_rows, rearrange(topk_ids, "t k -> (t k) 1"), unit_weights, weights)))
    pairs = torch.where(is_routed.unsqueeze(2), rearrange(pairs, "(t k) d -> t k d", k=top_k), 0.0)
    pair_weights = torch.where(is_routed, topk_weights, 0.0)
    pair_weights = pair_weights.to(torch.promote_types(topk_weights.dtype, torch.float32))
    return (pairs * pair_weights.unsqueeze(2)).sum(dim=1)  # in fp32
