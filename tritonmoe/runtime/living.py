"""What lives in this process, by class or by what it holds.

gc.get_objects() would hold tuples that other threads are still filling, and Python raises SystemError in these threads.
gc.get_referrers() gives what refers to the objects that it is asked for, and nothing else.
"""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn, strided

__all__ = ["live_instances", "modules_with", "owners_of_memory", "refuse_what_lives"]

_collecting = threading.Lock()
"""gc.collect() returns at once where another thread, as an emulated rank is, is in the middle of one."""


def refuse_what_lives(reasons: Callable[[], Iterator[str]]) -> None:
    """Raise ValueError with the first reason, if one is left when what nobody holds any more has been freed."""
    if next(reasons(), None) is None:
        return
    with _collecting:
        gc.collect()
    why = next(reasons(), None)
    if why is not None:
        raise ValueError(why)


def live_instances(*kinds: type) -> list[Any]:
    """Return the objects of these classes and of all classes below them; a thread may not have finished one yet."""
    found, classes = set(kinds), list(kinds)
    while classes:
        below: set[type] = set(type.__subclasses__(classes.pop())) - found
        found |= below
        classes += below
    return [held for held in gc.get_referrers(*found) if type(held) in found]  # an object refers to its class


def modules_with(tensors: Sequence[Tensor]) -> list[nn.Module]:
    """Return the modules that have one of these tensors among their own parameters or buffers."""
    tables = {id(held): held for held in gc.get_referrers(*tensors) if type(held) is dict}
    around = gc.get_referrers(*tables.values())
    attributes = [held for held in around if type(held) is dict and _has_one(held, tables)]
    holders = {
        id(held): held for held in (*around, *gc.get_referrers(*attributes)) if issubclass(type(held), nn.Module)
    }
    return [held for held in holders.values() if _has_one(held.__dict__, tables)]


def _has_one(attributes: dict[str, Any], tables: dict[int, Any]) -> bool:
    return any(id(attributes.get(name)) in tables for name in ("_parameters", "_buffers"))


def owners_of_memory(tensors: Sequence[Tensor], known: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield every module with a parameter or buffer in the memory of one of these tensors, its name, and the tensor.

    The modules that have the tensors themselves are among them; of DTensors, it is the memory of this rank. Where no
    other than the `known` modules has them, which is found out first, two looks at all that lives are enough of five.
    """
    if not tensors:
        return
    spans: dict[int, list[tuple[int, int, Tensor]]] = {}
    for tensor in tensors:
        if (memory := _memory(tensor)) is not None:
            spans.setdefault(memory[0], []).append((*memory[1:], tensor))

    def sharing(held: Tensor) -> Iterator[Tensor]:
        storage, begin, end = _memory(held) or (0, 0, 0)
        if storage not in spans:  # on the meta device, too
            yield from (tensor for tensor in tensors if tensor is held)
        yield from (tensor for first, last, tensor in spans.get(storage, ()) if first < end and begin < last)

    own = {id(one) for tensor in tensors for one in (tensor, getattr(tensor, "_local_tensor", tensor))}
    others = [held for held in live_instances(Tensor) if id(held) not in own and any(True for _ in sharing(held))]
    tables = {id(table) for module in known for table in _tables(module)}
    is_known = not others and all(id(held) in tables for held in gc.get_referrers(*tensors) if type(held) is dict)
    for module in known if is_known else modules_with([*tensors, *others]):
        for name, held in [item for table in _tables(module) for item in list(table.items())]:
            if held is not None:
                yield from ((module, name, tensor) for tensor in sharing(held))


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    return [module.__dict__.get(kind, {}) for kind in ("_parameters", "_buffers")]  # it may be half made


def _memory(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return the address of a tensor's storage, and the first and last of its own; None where it has no memory."""
    local = getattr(tensor, "_local_tensor", tensor)
    if type(local) not in (Tensor, nn.Parameter) or local.layout != strided or not local.numel():
        return None
    try:
        storage, begin = local.untyped_storage().data_ptr(), local.data_ptr()
    except RuntimeError:  # a tensor that a compiler or a transform has traced with, which says so in no other way
        return None
    length = 1 + sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    return (storage, begin, begin + length * local.itemsize) if storage else None
