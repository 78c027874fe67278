"""ReadingAhead: in which order a pass uses experts that stay in a file, said as it begins, and how long it takes."""

import time
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import Literal

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.ops.grouping import GroupingBlock
from tritonmoe.runtime.cpu_threads import num_workers
from tritonmoe.runtime.streamed import (
    ExpertReader,
    PassLoads,
    StreamedWeight,
    Unit,
    find_streamed,
    known_weights,
    waited,
)

__all__ = ["ReadingAhead", "begin_reading", "has_streamed"]

Side = Literal["up", "down"]
Streamed = list[tuple[StreamedWeight, int]]
"""Weights, and the first of their experts that the pass has."""


def has_streamed(weights: PerWeight[Tensor]) -> bool:
    """Return whether a weight of a call stays in a file."""
    return bool(known_weights) and any(_streamed(weights, side) for side in ("up", "down"))


def _streamed(weights: PerWeight[Tensor], side: Side) -> Streamed:
    own = (weights.gate_up_proj, weights.gate_up_scales) if side == "up" else (weights.down_proj, weights.down_scales)
    found = (None if tensor is None else find_streamed(tensor) for tensor in own)
    return [one for one in found if one is not None]


class ReadingAhead:
    """One pass over experts that are in a file, as a context in which its time counts."""

    def __init__(self, reader: ExpertReader, expert_bytes: int) -> None:
        """expert_bytes: of the experts that the pass uses, each once."""
        self._figures = reader.figures
        self._figures.num_passes += 1
        self._wait_s, self._expert_bytes, self._read_before = 0.0, expert_bytes, self._figures.num_bytes

    def __enter__(self) -> None:
        self._entered_at, self._waited_before_s = time.perf_counter(), self._figures.wait_s

    def __exit__(self, *_: object) -> None:
        self._figures.pass_s += time.perf_counter() - self._entered_at
        wait_s = max(0.0, self._figures.wait_s - self._waited_before_s)  # reset() may have been called since
        self._wait_s += wait_s
        waited.seconds += wait_s

    @property
    def loads(self) -> PassLoads:
        """What the pass has read so far."""
        return PassLoads(self._wait_s, max(0, self._figures.num_bytes - self._read_before), self._expert_bytes)


def begin_reading(
    weights: PerWeight[Tensor], chunks: Iterable[Sequence[GroupingBlock]], sides: Sequence[Side]
) -> ReadingAhead | None:
    """Note in which order a pass uses experts, where they are in a file, else return None.

    Args:
        chunks: the blocks of each chunk, in the order in which they are computed.
        sides: of a block's products, in their order.
    """
    by_side = {side: _streamed(weights, side) for side in dict.fromkeys(sides)}
    reader = next((weight.reader for found in by_side.values() for weight, _ in found), None)
    if reader is None:
        return None
    at_a_time = num_workers(torch.device("cpu"))
    uses: list[Unit] = []
    for blocks in chunks:
        orders = [_uses(block, [by_side[side] for side in sides]) for block in blocks]
        for first in range(0, len(orders), at_a_time):  # workers take one block each
            together = zip_longest(*orders[first : first + at_a_time])
            uses += [unit for unit in chain.from_iterable(together) if unit is not None]
    key = (*(weight for found in by_side.values() for weight, _ in found), *sides)
    reading = ReadingAhead(reader, sum(unit.weight.expert_bytes for unit in set(uses)))
    reader.expect(key, uses)
    return reading


def _uses(block: GroupingBlock, of_products: Iterable[Streamed]) -> list[Unit]:
    experts = [block.experts.start + expert for expert in block.grouping.host_counts[0]]
    return [
        Unit(weight, first + expert) for streamed in of_products for expert in experts for weight, first in streamed
    ]
