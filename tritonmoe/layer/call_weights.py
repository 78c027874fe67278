"""The weights of one call: the parameters of GroupedExperts as the plain tensors that are computed with."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.experts.adapters import ExpertAdapters, noted_factors, with_adapters
from tritonmoe.experts.arguments import find_main_grads
from tritonmoe.experts.packed_parameters import as_values
from tritonmoe.experts.quantized_weight import is_packed
from tritonmoe.layer.known_experts import note_factors
from tritonmoe.runtime.halves import for_both_halves
from tritonmoe.sharding.sharded_parameters import local_shard

if TYPE_CHECKING:
    from tritonmoe.layer.grouped_experts import GroupedExperts

__all__ = ["call_weights", "local_weights"]


def local_weights(
    experts: "GroupedExperts", x: Tensor | None = None, adapters: ExpertAdapters | None = None
) -> PerWeight[Tensor]:
    """Return this rank's experts as plain tensors, whose gradients reach the parameters, to compute with x."""
    own: PerWeight[Tensor] = PerWeight(
        experts.gate_up_proj,
        experts.gate_up_proj_bias,
        experts.down_proj,
        experts.down_proj_bias,
        gate_up_scales=experts.gate_up_proj_scales,
        down_scales=experts.down_proj_scales,
    )
    parameters = with_adapters(own, adapters)
    sharding, calls, placement = experts.sharding, experts.calls, experts.placement
    if sharding is None or calls is None:
        return parameters
    is_trained = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
    if is_trained and sharding.mesh is not None and placement is not None and placement.has_replicas:
        raise ValueError(
            "experts that stand in several slots of a placement can't be trained as DTensors: clip_grad_norm_ "
            "would count them several times. Use a placement without replicas, freeze them "
            "(requires_grad_(False)), or call expert_parallel_mlp with parameters of your own"
        )
    first = len(parameters) * calls.number
    local: list[Tensor | None] = [None] * len(parameters)
    for number, parameter in enumerate(parameters):
        if parameter is not None:
            make = partial(local_shard, experts, parameter, sharding, experts.gradient_scale, first + number)
            local[number] = for_both_halves(parameter, parameter.dtype, make)
    weights: PerWeight[Tensor] = PerWeight(*local)  # type: ignore[arg-type]  # None stands where PerWeight has None
    if x is None or not experts.narrows_to(x.dtype) or find_main_grads(weights) is not None:
        return weights
    dtype = x.dtype
    return weights.map(lambda weight: for_both_halves(weight, dtype, lambda: weight.to(dtype)))


def call_weights(experts: "GroupedExperts", x: Tensor | None, adapters: ExpertAdapters | None) -> PerWeight[Tensor]:
    """Return local_weights() with these adapters, or with the factors that are noted of the module (PEFT's)."""
    weights = as_values(experts, experts.config.weight_format, local_weights(experts, x, adapters))
    if adapters is not None and experts.transport is not None and experts.transport.size > 1:
        note_factors(experts.key, adapters)
    factors = noted_factors(
        experts, torch.bfloat16 if is_packed(weights) else weights.gate_up_proj.dtype, experts.expert_ids
    )
    if factors and adapters is not None:
        raise ValueError(
            "the call gives adapters to experts that PEFT has adapted already: leave adapters out, or don't wrap the "
            "experts by PEFT"
        )
    is_trained = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors.values())
    if is_trained and experts.placement is not None and experts.placement.has_replicas:
        raise ValueError(
            "adapters of experts that stand in several slots of a placement can't be trained: every slot would get "
            "the gradient of all of them, and an average over ranks would count it several times. Use a placement "
            "without replicas, or freeze the adapters"
        )
    return weights._replace(**factors)
