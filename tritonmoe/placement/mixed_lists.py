"""Lists of tensors of which some are DTensors, as optimizers and clip_grad_norm_ make them: torch's operations on each.

PyTorch refuses one `_foreach_` or `_fused_` operation on plain tensors and DTensors together, or a sum of norms of
DTensors of two meshes. A model with sharded experts and whole dense parameters has such lists everywhere.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from tritonmoe.placement.dtensor_gaps import (
    Arguments,
    Handler,
    Keywords,
    handlers,
    is_dtensor,
    is_part,
    own_rules,
)
from tritonmoe.placement.watched_collectives import full_tensor

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["allow_mixed_lists"]

WITHOUT_RULES = ("aten::_foreach_copy_", "aten::_fused_adagrad_", "aten::_fused_sgd_")
"""Operations that DTensor has no rules for. They work element by element, so that each rank runs them on its parts."""


def allow_mixed_lists() -> None:
    """Allow torch's operations on lists to take plain tensors and DTensors of any meshes together, from now on.

    Lists of one kind go the way they went. A sum of norms becomes a plain tensor, the norm over all ranks.
    """
    table, aten = handlers(), torch.ops.aten
    for operation in (*_operations_on_lists(), aten.stack.default):
        table.setdefault(operation, _run_by_kind)
    unscale = aten._amp_foreach_non_finite_check_and_unscale_.default
    if getattr(table[unscale], "func", None) is not _unscale_by_kind:
        table[unscale] = functools.partial(_unscale_by_kind, table[unscale])


def _operations_on_lists() -> "Iterator[OpOverload]":
    """Return all operations on lists that optimizers and clipping use; dir(torch.ops.aten) has those called before."""
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        packet_name, _, overload = name.partition(".")
        if namespace == "aten" and packet_name.startswith(("_foreach_", "_fused_")) and "out" not in overload:
            operation = getattr(getattr(torch.ops.aten, packet_name), overload or "default")
            if any(str(argument.type) == "List[Tensor]" for argument in operation._schema.arguments):
                yield operation


def _by_kind(lists: Sequence[Sequence[Tensor]]) -> "dict[DeviceMesh | None, list[int]]":
    """Return the places of the lists by what stands there: the mesh of a DTensor, or None of plain tensors."""
    places: dict[DeviceMesh | None, list[int]] = {}
    for place, tensors in enumerate(zip(*lists, strict=True)):
        mesh = next((m for t in tensors if (m := getattr(t, "device_mesh", None)) is not None), None)
        places.setdefault(mesh, []).append(place)
    return places


def _is_list_of_tensors(value: object) -> TypeGuard[Sequence[Tensor]]:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor)


def _run_by_kind(operation: "OpOverload", arguments: Arguments, keywords: Keywords) -> object:
    """Run an operation once for each kind of tensor in its lists, and put the results where its operands stood."""
    lists = [value for value in (*arguments, *keywords.values()) if _is_list_of_tensors(value)]
    length = len(lists[0])
    places = _by_kind([tensors for tensors in lists if len(tensors) == length])
    is_mixed = len(places) > 1
    if operation is torch.ops.aten.stack.default:
        if all(tensor.dim() == 0 for tensor in lists[0]) and (is_mixed or any(is_part(t) for t in lists[0])):
            return torch.stack([_whole(tensor) for tensor in lists[0]], *arguments[1:], **keywords)
        places = {None: list(range(length))}

    def at(value: object, where: list[int]) -> object:
        return [value[place] for place in where] if isinstance(value, (list, tuple)) and len(value) == length else value

    results: list[Any] = [None] * length
    returned: object = None
    with own_rules(operation):
        for where in places.values():
            some = [at(value, where) for value in arguments]
            if operation._schema.name in WITHOUT_RULES:
                some = _on_this_rank(some)
            returned = operation(*some, **{name: at(value, where) for name, value in keywords.items()})
            if isinstance(returned, (list, tuple)) and is_mixed:
                for place, result in zip(where, returned, strict=True):
                    results[place] = result
    if not is_mixed or returned is None:
        return returned
    if operation._schema.name == "aten::_foreach_norm":  # of different kinds, these are summed next
        results = [_whole(result) for result in results]
    return results


def _on_this_rank(arguments: list[object]) -> list[object]:
    """Return the arguments with every list of DTensors as the parts on this rank, if those lie alike in all lists."""
    lists = [value for value in arguments if _is_list_of_tensors(value) and is_dtensor(value[0])]
    for tensors in zip(*lists, strict=False):
        spread = [tensor for tensor in tensors if is_dtensor(tensor)]
        if any(is_part(tensor) or tensor.placements != spread[0].placements for tensor in spread):
            return arguments  # DTensor says what it can't do

    def part(value: object) -> object:
        if not _is_list_of_tensors(value):
            return value
        return [tensor.to_local() if is_dtensor(tensor) else tensor for tensor in value]

    return [part(value) for value in arguments]


def _unscale_by_kind(
    unscale_dtensors: Handler, operation: "OpOverload", arguments: Arguments, keywords: Keywords
) -> None:
    """Unscale gradients; found_inf is set on every rank where a DTensor's gradient overflowed on any."""
    grads, *others = arguments
    for mesh, where in _by_kind([grads]).items():
        some = [grads[place] for place in where]
        if mesh is None:
            operation(some, *others, **keywords)
        else:
            unscale_dtensors(operation, (some, *others), keywords)


def _whole(tensor: Tensor) -> Tensor:
    return full_tensor(tensor, "a norm or sum over experts")
