"""parallelize(): spread the experts of any module over ranks, or refuse; their parameters and whole state dicts."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, check_overlap
from tritonmoe.dispatch.placement import ExpertPlacement, check_experts_of_rank
from tritonmoe.experts.adapters import SHARDS, check_hands_over, shard_adapters
from tritonmoe.experts.parameters import PARAMETERS
from tritonmoe.layer import GroupedExperts, MoELayer
from tritonmoe.placement.data_parallel import counts_by_wrapper
from tritonmoe.placement.expert_shards import find_sharding, sharded_modules, shards_of
from tritonmoe.placement.placed_states import StateDict
from tritonmoe.placement.same_weights import check_on_all_ranks
from tritonmoe.placement.sharded_parameters import check_expert_gradients
from tritonmoe.placement.whole_states import gather_optimizer, whole, whole_forms
from tritonmoe.routing import TopKRouter
from tritonmoe.runtime.living import live_instances, owners_of_memory, refuse_what_lives
from tritonmoe.runtime.wrappers import refuse_computed
from tritonmoe.transports import Ranks, as_transport

__all__ = [
    "check_spreadable",
    "device_of",
    "expert_parameters",
    "gather_state_dicts",
    "parallelize",
    "routed_experts",
    "spread_layers",
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
    """Spread the experts of every layer as parallelize() does, without its checks and without adapters."""
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
    for _, child, _ in found:
        child.register_state_dict_post_hook(_gather)
    for optimizer in optimizers:
        gather_optimizer(optimizer)


def _gather(module: nn.Module, state_dict: StateDict, prefix: str, *__: object) -> None:
    shards = shards_of(module)
    names = () if shards is None else shards.names  # less than they were where experts have been offloaded since
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


def check_spreadable(
    module: nn.Module, found: Mapping[str, Any], size: int, placement: ExpertPlacement | None = None
) -> None:
    """Raise ValueError, before anything is changed, where these experts of `module` can't be spread over `size` ranks.

    Args:
        found: modules of experts, GroupedExperts or those of transformers, by their names.
    """
    _refuse_spread(found)
    for name, experts in found.items():
        # packed weights are in bytes, of which each expert has its own
        plain = [weight for weight in (*PARAMETERS, "up_proj") if f"{weight}_blocks" not in experts._parameters]
        refuse_computed(name or "the module", experts, plain, "parallelize()")
        num_experts = experts.down_proj.shape[0]
        num_local = num_experts // size if placement is None else placement.num_slots
        check_experts_of_rank(num_local, num_experts, size, placement)
    weights = _replaced(module, found)
    _refuse_noted(weights)
    _refuse_adapted(module, found)
    own = {id(weight): name for name, weight in reversed(weights.items())}  # the first of several names
    refuse_what_lives(partial(_held, module, found, own))


def _refuse_spread(found: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where experts are no whole parameters any more."""
    for name, experts in found.items():
        if shards_of(experts) is not None or any(sharded_modules(experts)):
            raise ValueError(
                f"the experts of {name or 'the module'} are spread over ranks already: call parallelize() once, and "
                "not on layers that were made with a transport"
            )
        if any(hasattr(parameter, "device_mesh") for parameter in experts.parameters(recurse=False)):
            raise ValueError(
                f"the experts of {name or 'the module'} are DTensors already: call parallelize() before fully_shard() "
                "and parallelize_module(), and not on a model that transformers has spread while loading it"
            )


