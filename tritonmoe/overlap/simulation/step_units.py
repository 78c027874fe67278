"""step_units(): how many units of its kind a step has, on one rank or on all."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import Tensor
from typing_extensions import NamedTuple  # typing's is not generic before Python 3.11

from tritonmoe.overlap.simulation.copy_work import part_share
from tritonmoe.overlap.steps import Step, Unit

__all__ = ["CopyUnits", "step_units"]

Size = TypeVar("Size", float, Tensor)


class CopyUnits(NamedTuple, Generic[Size]):
    """What a rank has to do with copies of experts."""

    pairs: Sequence[Size]
    """How many of its pairs belong to copies, by segment."""
    sent: Size
    """How many copies it sends."""
    gradient_bytes: tuple[int, int]
    """As in CopyWork."""


def step_units(
    step: Step,
    num_local_slices: int,
    sent: Sequence[Size],
    returned: Sequence[Size],
    pairs: Sequence[Size],
    *,
    copies: CopyUnits[Size] | None = None,
) -> Size:
    """Return how many of its kind's units (Unit) a step has.

    Args:
        num_local_slices: how many of the segments are local ones.
        sent, returned, pairs: how many rows are sent, how many return, and how many pairs there are, by segment.
    """
    unit = step.kind.unit
    of = pairs if unit is Unit.PAIRS else sent if unit is Unit.SENT_ROWS else returned
    if unit in (Unit.COPY_PAIRS, Unit.COPIES):
        if copies is None:
            return pairs[0] * 0
        share = part_share(step, copies.gradient_bytes)
        if unit is Unit.COPIES:
            return copies.sent * share
        of = [size * share for size in copies.pairs]
    elif copies is not None and step.kind.copy_kind is not None:
        of = [size - of_copies for size, of_copies in zip(pairs, copies.pairs, strict=True)]
    segment = step.segment(num_local_slices)
    if segment is not None:
        return of[segment]
    total = of[0]
    for size in of[1:]:
        total = total + size
    return total
