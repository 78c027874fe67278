"""What DTensor gives wrong, or refuses with words that help nobody: numbers of parts, masks, `.data =`.

Optimizers and utilities that take parameters one by one use these where AdamW or SGD use lists (mixed_lists.py).
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from tritonmoe.placement.marks import is_marked_mesh
from tritonmoe.placement.watched_collectives import full_tensor, watched_on

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.distributed.tensor import DTensor

__all__ = ["Arguments", "Handler", "Keywords", "fill_dtensor_gaps", "handlers", "is_dtensor", "is_part", "own_rules"]

Arguments: TypeAlias = tuple[Any, ...]
Keywords: TypeAlias = dict[str, Any]
"""What an operation is called with: tensors, lists of tensors, numbers."""
Handler: TypeAlias = "Callable[[OpOverload, Arguments, Keywords], Any]"
"""What DTensor's table holds for an operation: a function of it, its arguments and its keywords."""

OWN_DATA = "_tritonmoe_own_data"
STEP = "the step of an optimizer"
COLLECTIVES = ("broadcast_", "allreduce_", "allreduce_coalesced_", "reduce_", "allgather_")
"""What torch.distributed's functions call with the tensors that they are given."""

_without_handler = threading.RLock()


def fill_dtensor_gaps() -> None:
    """Make single DTensors of spread experts give what whole tensors would, or name the way out, from now on."""
    from torch.distributed.tensor import DTensor

    table, aten = handlers(), torch.ops.aten
    table.setdefault(aten._local_scalar_dense.default, _number_of)
    table.setdefault(aten._is_any_true.default, _is_any_true_here)
    table.setdefault(aten.index_put_.default, _put_where_masked)
    for operation in (aten.linalg_vector_norm.default, aten.mean.dim):
        table.setdefault(operation, _reduce)
    for collective in COLLECTIVES:
        table.setdefault(getattr(torch.ops.c10d, collective).default, _refuse_collective)
    if hasattr(DTensor, OWN_DATA):
        return
    own_data: Any = Tensor.data  # a descriptor
    setattr(DTensor, OWN_DATA, own_data)
    setting = functools.partial(_set_data, own_data.__set__)
    DTensor.data = property(own_data.__get__, setting)  # type: ignore[assignment]  # docs/patches.md


def handlers() -> "dict[OpOverload, Handler]":
    """Return DTensor's table of operations with a function of their own, which it asks before its own rules."""
    from torch.distributed.tensor import DTensor

    return DTensor._op_dispatcher._custom_op_handlers  # type: ignore[return-value]  # PyTorch says `object`


@contextmanager
def own_rules(operation: "OpOverload") -> Iterator[None]:
    """Make the table send this operation on to DTensor's own rules, inside of it."""
    table = handlers()
    with _without_handler:
        own = table.pop(operation)
        try:
            yield
        finally:
            table[operation] = own


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "placements")


def is_part(tensor: Tensor) -> bool:
    """Return whether it is a DTensor of which each rank has a part that is still to be summed with the others'."""
    if not is_dtensor(tensor):
        return False
    mesh = tensor.device_mesh
    return any(placement.is_partial() and mesh.size(dim) > 1 for dim, placement in enumerate(tensor.placements))


def _number_of(operation: "OpOverload", arguments: Arguments, keywords: Keywords) -> object:
    """Return what .item() gives; where PyTorch would give this rank's part of a sum as if it were the sum, the sum.

    That is summed in an optimizer's step alone, which every rank takes; whoever asks elsewhere may be alone.
    """
    (tensor,) = arguments
    if not is_part(tensor):
        return operation(tensor.to_local(), **keywords)
    if _is_in_optimizer_step():
        return operation(full_tensor(tensor, STEP), **keywords)
    if is_marked_mesh(tensor.device_mesh):
        raise ValueError(
            "this number is a sum or norm over experts that are spread over ranks, and .item(), float() and bool() "
            "would give this rank's part of it: call tensor.full_tensor().item(), on every rank"
        )
    with own_rules(operation):
        return operation(*arguments, **keywords)


def _is_any_true_here(operation: "OpOverload", arguments: Arguments, keywords: Keywords) -> Tensor:
    """Ask this rank's part alone: so torch.autograd.detect_anomaly looks for NaN, which one rank may do by itself."""
    return operation(arguments[0].to_local(), **keywords)


