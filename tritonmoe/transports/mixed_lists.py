"""Lists of tensors of which some are DTensors, as optimizers and clip_grad_norm_ make them: torch's operations on each.

PyTorch refuses one `_foreach_` or `_fused_` operation on plain tensors and DTensors together, or a sum of norms of
DTensors of two meshes. A model with sharded experts and whole dense parameters has such lists everywhere.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["allow_mixed_lists"]

_without_handler = threading.RLock()


def allow_mixed_lists() -> None:
    """Let torch's operations on lists take plain tensors and DTensors of any meshes together, from now on.

    Lists of one kind go the way they went. A sum of norms becomes a plain tensor, the norm over all ranks.
    """
    handlers = _handlers()
    aten = torch.ops.aten
    names = [name for name in dir(aten) if name.startswith(("_foreach_", "_fused_"))]
    operations = [getattr(packet, overload) for packet in (getattr(aten, n) for n in names) for overload in _of(packet)]
    for operation in (*operations, aten.stack.default):
        handlers.setdefault(operation, _run_by_kind)
    unscale = aten._amp_foreach_non_finite_check_and_unscale_.default
    if getattr(handlers[unscale], "func", None) is not _unscale_by_kind:
        handlers[unscale] = functools.partial(_unscale_by_kind, handlers[unscale])


def _handlers() -> dict[Any, Callable]:
    """Give DTensor's table of operations with a function of their own, which it asks before its own rules."""
    from torch.distributed.tensor import DTensor

    dispatcher: Any = DTensor._op_dispatcher
    return dispatcher._custom_op_handlers


def _of(packet: Any) -> list[str]:
    return [overload for overload in packet.overloads() if "out" not in overload]


def _by_kind(lists: Sequence[Sequence[Tensor]]) -> dict[Any, list[int]]:
    """Give the places of the lists by what stands there: the mesh of a DTensor, or None of plain tensors."""
    places: dict[Any, list[int]] = {}
    for place, tensors in enumerate(zip(*lists, strict=True)):
        mesh = next((m for t in tensors if (m := getattr(t, "device_mesh", None)) is not None), None)
        places.setdefault(mesh, []).append(place)
    return places


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor)


def _run_by_kind(operation: Any, arguments: tuple, keywords: dict[str, Any]) -> Any:
    """Run an operation once for each kind of tensor in its lists, and put the results where its operands stood."""
    lists = [value for value in (*arguments, *keywords.values()) if _is_list_of_tensors(value)]
    length = len(lists[0])
    places = _by_kind([tensors for tensors in lists if len(tensors) == length])
    is_mixed = len(places) > 1
    if operation is torch.ops.aten.stack.default:
        if is_mixed and all(tensor.dim() == 0 for tensor in lists[0]):
            return torch.stack([_whole(tensor) for tensor in lists[0]], *arguments[1:], **keywords)
        places = {None: list(range(length))}

    def at(value: Any, where: list[int]) -> Any:
        return [value[place] for place in where] if isinstance(value, (list, tuple)) and len(value) == length else value

    results: list[Any] = [None] * length
    returned: Any = None
    handlers = _handlers()
    with _without_handler:  # in which the table sends the operation on to DTensor's rules
        own = handlers.pop(operation)
        try:
            for where in places.values():
                returned = operation(
                    *(at(value, where) for value in arguments),
                    **{name: at(value, where) for name, value in keywords.items()},
                )
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


def _unscale_by_kind(unscale_dtensors: Callable, operation: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
    """Unscale gradients; found_inf is set on every rank where a DTensor's gradient overflowed on any."""
    grads, *others = arguments
    for mesh, where in _by_kind([grads]).items():
        some = [grads[place] for place in where]
        if mesh is None:
            operation(some, *others, **keywords)
        else:
            unscale_dtensors(operation, (some, *others), keywords)


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
