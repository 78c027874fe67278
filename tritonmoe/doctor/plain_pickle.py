"""read_plain_pickle: a pickle of unknown origin as plain data; nothing in it is ever imported or called."""

import io
import pickle
from typing import NoReturn

__all__ = ["read_plain_pickle"]


class _PlainData(pickle.Unpickler):
    """Builds numbers, texts, lists, tuples, sets and dicts."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"it names {module[:60]}.{name[:60]}, and only plain data is read")

    def persistent_load(self, pid: object) -> NoReturn:
        raise ValueError("the pickle refers to an object outside of the file, and only plain data is read")


def read_plain_pickle(content: bytes) -> object:
    """Return what a pickle holds.

    Raises:
        ValueError: it is damaged, or holds anything but plain data.
    """
    try:
        return _PlainData(io.BytesIO(content)).load()
    except ValueError:
        raise
    except Exception as error:  # what a damaged pickle raises may be any of a dozen types
        raise ValueError(f"its pickle is damaged: {type(error).__name__}: {str(error)[:80]}") from None
    except (MemoryError, RecursionError):
        raise ValueError("its pickle is damaged: it asks for more memory than there is") from None
