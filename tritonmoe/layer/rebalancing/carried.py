"""What moves with an expert: its rows of parameters, gradients and the optimizers' state; and what can't be moved."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tritonmoe.expert_parallel.state import LayerCalls, state_of
from tritonmoe.layer.rebalancing.spread_experts import SpreadExperts
from tritonmoe.placement.placed_rows import local_rows
from tritonmoe.runtime.living import live_instances, owners_of_memory, refuse_what_lives
from tritonmoe.runtime.wrappers import refuse_computed

__all__ = [
    "carried_tensors",
    "check_optimizers",
    "digest",
    "expert_bytes",
    "refuse_elsewhere",
    "refuse_shared_states",
]


def check_optimizers(optimizers: Iterable[object]) -> None:
    """Raise TypeError unless all are optimizers of torch, whose state is by parameter."""
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"give optimizers of torch.optim themselves, not wrappers around them, got {type(optimizer).__name__}"
            )


@torch.no_grad()
def carried_tensors(experts: SpreadExperts, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the memory of this rank's experts, by what it holds: as many rows for each slot.

    Raises:
        ValueError: something belongs to these experts of which nothing says how it would move.
    """
    if experts.shards.calls.takes_adapters:
        raise ValueError(
            f"the experts of {experts.name} were called with adapters=, whose factors are this rank's experts' and are "
            "no parameters of the model: adapt them by PEFT (target_parameters), whose factors move, or leave these "
            "layers where they are"
        )
    found: dict[str, Tensor] = {}
    for owner, module, shards in experts.sharded():
        refuse_computed(owner, module, shards.names, "tm.rebalance, and keep it one")
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, _ in tensors:
            if name not in shards.names:
                raise ValueError(
                    f"{name} of {owner} is no weight with one or more rows for each expert, so tm.rebalance can't "
                    "tell whether it must move with the experts: keep it in another module"
                )
        for name in shards.names:
            parameter = getattr(module, name)
            if parameter is not None:
                found |= _of_parameter(f"{owner}.{name}", parameter, optimizers)
    return found


