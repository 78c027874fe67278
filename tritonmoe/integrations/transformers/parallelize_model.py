"""parallelize(): spread the experts of a model over ranks."""

from typing import Literal

import torch
from torch import Tensor, nn

from tritonmoe.config.overlap import OverlapConfig, check_overlap
from tritonmoe.expert_parallel.state import LayerCalls
from tritonmoe.experts.adapters import shard_adapters
from tritonmoe.integrations.torch_distributed.parallelize import (
    check_spreadable,
    device_of,
    routed_experts,
    spread_layers,
)
from tritonmoe.integrations.transformers.discovery import ExpertsModule, experts_modules
from tritonmoe.integrations.transformers.packed.packed_experts import num_experts_of, weight_names
from tritonmoe.integrations.transformers.peft_adapters import hand_over_factors
from tritonmoe.integrations.transformers.registration import check_patchable, patch
from tritonmoe.integrations.transformers.requirements import check_model
from tritonmoe.integrations.transformers.sharded_model import bind_to_spread
from tritonmoe.integrations.transformers.trainer_checkpoints import patch_trainer
from tritonmoe.placement.expert_shards import ExpertShards, Sharding, find_sharding
from tritonmoe.placement.same_weights import check_on_all_ranks
from tritonmoe.placement.sharded_parameters import check_expert_gradients, shard_parameters
from tritonmoe.transports import Ranks, Transport, as_transport

__all__ = ["parallelize"]


def parallelize(
    model: nn.Module,
    group_or_mesh: Ranks,
    overlap: OverlapConfig | None = None,
    *,
    expert_gradients: Literal["mean", "sum"] = "mean",
) -> int:
    """Spread the experts of a transformers model over ranks, in place; give the number of experts modules.

    Every rank calls it with the same weights, and then runs its own batch through the whole model, its own experts and,
    by overlapped exchanges, those of the others. All ranks make the same calls, forward and backward; batches may
    differ in size. Every expert parameter becomes a DTensor, Shard(0) over the ranks, with its name unchanged: make
    the optimizer afterwards. torch.distributed.checkpoint reads such checkpoints back over any number of ranks.
    `model.save_pretrained` gathers, so every rank must call it; the first one writes. Trainer's checkpoints do too, and
    torch.save of one rank's state dict is refused (tritonmoe.gather_state_dicts). Every rank calls `model.generate`,
    as often; texts may end at different lengths. Continuous batching (generate_batch) is refused.
    DistributedDataParallel, and so Trainer, leaves expert parameters alone, in whatever module the model stands.
    FSDP2's fully_shard comes after this, over the replicas for the experts or with
    `ignored_params=set(tritonmoe.expert_parameters(model))`: docs/transformers.md. The layers of a model upcycled in
    place are spread too.

    Args:
        group_or_mesh: a torch ProcessGroup or DeviceMesh of all ranks, or a DeviceMesh of two dimensions, one called
            "expert" and one of replicas, over which the gradients of each expert are averaged too.
        overlap: the chunks; the same on every rank. None is OverlapConfig().
        expert_gradients: "mean": as if averaged over the ranks, which goes with dense gradients that are; "sum": of
            the ranks' losses.
    Raises:
        ValueError: as patch() and tritonmoe.parallelize(); an experts module has a parameter that transformers' experts
            don't have, whose first size is the number of experts; init_process_group was not called. Every rank raises,
            and nothing is changed.
    """
    overlap = OverlapConfig() if overlap is None else overlap
    check_model(model)
    transport = _transport_of(group_or_mesh)
    hand_over_factors()
    found = experts_modules(model)
    layers = routed_experts(model)
    experts = {**found, **layers}
    sharding = find_sharding(group_or_mesh, transport, device_of([model]))

    def check() -> None:
        check_expert_gradients(expert_gradients)
        check_overlap(overlap)
        if not found and not layers:
            patch(model)  # it says what is missing where there is nothing to spread
        if found:
            check_patchable(model, found)
        check_spreadable(model, experts, transport.size)
        for name, module in found.items():
            _check_weights(name, module)

    check_on_all_ranks(model, experts, sharding, check)
    if found:
        patch(model)
        for own in found.values():
            _shard_experts(own, sharding, overlap, expert_gradients)
    spread_layers(model, group_or_mesh, overlap, expert_gradients=expert_gradients)
    shard_adapters(model)
    bind_to_spread(model, found)
    patch_trainer()
    return len(found) + len(layers)


def _transport_of(ranks: Ranks) -> Transport:
    if isinstance(ranks, Transport):
        raise TypeError(
            f"the experts of a model are spread over a ProcessGroup or a DeviceMesh, got {type(ranks).__name__}: start "
            "processes with torchrun, of backend gloo on a CPU. Emulated ranks spread layers of "
            "tritonmoe (MoELayer(config, transport)), and each runs a model of transformers whole"
        )
    if ranks is None and not torch.distributed.is_initialized():
        raise ValueError(
            "there are no ranks yet, and dist.group.WORLD is None: call torch.distributed.init_process_group() before "
            "parallelize()"
        )
    return as_transport(ranks)


def _check_weights(name: str, experts: ExpertsModule) -> None:
    """Raise ValueError where nothing says whether the experts of a module share one of its parameters."""
    num_experts, known = num_experts_of(experts), weight_names(experts)
    for own_name, parameter in experts.named_parameters(recurse=False):
        has_part_of_each = parameter.dim() > 0 and parameter.shape[0] == num_experts
        if has_part_of_each != (own_name in known):
            raise ValueError(
                f"{name}.{own_name} is {tuple(parameter.shape)}, and the module has {num_experts} experts, each with a "
                f"part of {', '.join(known)}: nothing says whether {own_name} has a part for each expert, of which "
                "this rank would keep its own, or is shared by all. Keep a parameter that all experts share in a "
                "module of its own inside the experts, or let its first size be none of the experts' number"
            )


def _shard_experts(experts: ExpertsModule, sharding: Sharding, overlap: OverlapConfig, expert_gradients: str) -> None:
    """Keep this rank's experts of a module, as DTensors."""
    own: dict[str, Tensor | None] = {
        name: _own_experts(experts.get_parameter(name), sharding.transport) for name in weight_names(experts)
    }
    calls = LayerCalls(sharding.transport, expert_gradients)
    shard_parameters(experts, own, ExpertShards(sharding, num_experts_of(experts), calls, overlap))


def _own_experts(parameter: nn.Parameter, transport: Transport) -> Tensor:
    """Return a copy of this rank's experts."""
    part = parameter.detach().tensor_split(transport.size)[transport.rank]
    return part.clone(memory_format=torch.contiguous_format).requires_grad_(parameter.requires_grad)
