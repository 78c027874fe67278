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

import torch

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.experts.tensors import NAMES, OPTIONAL

__all__ = [
    "NO_SETTINGS",
    "PLAN_NAMES",
    "CallSettings",
    "call_settings",
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


@lru_cache(maxsize=1024)
def call_settings(
    experts: tuple[tuple[str, object], ...],
    placement: ExpertPlacement | None,
    expert_gradients: str,
    dtype: torch.dtype,
    given: tuple[str, ...],
    adapter_ranks: tuple[int, ...],
    kinds: tuple[str, ...],
    overlap: OverlapPlan,
) -> CallSettings:
    """Return these as settings; kept by their values, which most calls of a layer share."""
    named: dict[str, object] = {
        "dtype": dtype,
        "placement": "contiguous" if placement is None else placement.experts_of_rank,
    }
    named |= dict(experts)
    if placement is None or not placement.has_replicas:
        del named["transposed"]  # gradients of replicas are summed as they lie in memory; to others it is all one
    named |= {"expert_gradients": expert_gradients}
    for name, rank in zip(("gate_up_rank", "down_rank"), adapter_ranks, strict=True):
        named[name] = rank or "no adapter"
    named |= {"copies": "none", "plan_kinds": ", ".join(kinds)}
    named |= {name: "a tensor" if name in given else "none" for name in NAMES if name in OPTIONAL}
    return CallSettings((*named.items(), *plan_settings(overlap)))


def in_millionths(capacity: float) -> int:
    """Return a capacity as ranks compare it."""
    return round(1e6 * capacity)
