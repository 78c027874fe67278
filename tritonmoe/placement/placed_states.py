"""State dicts of modules and optimizers show experts in the order of the model, whatever their placement."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from tritonmoe.placement.expert_shards import shards_of
from tritonmoe.placement.marks import MARK
from tritonmoe.placement.placed_rows import ExpertsOfRank, in_model_order, placed_rows_of
from tritonmoe.placement.watched_collectives import full_tensor
from tritonmoe.runtime.living import live_instances
from tritonmoe.runtime.wrappers import refuse_computed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "StateDict",
    "in_slot_order",
    "note_order",
    "order_of",
    "orders_of",
    "part_of",
    "refuse_moved",
    "show_in_model_order",
    "shown_state",
    "states_of",
]

StateDict: TypeAlias = dict[str, Any]
"""What state_dict() of a module or an optimizer gives: tensors, and whatever else a class keeps by name."""

_kinds_moved: set[type[nn.Module]] = set()
"""Classes of the modules whose experts have ever been in another order than the model's."""


def note_order(module: nn.Module) -> None:
    """Make state dicts show the experts of a module in the order of the model, if its rows are in another one."""
    shards = shards_of(module)
    if shards is not None and shards.is_spread and shards.order is not None:
        _kinds_moved.add(type(module))
        _show_states_of_optimizers()


def order_of(module: nn.Module) -> ExpertsOfRank | None:
    """Return the experts in the slots of every rank of a module; None where state dicts may show them so.

    Raises:
        ValueError: they may not, and a weight of theirs is computed from other parameters, which nothing would reorder.
    """
    shards = shards_of(module)
    order = None if shards is None else shards.order
    if shards is not None and order is not None:
        refuse_computed(type(module).__name__, module, shards.names, "its experts move or get a placement")
    return order


def refuse_moved(module: nn.Module, *_: object) -> None:
    """Raise ValueError where a rank's own state dict would show other experts than when the module was made: a hook."""
    if order_of(module) is not None:
        raise _moved_from_home()


def _moved_from_home() -> ValueError:
    return ValueError(
        "experts have moved between ranks that torch.distributed doesn't know, where a state dict or a copy of the "
        "module or of its optimizer holds each rank's own experts: call restore() of the Rebalancer on every rank "
        "first, which moves them back"
    )


def orders_of(parameters: Sequence[Tensor]) -> dict[int, ExpertsOfRank]:
    """Return the order of those of these parameters that state dicts would show in a wrong one, by their id.

    The living modules are asked: a note on a parameter would be lost where it is exchanged for another.

    Raises:
        ValueError: as order_of().
    """
    wanted = {id(parameter) for parameter in parameters}
    found: dict[int, ExpertsOfRank] = {}
    for module in live_instances(*_kinds_moved) if wanted and _kinds_moved else ():
        shards = shards_of(module)
        if shards is None or not shards.is_spread or (order := shards.order) is None:
            continue
        if any(id(parameter) in wanted for parameter in module.parameters()):
            order_of(module)
        for name in shards.names:
            parameter = module.__dict__["_parameters"].get(name)
            if id(parameter) in wanted:
                found[id(parameter)] = order
    return found


def part_of(value: Tensor, parameter: "DTensor", experts_of_rank: ExpertsOfRank | None = None) -> "DTensor":
    """Return this rank's part of a whole tensor, as a DTensor like the parameter.

    Args:
        experts_of_rank: the parameter's order; None is the model's.
    Raises:
        ValueError: the parameter is sharded over several dimensions of a mesh.
    """
    from torch.distributed.tensor import DTensor, Shard

    if parameter.placements != (Shard(0),):
        raise ValueError(
            f"a whole tensor can't be divided into {parameter.placements}: load the state dict with "
            "torch.distributed.checkpoint"
        )
    mesh = parameter.device_mesh
    rank = mesh.get_local_rank()
    device = value.device if parameter.is_meta else parameter.to_local().device
    if experts_of_rank is not None:
        by_expert = value.unflatten(0, (_num_experts(experts_of_rank), -1))
        part = by_expert[list(experts_of_rank[rank])].flatten(0, 1).to(device)
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
    parts = value.chunk(mesh.size())  # as DTensor and FSDP2 divide
    part = (parts[rank] if rank < len(parts) else value[:0]).clone().to(device)  # a view would keep the whole
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride())


def show_in_model_order(
    names: Sequence[str], module: nn.Module, state_dict: StateDict, prefix: str, *_: object
) -> None:
    """Show the parameters of experts in a module's state dict in the order of the model: a hook of state_dict()."""
    order = order_of(module)
    for name in names if order is not None else ():
        value = state_dict.get(prefix + name)
        if value is not None and order is not None and hasattr(value, "device_mesh"):
            state_dict[prefix + name] = in_model_order(value, order)


