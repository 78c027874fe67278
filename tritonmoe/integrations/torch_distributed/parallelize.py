"""parallelize(): spread the experts of any module over ranks; which parameters those are; their whole state dicts."""

import functools
import gc
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, check_overlap
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.check import check_expert_parallel
from tritonmoe.experts.adapters import SHARDS, check_hands_over, shard_adapters
from tritonmoe.experts.parameters import PARAMETERS
from tritonmoe.layer import GroupedExperts, MoELayer
from tritonmoe.routing import TopKRouter
from tritonmoe.transports import Ranks, as_transport
from tritonmoe.transports.sharding.data_parallel import sharded_modules
from tritonmoe.transports.sharding.parameters import check_expert_gradients, check_same_weights, find_sharding
from tritonmoe.transports.sharding.whole_states import StateDict, gather_optimizer, whole, whole_forms

__all__ = [
    "expert_parameters",
    "gather_state_dicts",
    "parallelize",
    "refuse_adapted",
    "refuse_computed",
    "refuse_held",
    "refuse_tied",
    "routed_experts",
]


def parallelize(
    module: nn.Module,
    group_or_mesh: Ranks,
    overlap: OverlapConfig | OverlapPlan | None = None,
    *,
    placement: ExpertPlacement | None = None,
    expert_gradients: Literal["mean", "sum"] = "mean",
) -> int:
    """Spread the experts of every MoELayer and GroupedExperts in `module` over ranks, in place; give their number.

    Every rank calls it with the same weights, and then runs its own batch through the whole module, its own experts
    and, by overlapped exchanges, those of the others. All ranks make the same calls, forward and backward; batches may
    differ in size. Every expert parameter becomes a DTensor, Shard(0) over the dimension "expert", its name and shape
    unchanged: make the optimizer afterwards. DistributedDataParallel around it, or around any module that holds it,
    leaves these parameters alone; fully_shard is told to, by `ignored_params=set(expert_parameters(module))`.
    Optimizers, torch.nn.utils.clip_grad_norm_, GradScaler and torch.distributed.checkpoint take the module as it is.

    Args:
        group_or_mesh: a ProcessGroup or DeviceMesh of all ranks, or a DeviceMesh of a dimension "expert" and one of
            replicas, or what else MoELayer takes as its transport.
        overlap, placement, expert_gradients: as in MoELayer; the same on every rank.
    Raises:
        ValueError: there are no such experts, they are spread already, can't be divided by the ranks, share weights
            with another module, have a parametrization, are adapted by a PEFT that does not hand over factors, or have
            other values on another rank. Nothing is changed then.
        TypeError: `group_or_mesh` is none.
    Example:
        E=8 experts of (8, 2F, D) on a mesh of 4 ranks: parameters of global shape (8, 2F, D), two experts on each rank.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    found = routed_experts(module)
    if not found:
        raise ValueError(
            f"{type(module).__name__} has neither MoELayer nor GroupedExperts, so there is nothing to spread: for a "
            "model of transformers it is tritonmoe.integrations.transformers.parallelize"
        )
    refuse_held(module, found)
    check_overlap(OverlapConfig() if overlap is None else overlap)
    check_expert_gradients(expert_gradients)
    transport = as_transport(group_or_mesh)
    size = transport.size
    for name, experts in found.items():
        if experts.transport is not None:
            raise ValueError(f"the experts of {name or 'the module'} are spread over ranks already: parallelize once")
        num_experts = experts.config.num_experts
        num_local = num_experts // size if placement is None else placement.num_slots
        check_expert_parallel(num_local, num_experts, size, placement)
    refuse_computed(found)
    refuse_tied(module, found)
    refuse_adapted(module, found)
    device = next(iter(found.values())).gate_up_proj.device
    check_same_weights(module, found, find_sharding(group_or_mesh, transport, device))
    for experts in found.values():
        experts.spread_over(group_or_mesh, overlap, placement=placement, expert_gradients=expert_gradients)
    for layer in module.modules():
        if isinstance(layer, MoELayer):
            for router in layer.router.modules():  # of PEFT's wrapper all that it may call
                if isinstance(router, TopKRouter) and router.reduce_load is None:
                    router.reduce_load = layer.grouped_experts.sum_over_ranks
    shard_adapters(module)
    return len(found)


def expert_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Give the parameters in `module` that are other ones on every rank: experts that are spread over ranks.

    What is done to dense parameters on all ranks alike (a broadcast, an average, sharding by FSDP2) leaves these alone.
    """
    found = [getattr(child, name) for _, child, sharded in sharded_modules(module) for name in sharded.names]
    return list({id(parameter): parameter for parameter in found if parameter is not None}.values())


