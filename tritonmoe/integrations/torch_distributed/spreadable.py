"""What parallelize() refuses: experts that can't be spread, and whatever would go on with the whole weights."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.check import check_expert_parallel
from tritonmoe.experts.adapters import SHARDS, check_hands_over
from tritonmoe.experts.parameters import PARAMETERS
from tritonmoe.layer import MoELayer
from tritonmoe.placement.data_parallel import counts_by_wrapper
from tritonmoe.placement.expert_shards import sharded_modules, shards_of
from tritonmoe.routing import TopKRouter
from tritonmoe.runtime.living import live_instances, owners_of_memory, refuse_what_lives
from tritonmoe.runtime.wrappers import refuse_computed

__all__ = ["check_spreadable"]


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
        check_expert_parallel(num_local, num_experts, size, placement)
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