def _replaced(module: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters that spreading replaces by others, by name: those of experts, and of adapters on them."""
    own = {
        f"{name}.{key}".lstrip("."): parameter
        for name, experts in found.items()
        for key, parameter in experts.named_parameters(recurse=False)
    }
    for name, child in module.named_modules():
        if hasattr(type(child), SHARDS):
            for key, factor in child.named_modules():
                if "lora_" in key:
                    refuse_computed(f"{name}.{key}".lstrip("."), factor, ("weight",), "parallelize()")
            factors = {f"{name}.{key}".lstrip("."): parameter for key, parameter in child.named_parameters()}
            own |= {key: parameter for key, parameter in factors.items() if "lora_" in key}
    return own


def _refuse_noted(weights: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError where a weight has what was made for all of it, and would be lost or not fit its part."""
    for name, weight in weights.items():
        for hooks, register in (
            (weight._backward_hooks, "register_hook"),
            (weight._post_accumulate_grad_hooks, "register_post_accumulate_grad_hook"),
        ):
            if hooks:
                raise ValueError(
                    f"{name} has hooks ({register}), which would stay with the whole weight and never run "
                    "again: remove them, and register them on the new parameter after parallelize()"
                )
        if weight.grad is not None:
            raise ValueError(
                f"{name} has a gradient, which would stay with the whole weight: call module.zero_grad() before "
                "parallelize(), or spread the experts before the backward"
            )
        for key, value in vars(weight).items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                raise ValueError(
                    f"{name}.{key} is a tensor {tuple(value.shape)} for the whole weight, of which this rank keeps a "
                    "part: set it after parallelize(), as large as parameter.to_local()"
                )


def _held(module: nn.Module, found: Mapping[str, nn.Module], own: Mapping[int, str]) -> Iterator[str]:
    """Return why the parameters `own` can't be replaced, or the experts that have them be spread, if they can't.

    Whoever keeps a parameter that is replaced would have one that never moves again.
    """
    from torch.nn.parallel import DistributedDataParallel

    inside = {id(child): name for name, child in module.named_modules()}
    experts = {id(child): name for name, child in found.items()}
    weights = [parameter for parameter in module.parameters() if id(parameter) in own]
    for held, key, weight in owners_of_memory(weights, list(module.modules())):
        name = own[id(weight)]
        owner, _, own_key = name.rpartition(".")
        if id(held) not in inside:
            yield (
                f"{name} is a weight of a {type(held).__name__} outside of the given {type(module).__name__} too, "
                "which would keep the whole, unspread one: give parallelize() the module that holds both, or that one "
                "weights of its own"
            )
        elif key != own_key or held is not module.get_submodule(owner):
            other = f"{inside[id(held)]}.{key}".lstrip(".")
            yield (
                f"the weights {name} and {other} are tied (one tensor, or one memory), and spreading would part them: "
                "give every module weights of its own before parallelize()"
            )
    for held in live_instances(MoELayer):
        if id(held) not in inside and (alone := _counts_alone(held, experts)) is not None:
            yield (
                f"the experts of {alone or 'the module'} belong to a MoELayer outside of the given "
                f"{type(module).__name__}, whose router would count this rank's load alone: give parallelize() the "
                "MoELayer, or what holds it"
            )
    for held in live_instances(DistributedDataParallel, torch.optim.Optimizer):
        parameters: Iterable[object]
        if isinstance(held, DistributedDataParallel):
            wrapped = held.__dict__.get("_modules", {}).get("module")  # one may be half made
            holder, parameters = "DistributedDataParallel", [] if wrapped is None else wrapped.parameters()
        else:
            groups = getattr(held, "param_groups", ())
            holder, parameters = type(held).__name__, [p for group in groups for p in group["params"]]
        for name in [own[id(parameter)] for parameter in parameters if id(parameter) in own]:
            yield (
                f"{holder} was made with the experts of {name} before they are spread, and would go on with the "
                "parameters that were: call parallelize() first"
            )


def _counts_alone(layer: MoELayer, experts: Mapping[int, str]) -> str | None:
    """Return the name of those of `experts` (by id) that are this layer's, if its selection bias knows of no ranks."""
    children = layer.__dict__.get("_modules", {})
    own, router = children.get("experts"), children.get("router")
    if own is None or router is None:
        return None
    routers = [child for child in router.modules() if isinstance(child, TopKRouter)]
    if not any(child.load is not None and counts_by_wrapper(child) for child in routers):
        return None
    return next((experts[id(child)] for child in own.modules() if id(child) in experts), None)


def _refuse_adapted(module: nn.Module, found: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where PEFT would add whole tensors to expert weights, which spread ones can't take."""
    for name in found:
        parts = name.split(".")
        for length in range(len(parts)):
            check_hands_over(name, module.get_submodule(".".join(parts[:length])))
