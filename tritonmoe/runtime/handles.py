"""Objects as tensors, for operators: a compiled graph takes, saves and frees tensors only.

A handle is an int64 on the CPU that numbers an object. Numbers start anywhere and are never used twice: a handle that
outlived its object, or was stored and loaded in another process, names nothing.
"""

import itertools
import os
import sys
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["Handled", "find", "hold"]

_numbers = itertools.count(int.from_bytes(os.urandom(7), sys.byteorder))
_objects: "weakref.WeakValueDictionary[int, Handled | _Memory]" = weakref.WeakValueDictionary()


class Handled:
    """A class whose objects have a handle, which does not keep them alive; a copy of one has another."""

    handle: Tensor
    """() int64; find() gives the object."""

    def __new__(cls, *_: object, **__: object) -> "Handled":
        self = super().__new__(cls)
        number = next(_numbers)
        _objects[number] = self
        with torch.inference_mode(False):  # graphs write to it, inside and outside of that mode
            self.handle = torch.tensor(number, device="cpu")
        return self

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}


class _Memory(bytearray):
    """The memory of one tensor, which keeps a value for as long as that tensor's storage lives."""

    value: object


def hold(value: object) -> Tensor:
    """Return a handle (1,) that keeps `value` alive until the last tensor of this storage is gone."""
    number = next(_numbers)
    memory = _Memory(number.to_bytes(8, sys.byteorder))
    memory.value = value
    _objects[number] = memory
    return torch.frombuffer(memory, dtype=torch.int64)


def find(handle: Tensor) -> Any:
    """Return the object of a handle.

    Raises:
        RuntimeError: it is gone.
    """
    found = _objects.get(int(handle))
    if found is None:
        raise RuntimeError(
            "a compiled graph uses a transport, a layer or a forward that no longer exists: keep the layer as long "
            "as the code compiled from it, compile again in every process, and use no saved-tensor hooks that copy "
            "what they pack"
        )
    return found.value if isinstance(found, _Memory) else found