def gather_state_dicts(module: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Make spread experts whole tensors on the CPU in state_dict() of the module and its optimizers, from now on.

    Every rank then calls state_dict(). For what does that and writes on one rank: Accelerate's save_state, Lightning's
    checkpoints. They load on one device, and over any number of ranks where the optimizers were given to this function
    too. Every rank holds the whole state for a moment; torch.distributed.checkpoint needs none of this. What FSDP2
    spreads of dense parameters is left to it.

    Raises:
        ValueError: the module has no experts that are spread over ranks, or torch doesn't know these ranks.
        TypeError: something else than an optimizer of torch, as what Accelerator.prepare gives: pass what it was given.
    """
    found = list(sharded_modules(module))
    if not found:
        raise ValueError(f"{type(module).__name__} has no experts that are spread over ranks: parallelize() it first")
    if any(sharded.members is None for _, _, sharded in found):
        raise ValueError(
            f"the experts of {type(module).__name__} are spread over ranks that torch.distributed does not know, and "
            "state_dict() gives this rank's: make the layer with a ProcessGroup or a DeviceMesh"
        )
    for optimizer in optimizers:
        if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
            raise TypeError(
                f"optimizers of torch are needed, before anything wraps them, got {type(optimizer).__name__}"
            )
    for _, child, sharded in found:
        child.register_state_dict_post_hook(functools.partial(_gather, sharded.names))
    for optimizer in optimizers:
        gather_optimizer(optimizer)


def _gather(names: tuple[str, ...], module: nn.Module, state_dict: StateDict, prefix: str, *__: object) -> None:
    forms = whole_forms(module)
    for name in names:
        if prefix + name in state_dict:
            state_dict[prefix + name] = whole(state_dict[prefix + name], forms.get(name))


def routed_experts(module: nn.Module) -> dict[str, GroupedExperts]:
    """Give the experts in `module` that tokens are routed to, by name: none that stand beside them for every token."""
    beside = {
        id(child)
        for layer in module.modules()
        if isinstance(layer, MoELayer) and layer.shared_expert
        for child in layer.shared_expert.modules()
    }
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, GroupedExperts) and id(child) not in beside
    }


def refuse_held(module: nn.Module, found: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where somebody keeps the parameters that spreading replaces: they would never move again."""
    from torch.nn.parallel import DistributedDataParallel

    own = {id(parameter): name for name, experts in found.items() for parameter in experts.parameters(recurse=False)}
    for name, child in module.named_modules():
        if hasattr(type(child), SHARDS):
            own |= {id(parameter): name for key, parameter in child.named_parameters() if "lora_" in key}
    for name, experts in found.items():
        if any(hasattr(parameter, "device_mesh") for parameter in experts.parameters(recurse=False)):
            raise ValueError(
                f"the experts of {name or 'the module'} are DTensors already: call parallelize() before fully_shard() "
                "and parallelize_module()"
            )
    for held in gc.get_objects():
        if issubclass(type(held), DistributedDataParallel):
            holder, parameters = "DistributedDataParallel", held.module.parameters()
        elif issubclass(type(held), torch.optim.Optimizer):
            holder = type(held).__name__
            parameters = (parameter for group in held.param_groups for parameter in group["params"])
        else:
            continue
        kept = [own[id(parameter)] for parameter in parameters if id(parameter) in own]
        if kept:
            raise ValueError(
                f"{holder} was made with the experts of {kept[0] or 'the module'} before they are spread, and would "
                "go on with the parameters that were: call parallelize() first"
            )


def refuse_computed(found: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where an expert weight is made of other parameters, which would stay whole."""
    for name, experts in found.items():
        for weight in (*PARAMETERS, "up_proj"):
            if hasattr(experts, weight) and weight not in experts._parameters:
                raise ValueError(
                    f"{weight} of {name or 'the module'} is computed from other parameters (a parametrization or "
                    "pruning), which can't be spread over ranks: make it a parameter again before parallelize(), with "
                    "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
                )


def refuse_tied(module: nn.Module, found: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where an expert weight has a second name, which would keep the whole, unspread weight."""
    own = {f"{name}.{key}" for name, experts in found.items() for key, _ in experts.named_parameters(recurse=False)}
    names: dict[int, str] = {}
    every: Iterable[tuple[str, nn.Parameter]] = (
        (f"{name}.{own_name}", parameter)
        for name, child in module.named_modules()
        for own_name, parameter in child.named_parameters(recurse=False)
    )
    for name, parameter in every:
        first = names.setdefault(id(parameter), name)
        if first != name and (name in own or first in own):
            raise ValueError(
                f"the expert weights {first} and {name} are tied, and spreading would part them: give every module "
                "weights of its own before parallelize()"
            )


def refuse_adapted(module: nn.Module, found: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where PEFT would add whole tensors to expert weights, which spread ones can't take."""
    for name in found:
        parts = name.split(".")
        for length in range(len(parts)):
            check_hands_over(name, module.get_submodule(".".join(parts[:length])))
