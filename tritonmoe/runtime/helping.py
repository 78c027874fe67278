"""Forwards that a rank runs for others alone, whose experts it holds: nothing that counts tokens counts theirs."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["helping", "is_helping"]

_is_helping = False


@contextmanager
def helping() -> Iterator[None]:
    """Say that the forwards inside serve other ranks, and that nobody here asked for their results."""
    global _is_helping
    before, _is_helping = _is_helping, True
    try:
        yield
    finally:
        _is_helping = before


def is_helping() -> bool:
    """Say whether this forward serves other ranks alone. Things that count or record tokens ask here."""
    return _is_helping
