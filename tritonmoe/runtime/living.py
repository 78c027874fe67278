"""What lives in this process, by class or by what it holds.

gc.get_objects() would hold tuples that other threads are still filling, and Python raises SystemError in these threads.
gc.get_referrers() gives what refers to the objects that it is asked for, and nothing else.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["living", "modules_with", "refuse_what_lives"]


def refuse_what_lives(reasons: Callable[[], Iterator[str]]) -> None:
    """Raise ValueError with the first reason, if one is left when what nobody holds any more has been freed."""
    if next(reasons(), None) is None:
        return
    gc.collect()
    why = next(reasons(), None)
    if why is not None:
        raise ValueError(why)


def living(*kinds: type) -> list[Any]:
    """Return the objects of these classes and of all classes below them; a thread may not have finished one yet."""
    found, classes = set(kinds), list(kinds)
    while classes:
        below: set[type] = set(type.__subclasses__(classes.pop())) - found
        found |= below
        classes += below
    return [held for held in gc.get_referrers(*found) if type(held) in found]  # an object refers to its class


def modules_with(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """Return the modules that have one of these tensors among their own parameters."""
    tables = {id(held): held for held in gc.get_referrers(*parameters) if type(held) is dict}
    around = gc.get_referrers(*tables.values())
    attributes = [held for held in around if type(held) is dict and id(held.get("_parameters")) in tables]
    holders = {
        id(held): held for held in (*around, *gc.get_referrers(*attributes)) if issubclass(type(held), nn.Module)
    }
    return [held for held in holders.values() if id(held.__dict__.get("_parameters")) in tables]
