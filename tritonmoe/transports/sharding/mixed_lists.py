"""Lists of tensors of which some are DTensors, as optimizers and clip_grad_norm_ make them: torch's operations on each.

PyTorch refuses one `_foreach_` or `_fused_` operation on plain tensors and DTensors together, or a sum of norms of
DTensors of two meshes. A model with sharded experts and whole dense parameters has such lists everywhere.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeGuard

import torch
from torch import Tensor

from tritonmoe.transports.sharding.watched_collectives import full_tensor

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["allow_mixed_lists"]

Arguments: TypeAlias = tuple[Any, ...]
Keywords: TypeAlias = dict[str, Any]
"""What an operation is called with: tensors, lists of tensors, numbers."""
Handler: TypeAlias = "Callable[[OpOverload, Arguments, Keywords], Any]"
"""What DTensor's table holds for an operation: a function of it, its arguments and its keywords."""

WITHOUT_RULES = ("aten::_foreach_copy_", "aten::_fused_adagrad_", "aten::_fused_sgd_")
"""Operations that DTensor has no rules for. They work element by element, so that each rank runs them on its parts."""

COLLECTIVES = ("broadcast_", "allreduce_", "allreduce_coalesced_", "reduce_", "allgather_")
"""What torch.distributed's functions call with the tensors that they are given."""

_without_handler = threading.RLock()


def allow_mixed_lists() -> None:
    """Let torch's operations on lists take plain tensors and DTensors of any meshes together, from now on.

    Lists of one kind go the way they went. A sum of norms becomes a plain tensor, the norm over all ranks.
    """
    handlers = _handlers()
    aten = torch.ops.aten
    for operation in (*_operations_on_lists(), aten.stack.default):
        handlers.setdefault(operation, _run_by_kind)
    handlers.setdefault(aten._local_scalar_dense.default, _number_of)
    handlers.setdefault(aten._is_any_true.default, _is_any_true_here)
    for collective in COLLECTIVES:
        handlers.setdefault(getattr(torch.ops.c10d, collective).default, _refuse_collective)
    unscale = aten._amp_foreach_non_finite_check_and_unscale_.default
    if getattr(handlers[unscale], "func", None) is not _unscale_by_kind:
        handlers[unscale] = functools.partial(_unscale_by_kind, handlers[unscale])


def _handlers() -> "dict[OpOverload, Handler]":
    """Give DTensor's table of operations with a function of their own, which it asks before its own rules."""
    from torch.distributed.tensor import DTensor

    return DTensor._op_dispatcher._custom_op_handlers  # type: ignore[return-value]


def _operations_on_lists() -> "Iterator[OpOverload]":
    """Give every operation on lists that optimizers and clipping use; dir(torch.ops.aten) lists those called before."""
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        packet_name, _, overload = name.partition(".")
        if namespace == "aten" and packet_name.startswith(("_foreach_", "_fused_")) and "out" not in overload:
            operation = getattr(getattr(torch.ops.aten, packet_name), overload or "default")
            if any(str(argument.type) == "List[Tensor]" for argument in operation._schema.arguments):
                yield operation


def _by_kind(lists: Sequence[Sequence[Tensor]]) -> "dict[DeviceMesh | None, list[int]]":
    """Give the places of the lists by what stands there: the mesh of a DTensor, or None of plain tensors."""
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
        if all(tensor.dim() == 0 for tensor in lists[0]) and (is_mixed or any(_is_part(t) for t in lists[0])):
            return torch.stack([_whole(tensor) for tensor in lists[0]], *arguments[1:], **keywords)
        places = {None: list(range(length))}

    def at(value: object, where: list[int]) -> object:
        return [value[place] for place in where] if isinstance(value, (list, tuple)) and len(value) == length else value

    results: list[Any] = [None] * length
    returned: object = None
    handlers = _handlers()
    with _without_handler:  # in which the table sends the operation on to DTensor's rules
        own = handlers.pop(operation)
        try:
            for where in places.values():
                some = [at(value, where) for value in arguments]
                if operation._schema.name in WITHOUT_RULES:
                    some = _on_this_rank(some)
                returned = operation(*some, **{name: at(value, where) for name, value in keywords.items()})
                if isinstance(returned, (list, tuple)) and is_mixed:
                    for place, result in zip(where, returned, strict=True):
                        results[place] = result
        finally:
            handlers[operation] = own
    if not is_mixed or returned is None:
        return returned
    if operation._schema.name == "aten::_foreach_norm":  # of different kinds, these are summed next
        results = [_whole(result) for result in results]
    return results


def _on_this_rank(arguments: list[object]) -> list[object]:
    """Give the arguments with every list of DTensors as the parts on this rank, if those lie alike in all lists."""
    lists = [value for value in arguments if _is_list_of_tensors(value) and _is_dtensor(value[0])]
    for tensors in zip(*lists, strict=False):
        spread = [tensor for tensor in tensors if _is_dtensor(tensor)]
        if any(_is_part(tensor) or tensor.placements != spread[0].placements for tensor in spread):
            return arguments  # DTensor says what it can't do

    def part(value: object) -> object:
        if not _is_list_of_tensors(value):
            return value
        return [tensor.to_local() if _is_dtensor(tensor) else tensor for tensor in value]

    return [part(value) for value in arguments]


def _is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "placements")


def _is_part(tensor: Tensor) -> bool:
    """Say whether it is a DTensor of which each rank has a part that is still to be summed with the others'."""
    if not _is_dtensor(tensor):
        return False
    mesh = tensor.device_mesh
    return any(placement.is_partial() and mesh.size(dim) > 1 for dim, placement in enumerate(tensor.placements))


def _number_of(operation: "OpOverload", arguments: Arguments, keywords: Keywords) -> object:
    """Give what .item() gives; refuse it where PyTorch would give this rank's part of a sum as if it were the sum."""
    (tensor,) = arguments
    if _is_part(tensor):
        raise ValueError(
            "this number is a sum or norm over experts that are spread over ranks, and .item(), float() and bool() "
            "would give this rank's part of it: call tensor.full_tensor().item(), on every rank"
        )
    return operation(tensor.to_local(), **keywords)


def _is_any_true_here(operation: "OpOverload", arguments: Arguments, keywords: Keywords) -> Tensor:
    """Ask this rank's part alone: so torch.autograd.detect_anomaly looks for NaN, which one rank may do by itself."""
    return operation(arguments[0].to_local(), **keywords)


def _refuse_collective(operation: "OpOverload", *_: object) -> NoReturn:
    name = operation._schema.name.removeprefix("c10d::").rstrip("_")
    raise ValueError(
        f"torch.distributed's {name} got a DTensor, of which every "
        "rank holds another part, as of experts that are spread over ranks; it would mix these parts: leave out the "
        "parameters that tritonmoe.expert_parameters(module) gives (ZeroRedundancyOptimizer and averages of models do "
        "such things to all that they get: give the experts an optimizer of their own)"
    )


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
