"""PEFT's adapters of spread experts: each rank holds the factors of its own experts, and files keep PEFT's format.

A, whose rows are (expert, rank), is a DTensor of that shape. The columns of PEFT's B are (rank, expert), which no rank
has a contiguous part of: it becomes a DTensor (E, out, R), and PEFT's matrix again where it is gathered.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from tritonmoe.integrations.transformers.packed.packed_experts import up_name
from tritonmoe.placement.expert_shards import ExpertShards, sharded_modules, shards_of
from tritonmoe.placement.placed_states import StateDict, order_of, part_of
from tritonmoe.placement.same_weights import check_on_all_ranks
from tritonmoe.placement.sharded_parameters import shard_parameters
from tritonmoe.placement.whole_states import give_whole_as, whole_forms
from tritonmoe.transports import as_transport

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper
    from torch.distributed.tensor import DTensor

__all__ = ["check_merged_is_finite", "local_factors", "shard_factors", "spread_of", "with_parts"]


def spread_of(experts: nn.Module) -> ExpertShards | None:
    """Return where these experts live, if the factors of their adapters are spread as they are; else None.

    Every rank has all factors over ranks that torch.distributed doesn't know, and where experts have replicas.
    """
    shards = shards_of(experts)
    if shards is None or not shards.names or shards.sharding.mesh is None:
        return None
    return None if shards.placement is not None and shards.placement.has_replicas else shards


def shard_factors(wrapper: "ParamWrapper") -> None:
    """Keep this rank's part of all factors that are whole here, where the experts are spread; every rank calls.

    Those on the meta device have no values yet, and wait.
    """
    experts = wrapper.get_base_layer()
    shards = spread_of(experts)
    if shards is None or wrapper.parameter_name not in (up_name(experts), "down_proj"):  # packed or not
        return
    first = 16 + 2 * (wrapper.parameter_name == "down_proj")  # not the experts' own numbers
    for adapter in wrapper.lora_A:
        for linear, is_b in ((wrapper.lora_A[adapter], False), (wrapper.lora_B[adapter], True)):
            if not linear.weight.is_meta and not any(sharded_modules(linear)):
                _shard(cast(nn.Linear, linear), replace(shards, first_number=first + is_b, averaged=()), is_b)


def _shard(linear: nn.Linear, shards: ExpertShards, is_b: bool) -> None:
    sharding, num_experts = shards.sharding, shards.num_experts
    if sharding.replicas is not None:
        check_on_all_ranks(
            linear, {"": linear}, replace(sharding, transport=as_transport(sharding.replicas), replicas=None)
        )
    weight = linear.weight
    whole = _from_peft(weight.detach(), num_experts) if is_b else weight.detach()
    if is_b:
        linear.register_load_state_dict_pre_hook(partial(_load_from_peft, num_experts))
        give_whole_as(linear, _to_peft)
    else:
        give_whole_as(linear, _as_it_is)
    part = whole.unflatten(0, (num_experts, -1))[list(shards.expert_ids)].flatten(0, 1)
    shard_parameters(linear, {"weight": part.requires_grad_(weight.requires_grad)}, shards)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _from_peft(weight: Tensor, num_experts: int) -> Tensor:
    """Turn B (out, R * E) into (E, out, R)."""
    return weight.unflatten(1, (-1, num_experts)).permute(2, 0, 1).contiguous()


def _to_peft(weight: Tensor) -> Tensor:
    """Turn (E, out, R) into B (out, R * E)."""
    return weight.permute(1, 2, 0).flatten(1).contiguous()


def _load_from_peft(num_experts: int, linear: nn.Module, state_dict: StateDict, prefix: str, *_: object) -> None:
    value = state_dict.get(f"{prefix}weight")
    if isinstance(value, Tensor) and value.dim() == 2:
        state_dict[f"{prefix}weight"] = _from_peft(value, num_experts)


def with_parts(model: nn.Module, state_dict: StateDict) -> StateDict:
    """Return a whole adapter with this rank's part of what is spread in the model, as PEFT's hotswap copies it there.

    Raises:
        ValueError: a factor has another rank than the one there.
    """
    given = dict(state_dict)
    for name in whole_forms(model).keys() & state_dict.keys():
        linear, wrapper = model.get_submodule(name.removesuffix(".weight")), model.get_submodule(name.rsplit(".", 3)[0])
        weight = model.get_parameter(name)
        value = state_dict[name]
        is_b = weight.dim() == 3
        if value.numel() != weight.numel():
            raise ValueError(
                f"PEFT can't swap {name} {tuple(value.shape)} into an adapter of another rank, whose experts are "
                f"spread over ranks: load it under a name of its own with load_adapter(), which takes any rank"
            )
        by_expert = _from_peft(value, cast("ParamWrapper", wrapper).num_experts) if is_b else value
        given[name] = part_of(by_expert, cast("DTensor", weight), order_of(linear))
    return given


def check_merged_is_finite(wrapper: "ParamWrapper", adapters: Sequence[str]) -> None:
    """Raise ValueError on every rank if an adapter would make some rank's weights infinite or NaN; every rank calls."""
    weight: DTensor = wrapper.get_param().detach()
    merged = weight.to_local().clone()
    for adapter in adapters:
        if adapter in wrapper.lora_A:
            delta: DTensor = wrapper.get_delta_weight(adapter)
            merged += delta.to_local()
    is_broken = (~merged.isfinite()).any().to(torch.int32)
    if (shards := shards_of(wrapper.get_base_layer())) is not None:
        shards.transport.all_reduce(is_broken, "max")
    if is_broken.item():
        raise ValueError(
            f"the adapters {list(adapters)} would make weights of {wrapper.parameter_name} on some rank infinite or "
            "NaN, and safe_merge=True refuses that: leave these adapters out"
        )


def local_factors(wrapper: "ParamWrapper", adapter: str) -> tuple[Tensor, Tensor] | None:
    """Return PEFT's A (E_local, R, .) and B (E_local, ., R) of this rank's experts; None where they are whole here."""
    linears = cast(Sequence[nn.Linear], (wrapper.lora_A[adapter], wrapper.lora_B[adapter]))
    if spread_of(wrapper.get_base_layer()) is None or not any(sharded_modules(linears[0])):
        return None
    factors = []
    for linear in linears:
        shards, parameter = shards_of(linear), linear.weight
        assert shards is not None
        local = shards.local(linear, parameter, 0)
        if local.dtype != parameter.dtype:
            raise ValueError(
                f"this release of PEFT has cast the adapter {adapter!r} to {parameter.dtype} without its values, since "
                "it is spread over ranks: upgrade PEFT, or call get_peft_model before parallelize, or with "
                "autocast_adapter_dtype=False"
            )
        factors.append(local)
    factor_a, factor_b = factors
    return factor_a.unflatten(0, (factor_b.shape[0], -1)), factor_b
