"""MeasuredCosts: what calls of one kind have taken on this rank, and what all ranks agree that the next one will take.

Numbers travel as integers, so that all ranks plan the same copies from them.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tritonmoe.dispatch.copy_planner import CopyCosts
from tritonmoe.overlap.report import LayerReport, PassReport
from tritonmoe.overlap.steps import StepKind, Way

__all__ = ["MeasuredCosts", "Numbers", "agreed_costs"]

KEPT_CALLS = 8
"""So many of the last calls count."""
LEAST_CALLS = 2
"""So many calls must have been measured on every rank."""
PLANNING_FS = 10**12
"""What a call takes longer for being planned again, until that is measured: 1 ms."""
BACKWARD_KINDS = (StepKind.EXPERTS_BACKWARD, StepKind.WEIGHT_GRAD, StepKind.COPY_WEIGHT_GRAD)


class Numbers(NamedTuple):
    """What one rank tells the others of its last calls. Zeros where it has not measured enough."""

    pairs: int = 0
    """Which its experts have computed."""
    forward_fs: int = 0
    """How long that took."""
    backward_pairs: int = 0
    backward_fs: int = 0
    byte_fs: int = 0
    """For how long a byte occupied the busiest port."""
    planning_fs: int = 0
    """How long the second half of an agreement took, after which there were copies."""


class _Call(NamedTuple):
    """One call that is over."""

    pairs: int
    forward_fs: int
    backward_fs: int
    """0 without a backward."""
    byte_fs: int
    """0 where no bytes travelled."""


class MeasuredCosts:
    """The last calls of one kind on this rank."""

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque(maxlen=KEPT_CALLS)
        self._unread: deque[tuple[LayerReport, bool]] = deque(maxlen=KEPT_CALLS)
        """Reports of calls that may not be over, and whether they have a backward."""
        self._planning_fs: deque[int] = deque(maxlen=KEPT_CALLS)

    def observe(self, report: LayerReport, has_backward: bool, planning_s: float | None) -> None:
        """Take in a call; planning_s: how long it took to plan its copies, None where it has none."""
        self._unread.append((report, has_backward))
        if planning_s is not None:
            self._planning_fs.append(int(planning_s * 1e15))

    def numbers(self) -> Numbers:
        """Return what the other ranks are told before the next call."""
        if torch.are_deterministic_algorithms_enabled():
            return Numbers()
        for report, has_backward in list(self._unread):
            if not report.forward.is_over or (
                has_backward and (report.backward is None or not report.backward.is_over)
            ):
                continue
            self._unread.remove((report, has_backward))
            self._calls.append(_read(report))
        if len(self._calls) < LEAST_CALLS:
            return Numbers()
        byte_fs = [call.byte_fs for call in self._calls if call.byte_fs]
        with_backward = [call for call in self._calls if call.backward_fs]
        return Numbers(
            sum(call.pairs for call in self._calls),
            sum(call.forward_fs for call in self._calls),
            sum(call.pairs for call in with_backward),
            sum(call.backward_fs for call in with_backward),
            min(byte_fs, default=0),
            min(self._planning_fs, default=PLANNING_FS),
        )


def agreed_costs(
    numbers: Sequence[Numbers],
    *,
    has_backward: bool,
    row_bytes: tuple[int, int],
    expert_bytes: int,
    gradient_bytes: int,
) -> CopyCosts | None:
    """Return what all ranks take for the costs of the next call; None where some rank has not measured enough.

    Args:
        row_bytes: of a row in the forward's dispatch, and in other exchanges. The others: as in CopyCosts.
    """
    if not all(of.planning_fs for of in numbers):
        return None
    pairs, backward_pairs = sum(of.pairs for of in numbers), sum(of.backward_pairs for of in numbers)
    byte_fs = max(of.byte_fs for of in numbers)
    if not pairs or not byte_fs or (has_backward and not backward_pairs):
        return None
    return CopyCosts(
        forward_fs=sum(of.forward_fs for of in numbers) // pairs,
        backward_fs=sum(of.backward_fs for of in numbers) // backward_pairs if has_backward else 0,
        byte_fs=byte_fs,
        call_fs=max(of.planning_fs for of in numbers),
        row_bytes=row_bytes[0],
        other_row_bytes=row_bytes[1],
        expert_bytes=expert_bytes,
        gradient_bytes=gradient_bytes,
    )


def _read(report: LayerReport) -> _Call:
    backward = report.backward
    return _Call(
        report.pair_offsets[-1],
        _femtoseconds(report.forward.lane_s(StepKind.EXPERTS)),
        0 if backward is None else _femtoseconds(backward.lane_s(*BACKWARD_KINDS)),
        _byte_fs(report, report.forward),
    )


def _byte_fs(report: LayerReport, forward: PassReport) -> int:
    """Return the time from the first dispatch to the end of the last one, by the bytes on the busiest port."""
    rows = report.traffic_rows - torch.diag(report.traffic_rows.diagonal())
    num_bytes = int(torch.maximum(rows.sum(0), rows.sum(1)).max()) * report.row_bytes
    timings = [timing for timing in forward.steps if timing.step.kind.way in (Way.TO_EXPERTS, Way.TO_COPIES)]
    dispatches = [timing for timing in timings if timing.step.kind is StepKind.DISPATCH]
    if report.copies is not None:
        num_bytes += report.copies.most_on_a_port * report.copied_bytes
    if not num_bytes or not dispatches:
        return 0
    began = min(timing.start_s + timing.post_s for timing in dispatches)
    over = max(timing.end_s for timing in timings)
    return _femtoseconds(over - began) // num_bytes


def _femtoseconds(seconds: float) -> int:
    return max(1, int(seconds * 1e15))
