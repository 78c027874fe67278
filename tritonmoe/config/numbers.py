"""What a setting may be: integers, finite numbers, and flags that are True or False."""

import sys
from typing import TypeGuard

__all__ = ["check_flags", "is_integer", "is_number"]

LARGEST = sys.float_info.max


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether this is an int; True and False are none here."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether this is a float, or an int that a float can hold, and finite.

    torch.compile can't trace math.isfinite.
    """
    return (is_integer(value) or isinstance(value, float)) and abs(value) <= LARGEST


def check_flags(settings: object, *names: str) -> None:
    """Raise TypeError unless each of these fields is True or False."""
    for name in names:
        if not isinstance(getattr(settings, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(settings, name)!r}")