def _reduce(operation: "OpOverload", arguments: Arguments, keywords: Keywords) -> object:
    """Reduce dimensions; in an optimizer's step, wholly where they are spread, since it changes the result in place."""
    with own_rules(operation):
        reduced = operation(*arguments, **keywords)
    return _on_every_rank(reduced) if is_part(reduced) and _is_in_optimizer_step() else reduced


def _on_every_rank(tensor: "DTensor") -> Tensor:
    from torch.distributed.tensor import Replicate

    with watched_on(tensor.device_mesh, STEP):
        return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def _is_in_optimizer_step() -> bool:
    """Return whether an optimizer's own code asks, in its step, which every rank takes.

    A closure that the step calls, a hook on it, and what these call, may ask on one rank alone: PyTorch lets closures
    have gradients, and their frames are neither PyTorch's nor an optimizer's.
    """
    if torch.is_grad_enabled():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        is_optimizers = isinstance(frame.f_locals.get("self"), Optimizer)
        if is_optimizers and frame.f_code.co_name == "step":
            return True
        if not is_optimizers and frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "tritonmoe"):
            return False
        frame = frame.f_back
    return False


def _put_where_masked(operation: "OpOverload", arguments: Arguments, keywords: Keywords) -> object:
    """Set tensor[mask] = number on this rank's parts where both lie alike, for which DTensor has no rule."""
    tensor, indices, value, *others = arguments
    mask = indices[0]
    lies_alike = (
        len(indices) == 1
        and mask is not None
        and mask.dtype == torch.bool
        and is_dtensor(mask)
        and is_dtensor(tensor)
        and (mask.shape, mask.device_mesh, mask.placements) == (tensor.shape, tensor.device_mesh, tensor.placements)
        and value.dim() == 0
        and not (is_dtensor(value) or is_part(tensor))
    )
    if lies_alike:
        operation(tensor.to_local(), [mask.to_local()], value, *others, **keywords)
        return tensor
    with own_rules(operation):
        return operation(*arguments, **keywords)


def _set_data(own_set: Callable[[Tensor, Tensor], None], parameter: "DTensor", value: Tensor) -> None:
    """Stand in the place of `parameter.data = value`, which PyTorch ignores but for the shape and dtype."""
    if is_marked_mesh(parameter.device_mesh) and not _is_same_storage(parameter.to_local(), value):
        raise ValueError(
            f"PyTorch ignores `parameter.data = value` where the parameter {tuple(parameter.shape)} is spread over "
            "ranks (a DTensor), as vector_to_parameters does it: call parameter.copy_(value) under torch.no_grad(), "
            "with a whole value made distribute_tensor(value, parameter.device_mesh, parameter.placements), or "
            "module.load_state_dict(), which takes whole tensors"
        )
    own_set(parameter, value)


def _is_same_storage(local: Tensor, value: Tensor) -> bool:
    other = value.to_local() if is_dtensor(value) else value
    return (local.data_ptr(), local.shape, local.dtype) == (other.data_ptr(), other.shape, other.dtype)


def _refuse_collective(operation: "OpOverload", arguments: Arguments, keywords: Keywords) -> object:
    """Refuse a DTensor on a mesh of experts; any other DTensor goes where PyTorch has it go."""
    if not any(map(_is_of_experts, tree_leaves((arguments, keywords)))):
        with own_rules(operation):
            return operation(*arguments, **keywords)
    name = operation._schema.name.removeprefix("c10d::").rstrip("_")
    raise ValueError(
        f"torch.distributed's {name} got a DTensor, of which every rank holds another part, as of experts that are "
        "spread over ranks; it would mix these parts: leave out the parameters that "
        "tritonmoe.expert_parameters(module) gives (ZeroRedundancyOptimizer and averages of models do this to all "
        "parameters that they get: give the experts an optimizer of their own)"
    )


def _is_of_experts(value: object) -> bool:
    """Return whether it is a DTensor on a mesh of experts; PyTorch gathers those that it makes one vector of."""
    return isinstance(value, Tensor) and is_dtensor(value) and is_marked_mesh(value.device_mesh)
