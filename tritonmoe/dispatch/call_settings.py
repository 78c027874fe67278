"""CallSettings: what is configured of a layer call and must be the same on all ranks, which send one number for it.

Where the numbers differ every rank sees that they do, and only then the ranks send each other the names and the values,
in the words that a user reads.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache

from tritonmoe.config.overlap import OverlapPlan

__all__ = [
    "NO_SETTINGS",
    "PLAN_NAMES",
    "CallSettings",
    "decode_settings",
    "in_millionths",
    "plan_settings",
    "with_setting",
]

PLAN_NAMES = ("num_chunks", *(field.name for field in fields(OverlapPlan)))
"""What a plan is made of."""
LONGEST_WORDS = 160
"""Longer values are cut, and a checksum tells them apart."""


class CallSettings:
    """Names and values. In a header they stand as one integer of 63 bits."""

    def __init__(self, named: Iterable[tuple[str, object]]) -> None:
        self.words = {name: _short(str(value)) for name, value in named}
        """The values as a user reads them, by name."""
        self.text = json.dumps(self.words).encode()
        """What travels where ranks have different numbers."""
        self._digest = int.from_bytes(hashlib.blake2b(self.text, digest_size=8).digest(), "little") >> 1

    def __index__(self) -> int:
        return self._digest


@lru_cache(maxsize=1024)
def with_setting(settings: CallSettings, name: str, value: str) -> CallSettings:
    """Return the settings with another value of this name."""
    return CallSettings((settings.words | {name: value}).items())


NO_SETTINGS = CallSettings(())
"""Of a call of which nothing is known, or nothing has to be compared."""


def _short(words: str) -> str:
    if len(words) <= LONGEST_WORDS:
        return words
    return f"{words[:LONGEST_WORDS]}... (checksum {zlib.crc32(words.encode()):08x})"


def decode_settings(text: bytes) -> Mapping[str, str] | None:
    """Return the words of the settings of which this is the text; None where the text was damaged on its way."""
    try:
        words = json.loads(text)
    except ValueError:
        return None
    return words if isinstance(words, dict) else None


@lru_cache(maxsize=1024)
def plan_settings(overlap: OverlapPlan) -> tuple[tuple[str, object], ...]:
    """Return the names and values of a plan."""
    values = {name: getattr(overlap, name) for name in PLAN_NAMES}
    if overlap.capacity is not None:
        values["capacity"] = in_millionths(overlap.capacity) / 1e6
    return tuple(values.items())


def in_millionths(capacity: float) -> int:
    """Return a capacity as ranks compare it."""
    return round(1e6 * capacity)