def _of_parameter(name: str, parameter: nn.Parameter, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    found = {name: local_rows(name, parameter, parameter)}
    if parameter.grad is not None:
        found[f"{name}.grad"] = local_rows(f"{name}.grad", parameter.grad, parameter)
    for key, value in vars(parameter).items():
        if not isinstance(value, Tensor) or not value.dim():
            continue
        if key != "main_grad":
            raise ValueError(
                f"{name}.{key} is a tensor {tuple(value.shape)} on the parameter, and tm.rebalance can't tell whether "
                "it must move with the experts: remove it before the experts move, or give tm.rebalance a model "
                "without it"
            )
        found[f"{name}.main_grad"] = local_rows(f"{name}.main_grad", value, parameter)
    for number, optimizer in enumerate(optimizers):
        for key, value in optimizer.state.get(parameter, {}).items():
            what = f"the state {key!r} that {type(optimizer).__name__} {number} keeps of {name}"
            if isinstance(value, Tensor):
                if value.dim():
                    found[what] = local_rows(what, value, parameter)
            elif value is not None and not isinstance(value, (bool, int, float, complex, str)):
                raise ValueError(
                    f"{what} is a {type(value).__name__}, and nothing says which part of it is an expert's: "
                    "tm.rebalance takes optimizers whose states are numbers, or tensors with the experts in their "
                    "first dimension"
                )
    return found


def refuse_shared_states(every: Sequence[SpreadExperts], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise ValueError where an optimizer keeps experts and other parameters in one state, as LBFGS does.

    Such a state lies under the first parameter, or under a name: a flat tensor of all parameters, or of all of a group.
    """
    names = _names_of(every)
    for optimizer in optimizers:
        groups = [group["params"] for group in optimizer.param_groups]
        lists = [[p for group in groups for p in group], *groups]
        lists = [one for one in lists if any(id(p) in names for p in one)]
        # Of all parameters, or of those that are trained.
        totals = {sum(p.numel() for p in one if p.requires_grad or frozen) for one in lists for frozen in (True, False)}
        others = [(held, state) for held, state in optimizer.state.items() if id(held) not in names]
        is_flat = any(
            isinstance(found, Tensor) and found.numel() in totals and found.numel() != getattr(held, "numel", int)()
            for held, state in others
            for found in tree_leaves(state)
        )
        if lists and (isinstance(optimizer, torch.optim.LBFGS) or is_flat):
            name = next(names[id(p)] for p in lists[0] if id(p) in names)
            raise ValueError(
                f"{type(optimizer).__name__} keeps one state for all of its parameters together, those of {name} too, "
                "and nothing says which part of it is an expert's: give the experts an optimizer whose states are by "
                "parameter (AdamW, SGD, Adagrad), and this one the other parameters alone"
            )


def _names_of(every: Sequence[SpreadExperts]) -> dict[int, str]:
    """Return the names of what each rank holds of experts, by the id of the parameter."""
    return {
        id(getattr(module, name)): f"{owner}.{name}"
        for experts in every
        for owner, module, shards in experts.sharded()
        for name in shards.names
    }


def expert_bytes(tensors: Iterable[Tensor], num_slots: int) -> int:
    """Return how many bytes move with one expert."""
    return sum(tensor.numel() * tensor.element_size() // num_slots for tensor in tensors)


def digest(found: dict[str, Tensor]) -> int:
    """Return a number by which ranks know that they would move the same: names, shapes and dtypes."""
    return zlib.crc32(str([(name, tuple(value.shape), str(value.dtype)) for name, value in found.items()]).encode())


def refuse_elsewhere(every: Sequence[SpreadExperts], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise ValueError where something beside the given optimizers goes on with the places that experts leave.

    That is an optimizer that was not given, a module that shares a weight of theirs, a copy of a layer (of an average
    of weights, say), whose rows belong to the same experts only as long as none moves, and a CUDA graph.
    """
    if any(state_of(experts.shards.transport).captured_flags for experts in every):
        raise ValueError(
            "a CUDA graph has captured calls of these layers, and a replay would use the placement at the capture: "
            "run the layers without a graph (OverlapConfig without a capacity), or don't move their experts"
        )
    refuse_what_lives(partial(_elsewhere, every, optimizers))
    refuse_what_lives(partial(_shared, every))


def _shared(every: Sequence[SpreadExperts]) -> Iterator[str]:
    slots = {
        (id(module), name): (f"{owner}.{name}", getattr(module, name))
        for experts in every
        for owner, module, shards in experts.sharded()
        for name in shards.names
        if getattr(module, name) is not None
    }
    own = {id(weight): slot for slot, (_, weight) in reversed(slots.items())}  # the first of those that have it
    known = [module for experts in every for _, module, _ in experts.sharded()]
    for module, name, weight in owners_of_memory([weight for _, weight in slots.values()], known):
        slot = id(module), name
        if slot != own[id(weight)]:
            other = slots[slot][0] if slot in slots else f"{name} of a {type(module).__name__} whose experts stay"
            yield (
                f"{slots[own[id(weight)]][0]} shares memory with {other}, so a move of experts would put rows of other "
                "experts there: give each module a weight of its own, nn.Parameter(weight.detach().clone()), before "
                "tm.rebalance and the optimizer"
            )


def _elsewhere(every: Sequence[SpreadExperts], optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[str]:
    names = _names_of(every)
    own = {id(experts.shards.calls) for experts in every}
    layers = {id(experts.shards.calls.copies): experts.name for experts in every}
    states = {id(optimizer.state) for optimizer in optimizers}
    for held in live_instances(torch.optim.Optimizer, LayerCalls):
        if isinstance(held, torch.optim.Optimizer):
            groups = getattr(held, "param_groups", ())
            name = next((names[id(p)] for group in groups for p in group["params"] if id(p) in names), None)
            if name is not None and id(held.state) not in states:
                yield (
                    f"a {type(held).__name__} was made with {name} and not given to tm.rebalance, and its state would "
                    "stay where the experts were: give it, or delete it"
                )
        elif id(held) not in own:
            name = layers.get(id(held.__dict__.get("copies")))  # other threads may be making layers
            if name is not None:
                yield (
                    f"a deepcopy of the experts of {name} lives (as an average of weights has one), which would hold "
                    "other experts in the same places once these move: delete it and copy anew behind the move, or "
                    "copy before the experts are spread over ranks"
                )