def in_slot_order(value: object, parameter: object, order: ExpertsOfRank | None, name: str) -> object:
    """Return what a state dict has of a parameter, or of its optimizer's state, as this rank's part in its slots.

    A whole tensor gives the rows of this rank's experts. What state_dict() has shown under another placement is
    gathered, so every rank calls. What has another shape is left for torch to refuse.

    Raises:
        ValueError: it is a DTensor of which nothing tells the order, for a parameter in another order than the model's.
    """
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or not value.dim():
        return value
    rows = placed_rows_of(value)
    if rows is not None and rows.experts_of_rank == order:
        return DTensor.from_local(rows.rows, parameter.device_mesh, [Shard(0)], run_check=False)
    if rows is not None:
        value = full_tensor(value, "the loading of experts that have moved since their state was taken")
    elif isinstance(value, DTensor):
        if order is not None:
            raise ValueError(
                f"{name} is a DTensor whose rows don't say to which experts they belong, and the experts of this "
                "module have moved (or have a placement): load the result of state_dict(), whole tensors on every "
                "rank, or with torch.distributed.checkpoint into state_dict()"
            )
        return value
    num_slots = parameter.shape[0]
    num_rows = num_slots if order is None else num_slots // sum(map(len, order)) * _num_experts(order)
    if tuple(parameter.placements) != (Shard(0),) or value.shape[0] != num_rows:
        return value
    return part_of(value, parameter, order)


def _num_experts(experts_of_rank: ExpertsOfRank) -> int:
    return 1 + max(max(held) for held in experts_of_rank)


# Optimizers


def shown_state(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
    """Return an optimizer's state dict with the states of experts in the order of the model."""
    state = {}
    for number, own, parameter, order in states_of(optimizer, state_dict):
        state[number] = own if order is None else {name: _shown(value, parameter, order) for name, value in own.items()}
    return {**state_dict, "state": state}


def _shown(value: object, parameter: Tensor | None, order: ExpertsOfRank) -> object:
    if parameter is None or not isinstance(value, Tensor) or not hasattr(value, "device_mesh") or not value.dim():
        return value
    if placed_rows_of(value) is not None or value.shape[0] != parameter.shape[0]:
        return value
    return in_model_order(cast("DTensor", value), order)


def _taken_state(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
    """Return a state dict with the states of moved experts, or taken before these moved, in the order of the slots."""
    state = {}
    for number, own, parameter, order in states_of(optimizer, state_dict):
        state[number] = own
        if order is not None or any(placed_rows_of(value) is not None for value in own.values()):
            state[number] = {
                name: in_slot_order(value, parameter, order, f"the state {name!r} of parameter {number}")
                for name, value in own.items()
            }
    return {**state_dict, "state": state}


def states_of(
    optimizer: torch.optim.Optimizer, state_dict: StateDict
) -> Iterator[tuple[int, StateDict, Tensor | None, ExpertsOfRank | None]]:
    """Yield each state of an optimizer's state dict: its number, what it holds, the parameter and its order.

    Raises:
        ValueError: it is of experts that have moved between ranks that torch doesn't know.
    """
    parameters = {  # torch says what differs in length
        number: parameter
        for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
        for number, parameter in zip(saved["params"], group["params"], strict=False)
    }
    orders = orders_of(list(parameters.values()))
    for number, own in state_dict["state"].items():
        parameter = parameters.get(number)
        order = orders.get(id(parameter))
        if order is not None and not hasattr(parameter, "device_mesh"):
            raise _moved_from_home()
        yield number, own, parameter, order


def _show_states_of_optimizers() -> None:
    """Make every optimizer's state_dict() show, and load_state_dict() take, experts in the order of the model.

    A copy, or a pickled one, has the parameters without their module, which knows their order: it is refused.
    """
    kind = torch.optim.Optimizer
    if hasattr(kind.state_dict, MARK):
        return
    give, take, pickle = kind.state_dict, kind.load_state_dict, kind.__getstate__

    @functools.wraps(give)
    def state_dict(self: torch.optim.Optimizer) -> StateDict:
        return shown_state(self, give(self))

    @functools.wraps(take)
    def load_state_dict(self: torch.optim.Optimizer, state_dict: StateDict) -> None:
        take(self, _taken_state(self, state_dict))

    @functools.wraps(pickle)
    def getstate(self: torch.optim.Optimizer) -> StateDict:
        moved = orders_of(parameters := [p for group in self.param_groups for p in group["params"]])
        for parameter in parameters:
            if id(parameter) in moved and not hasattr(parameter, "device_mesh"):
                raise _moved_from_home()
        if moved:
            raise ValueError(
                f"a copy of this {type(self).__name__}, or a pickled one, would hold the rows of experts in the order "
                "of a placement, and not the placement: copy or save its state_dict(), and load that into an optimizer "
                "of the copied module"
            )
        return pickle(self)

    setattr(state_dict, MARK, True)
    kind.state_dict = state_dict  # type: ignore[method-assign]  # docs/patches.md
    kind.load_state_dict = load_state_dict  # type: ignore[method-assign]  # docs/patches.md
    kind.__getstate__ = getstate  # type: ignore[method-assign]  # docs/patches.md
