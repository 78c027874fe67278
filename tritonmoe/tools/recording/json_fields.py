"""Fields: an object of JSON whose values are checked where they are taken; errors name the place and the key."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from tritonmoe.config.numbers import is_integer, is_number
from tritonmoe.runtime.files import Json

__all__ = [
    "MOST",
    "Fields",
    "amount",
    "count",
    "counts_of",
    "flag",
    "integer",
    "list_of",
    "number",
    "optional",
    "text",
    "tuple_of",
]

MOST = 1 << 53
"""No count and no moment is larger than the integers that a float holds exactly."""
Value = TypeVar("Value")


class Fields:
    """An object of JSON whose values are checked where they are taken; errors name the place and the key."""

    def __init__(self, values: object, where: str) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise ValueError(f"{where} must be an object, got {type(values).__name__}")
        self.values: Json = values

    def take(self, key: str, convert: Callable[[object], Value]) -> Value:
        """Return a value as `convert` makes it, which raises ValueError or TypeError for one that doesn't fit."""
        if key not in self.values:
            raise ValueError(f"{self.where}: {key} is missing")
        try:
            return convert(self.values[key])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.where}: {key}: {error}") from error

    def inside(self, key: str) -> "Fields":
        return self.take(key, lambda value: Fields(value, f"{self.where}: {key}"))


def integer(value: object) -> int:
    if not is_integer(value) or abs(value) > MOST:
        raise ValueError(f"must be a whole number, got {value!r}")
    return value


def count(value: object) -> int:
    found = integer(value)
    if found < 0:
        raise ValueError(f"must not be negative, got {value!r}")
    return found


def number(value: object) -> float:
    if not is_number(value) or abs(value) > MOST:  # type: ignore[arg-type]  # is_number knows it
        raise ValueError(f"must be a finite number, got {value!r}")
    return float(value)  # type: ignore[arg-type]  # as above


def amount(value: object) -> float:
    found = number(value)
    if found < 0:
        raise ValueError(f"must not be negative, got {value!r}")
    return found


def text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"must be words that can be printed, got {value!r}")
    return value


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


def optional(convert: Callable[[object], Value]) -> Callable[[object], Value | None]:
    return lambda value: None if value is None else convert(value)


def tuple_of(convert: Callable[[object], Value], length: int | None = None) -> Callable[[object], tuple[Value, ...]]:
    def converted(values: object) -> tuple[Value, ...]:
        return tuple(map(convert, list_of(values, length)))

    return converted


def list_of(values: object, length: int | None) -> list:
    if not isinstance(values, list) or length not in (None, len(values)):
        raise ValueError(f"must be a list{'' if length is None else f' of {length}'}, got {str(values)[:60]}")
    return values


def counts_of(length: int | None = None) -> Callable[[object], Sequence[int]]:
    """Return tuple_of(count, length), which looks at all numbers at once where nothing is wrong with them."""

    def converted(values: object) -> Sequence[int]:
        found = list_of(values, length)
        if set(map(type, found)) == {int} and min(found) >= 0 and max(found) <= MOST:
            return found
        return tuple(map(count, found))

    return converted
