"""parallelize(): spread the experts of any module over ranks; which parameters those are; their whole state dicts."""

import functools
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, check_overlap
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.experts.adapters import shard_adapters
from tritonmoe.integrations.torch_distributed.spreadable import check_spreadable
from tritonmoe.layer import GroupedExperts, MoELayer
from tritonmoe.placement.data_parallel import counts_by_wrapper
from tritonmoe.placement.expert_shards import find_sharding, sharded_modules
from tritonmoe.placement.placed_states import StateDict
from tritonmoe.placement.same_weights import check_on_all_ranks
from tritonmoe.placement.sharded_parameters import check_expert_gradients
from tritonmoe.placement.whole_states import gather_optimizer, whole, whole_forms
from tritonmoe.routing import TopKRouter
from tritonmoe.runtime.wrappers import refuse_computed
from tritonmoe.transports import Ranks, as_transport

__all__ = ["device_of", "expert_parameters", "gather_state_dicts", "parallelize", "routed_experts", "spread_layers"]


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
            with another module anywhere, have hooks, gradients or a parametrization, or are adapted by a PEFT that does
            not hand over factors; or parameters or saved buffers of the module, routers and all, are others on another
            rank, but for those in its _ddp_params_and_buffers_to_ignore. Every rank raises, and nothing is changed.
        TypeError: `group_or_mesh` is none.
    Example:
        E=8 experts of (8, 2F, D) on a mesh of 4 ranks: parameters of global shape (8, 2F, D), two experts on each rank.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    found = routed_experts(module)
    transport = as_transport(group_or_mesh)
    sharding = find_sharding(group_or_mesh, transport, device_of([*found.values(), module]))

    def check() -> None:
        if not found:
            raise ValueError(
                f"{type(module).__name__} has neither MoELayer nor GroupedExperts, so there are no experts to spread: "
                "for a model of transformers call tritonmoe.integrations.transformers.parallelize"
            )
        check_overlap(OverlapConfig() if overlap is None else overlap)
        check_expert_gradients(expert_gradients)
        check_spreadable(module, found, transport.size, placement)

    check_on_all_ranks(module, found, sharding, check)
    spread_layers(module, group_or_mesh, overlap, placement=placement, expert_gradients=expert_gradients)
    shard_adapters(module)
    return len(found)


def device_of(modules: Iterable[nn.Module]) -> torch.device:
    """Return the device of the first parameter in these modules; the CPU where there is none."""
    return next((parameter.device for module in modules for parameter in module.parameters()), torch.device("cpu"))


def spread_layers(
    module: nn.Module,
    group_or_mesh: Ranks,
    overlap: OverlapConfig | OverlapPlan | None = None,
    *,
    placement: ExpertPlacement | None = None,
    expert_gradients: Literal["mean", "sum"] = "mean",
) -> None:
    """Do what parallelize() does once it has checked, apart from adapters."""
    for experts in routed_experts(module).values():
        experts.spread_over(group_or_mesh, overlap, placement=placement, expert_gradients=expert_gradients)
    for layer in module.modules():
        if isinstance(layer, MoELayer):
            for router in layer.router.modules():  # of PEFT's wrapper all that it may call
                if isinstance(router, TopKRouter) and counts_by_wrapper(router):
                    router.reduce_load = layer.grouped_experts.sum_over_ranks


def expert_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters in `module` that are other ones on every rank: experts that are spread over ranks.

    What is done to dense parameters on all ranks alike (a broadcast, an average, sharding by FSDP2) leaves these alone.

    Raises:
        ValueError: a weight of experts is computed from other parameters, as by a parametrization.
    """
    found: list[nn.Parameter | None] = []
    for name, child, shards in sharded_modules(module):
        refuse_computed(name or type(child).__name__, child, shards.names, "expert_parameters()")
        found += [getattr(child, own) for own in shards.names]
    return list({id(parameter): parameter for parameter in found if parameter is not None}.values())


def gather_state_dicts(module: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Make spread experts whole tensors on the CPU in state_dict() of the module and its optimizers, from now on.

    Every rank then calls state_dict(). For what does that and writes on one rank: Accelerate's save_state, Lightning's
    checkpoints. They load on one device, and over any number of ranks where the optimizers were given to this function
    too. Every rank holds the whole state for a moment; torch.distributed.checkpoint needs none of this. What FSDP2
    spreads of dense parameters is left to it.

    Raises:
        ValueError: the module has no experts that are spread over ranks, or torch doesn't know these ranks; a weight of
            experts is computed from other parameters, as by a parametrization.
        TypeError: something else than an optimizer of torch, as what Accelerator.prepare gives: pass what it was given.
    """
    found = list(sharded_modules(module))
    if not found:
        raise ValueError(f"{type(module).__name__} has no experts that are spread over ranks: parallelize() it first")
    if any(shards.sharding.members is None for _, _, shards in found):
        raise ValueError(
            f"the experts of {type(module).__name__} are spread over ranks that are not torch.distributed's, so "
            "state_dict() has only this rank's experts: make the layer with a ProcessGroup or a DeviceMesh"
        )
    for name, child, shards in found:
        refuse_computed(name or type(child).__name__, child, shards.names, "gather_state_dicts()")
    for optimizer in optimizers:
        if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
            raise TypeError(
                f"give optimizers of torch.optim themselves, not wrappers around them, got {type(optimizer).__name__}"
            )
    for _, child, shards in found:
        child.register_state_dict_post_hook(functools.partial(_gather, shards.names))
    for optimizer in optimizers:
        gather_optimizer(optimizer)


def _gather(names: tuple[str, ...], module: nn.Module, state_dict: StateDict, prefix: str, *__: object) -> None:
    refuse_computed(prefix.rstrip(".") or type(module).__name__, module, names, "state_dict()")
    forms = whole_forms(module)
    for name in names:
        if prefix + name in state_dict:
            state_dict[prefix + name] = whole(state_dict[prefix + name], forms.get(name))


def routed_experts(module: nn.Module) -> dict[str, GroupedExperts]:
    """Return the experts in `module` that tokens are routed to, by name: no shared ones, which take every token."""
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
