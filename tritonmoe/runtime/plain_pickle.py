"""Pickles of unknown origin, read as plain data: nothing in them is imported, called, or built that the file hasn't.

Python's own readers run what a pickle names. Without that they can still be made to take all memory (an index, or the
length of a buffer, is a number in the file) or all time (a tuple that holds another twice, 60 deep, as a key).
"""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from tritonmoe.runtime.files import check_plain, num_elements, read_bytes

__all__ = ["load_tensors", "read_plain_pickle"]

MAX_TENSORS_BYTES = 4 << 30
"""A file of tensors: as many bytes are the ids of 9 million tokens in 60 layers with K = 8."""
KEYS = (str, int, float, bool, bytes, type(None))
REBUILD = "torch._utils", ("_rebuild_tensor_v2", "_rebuild_tensor_v3")
_InPython: Any = pickle._Unpickler  # whose table of codes can be changed


class _PlainData(_InPython):
    """Builds numbers, texts, lists, tuples and dicts whose keys are numbers and texts."""

    dispatch: ClassVar[dict[int, Callable]] = dict(_InPython.dispatch)
    for _code in (
        *(pickle.BYTEARRAY8, pickle.FROZENSET, pickle.ADDITEMS, pickle.EXT1, pickle.EXT2, pickle.EXT4),
        *(pickle.BUILD, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX),
    ):
        del dispatch[_code[0]]

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it names {module[:60]}.{name[:60]}, and only plain data is read")

    def persistent_load(self, pid: object) -> Any:
        raise ValueError("the pickle refers to an object outside of the file, and only plain data is read")

    def _set(self, items: list) -> None:
        place = self.stack[-1]
        if type(place) is not dict or len(items) % 2:
            raise ValueError("it sets keys of something that is no dict")
        for key in items[::2]:
            if not isinstance(key, KEYS):
                raise ValueError(f"it has a {type(key).__name__} as a key")
        place.update(zip(items[::2], items[1::2], strict=True))

    def _set_one(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set(items)

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _new_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    dispatch |= {pickle.SETITEM[0]: _set_one, pickle.SETITEMS[0]: _set_items, pickle.DICT[0]: _new_dict}


class _Tensors(_PlainData):
    """Reads what torch.save wrote as plain data: a tensor is how many numbers it has, and nothing of it is built."""

    num_numbers = 0
    """Numbers of all tensors together."""

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if module == REBUILD[0] and name in REBUILD[1]:
            return self._tensor
        if module == "torch" and (name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)):
            return _nothing
        if (module, name) in (("torch.storage", "UntypedStorage"), ("collections", "OrderedDict")):
            return _nothing
        return super().find_class(module, name)

    def persistent_load(self, pid: object) -> None:
        """Read nothing: how many bytes a storage has is compared by torch.load."""

    def _tensor(self, storage: object, offset: object, size: object, *others: object) -> None:
        number = 1 if size == () else num_elements(size)
        if number is None:
            raise ValueError("a tensor has an impossible shape")
        self.num_numbers += number


def _nothing(*_: object) -> None:
    """Stand for what is called or named in a file of tensors."""


def read_plain_pickle(content: bytes) -> object:
    """Return what a pickle holds: data that `check_plain` has looked at.

    Raises:
        ValueError: it is damaged, or holds anything but plain data.
    """
    found = _loaded(_PlainData(io.BytesIO(content)))
    check_plain(found, "its pickle")
    return found


def _loaded(unpickler: _PlainData) -> object:
    try:
        return unpickler.load()
    except ValueError:
        raise
    except Exception as error:  # what a damaged pickle raises may be any of a dozen types
        raise ValueError(f"its pickle is damaged: {type(error).__name__}: {str(error)[:80]}") from None
    except (MemoryError, RecursionError):
        raise ValueError("its pickle is damaged: it asks for more memory than there is") from None


def load_tensors(path: Path) -> object:
    """Return what torch.save wrote, on the CPU: plain data and tensors, together no larger than the file.

    A tensor can show one stored number as often as its shape says, with strides of 0. So the shapes are added up
    before anything is built.

    Raises:
        ValueError: it is no such file, it is damaged, or holds other objects. OSError: it can't be read.
    """
    saved = read_bytes(path, MAX_TENSORS_BYTES, "save fewer calls or tokens in a file")
    size = len(saved)
    try:
        with zipfile.ZipFile(io.BytesIO(saved)) as archive:  # torch.load doesn't compare the sums that it finds
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > size or any(part.compress_type for part in parts):
                raise ValueError("its parts are larger than the file, as torch.save never leaves them")
            if damaged := archive.testzip():
                raise ValueError(f"the sum of {damaged} is another one")
            described = _Tensors(io.BytesIO(archive.read(next(one for one in parts if _is_data(one.filename)))))
            check_plain(_loaded(described), "its pickle")
        if described.num_numbers > size:
            raise ValueError(f"its tensors show {described.num_numbers} numbers, and the file has {size} bytes")
        return torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged bytes zipfile and torch.load may raise anything
        raise ValueError(
            f"{path} is damaged, or torch.save didn't write it: {type(error).__name__}: {error}"
        ) from error


def _is_data(name: str) -> bool:
    return name.count("/") == 1 and name.endswith("/data.pkl")
