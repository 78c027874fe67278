"""MeasuredCosts: what calls of one kind have taken on this rank, and what all ranks agree that the next one will take.

Numbers travel as integers, so that all ranks plan the same copies from them.
"""

import statistics
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.expert_parallel.plans.copies.copy_planner import CopyCosts
from tritonmoe.overlap.report import LayerReport, PassReport
from tritonmoe.overlap.steps import StepKind

__all__ = ["MeasuredCosts", "Numbers", "agreed_costs"]

KEPT_CALLS = 8
"""So many of the last calls count."""
LEAST_CALLS = 2
"""So many calls must have been measured on every rank."""
WATCHED_CALLS = 128
"""Of so many calls the end is waited for: models have fewer layers with experts than that, all of which run forward
before the first one runs backward."""
JUDGED_CALLS = {True: 5, False: 2}
"""So many calls with copies, and without, are needed to judge by what they took."""
RETRIED_SHARE = 50
"""What calls with copies took, or those without, is forgotten after so many times as many calls in a row of the other
kind as there were of this one: so what is slower takes one of so many calls, in models of many layers too, of which all
run forward before one of them is measured."""
PLANNING_FS = 10**12
"""What a call takes longer for being planned again, until that is measured: 1 ms."""
KINDS_IN = (StepKind.DISPATCH, StepKind.COPIES, StepKind.SPREAD_COPIES)
"""Of a forward's exchanges behind the metadata and before its results go home."""
FORWARD_KINDS = (StepKind.EXPERTS, StepKind.COPY_EXPERTS)
BACKWARD_KINDS = (
    StepKind.EXPERTS_BACKWARD,
    StepKind.COPY_EXPERTS_BACKWARD,
    StepKind.WEIGHT_GRAD,
    StepKind.COPY_WEIGHT_GRAD,
)


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
    without_pairs: int = 0
    """This and the next four are the same of the last calls without copies."""
    without_forward_fs: int = 0
    without_backward_pairs: int = 0
    without_backward_fs: int = 0
    without_byte_fs: int = 0
    planning_fs: int = 0
    """How long the second half of an agreement took, after which there were copies."""
    with_permille: int = 0
    """What calls with copies took of what was expected of them; 0 where none has."""
    without_permille: int = 0
    """The same of calls without copies."""


@dataclass(eq=False)
class _Watched:
    """A call that may not be over."""

    report: LayerReport
    has_backward: bool
    planning_fs: int
    """How long its copies took to plan; 0 without any."""
    expected_fs: int
    """What it was expected to take; 0 where nothing was."""

    @property
    def is_over(self) -> bool:
        report = self.report
        if not self.has_backward:
            return report.forward.is_over
        return report.backward is not None and report.backward.is_over and report.forward.is_over


class _Call(NamedTuple):
    """One call that is over."""

    has_copies: bool
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
        self._without: deque[_Call] = deque(maxlen=KEPT_CALLS)
        """The last ones without copies, beside which no weights travel."""
        self._watched: deque[_Watched] = deque(maxlen=WATCHED_CALLS)
        self._planning_fs: deque[int] = deque(maxlen=KEPT_CALLS)
        self._permille: dict[bool, deque[int]] = {True: deque(maxlen=KEPT_CALLS), False: deque(maxlen=KEPT_CALLS)}
        """What calls with copies, and those without, took of what was expected."""
        self.were_uneven = False
        """Whether ranks had uneven numbers of pairs in the last call, the same on every rank."""
        self._had_copies = False
        self._num_alike = self._num_other = 0
        """How many calls there were in a row with copies, or without, and how many of the other kind before them."""

    def observe(self, report: LayerReport, has_backward: bool, planning_s: float | None, expected_fs: int) -> None:
        """Take in a call.

        Args:
            planning_s: how long it took to plan its copies, None where it has none.
            expected_fs: what it was expected to take; 0 where nothing was.
        """
        planning_fs = 0 if planning_s is None else _femtoseconds(planning_s)
        self._watched.append(_Watched(report, has_backward, planning_fs, expected_fs))
        if planning_fs:
            self._planning_fs.append(planning_fs)
        has_copies = _copies_of(report) is not None
        if has_copies != self._had_copies:
            self._had_copies, self._num_other, self._num_alike = has_copies, self._num_alike, 0
        self._num_alike += 1
        least, most = max(JUDGED_CALLS.values()), WATCHED_CALLS
        if self._num_alike % (RETRIED_SHARE * min(max(self._num_other, least), most)) == 0:
            self._permille[not has_copies].clear()
            if has_copies:
                self._without.clear()

    def numbers(self) -> Numbers:
        """Return what the other ranks are told before the next call."""
        if torch.are_deterministic_algorithms_enabled():
            return Numbers()
        over = [watched for watched in self._watched if watched.is_over]
        for watched in over:
            self._watched.remove(watched)
            call = _read(watched.report)
            self._calls.append(call)
            if not call.has_copies:
                self._without.append(call)
            if watched.expected_fs:
                taken_fs = watched.planning_fs + _taken_fs(watched.report)
                self._permille[call.has_copies].append(1000 * taken_fs // watched.expected_fs)
        if len(self._calls) < LEAST_CALLS:
            return Numbers()
        return Numbers(
            *_spent(self._calls),
            *_spent(self._without),
            min(self._planning_fs, default=PLANNING_FS),
            self._median_permille(True),
            self._median_permille(False),
        )

    def _median_permille(self, has_copies: bool) -> int:
        """Return what calls took of what was expected; 0 before there are enough of them to judge by."""
        found = self._permille[has_copies]
        return statistics.median_low(found) if len(found) >= JUDGED_CALLS[has_copies] else 0


def _spent(calls: Collection[_Call]) -> tuple[int, int, int, int, int]:
    """Return the first five numbers of Numbers."""
    byte_fs = [call.byte_fs for call in calls if call.byte_fs]
    with_backward = [call for call in calls if call.backward_fs]
    return (
        sum(call.pairs for call in calls),
        sum(call.forward_fs for call in calls),
        sum(call.pairs for call in with_backward),
        sum(call.backward_fs for call in with_backward),
        statistics.median_low(byte_fs) if byte_fs else 0,
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
    spent = _of_all([of[:5] for of in numbers], has_backward)
    without = _of_all([of[5:10] for of in numbers], has_backward)
    if spent is None:
        return None
    with_permille, without_permille = _permille(numbers)
    costs = CopyCosts(
        *spent,
        call_fs=max(of.planning_fs for of in numbers),
        row_bytes=row_bytes[0],
        other_row_bytes=row_bytes[1],
        expert_bytes=expert_bytes,
        gradient_bytes=gradient_bytes,
        with_permille=with_permille,
        without_permille=without_permille,
    )
    if without is None:
        return costs
    forward_fs, backward_fs, byte_fs = without
    return costs._replace(without=costs._replace(forward_fs=forward_fs, backward_fs=backward_fs, byte_fs=byte_fs))


def _of_all(spent: Sequence[tuple[int, ...]], has_backward: bool) -> tuple[int, int, int] | None:
    """Return what a pair of a forward, one of a backward and a byte cost; None where they were not measured."""
    pairs, forward_fs, backward_pairs, backward_fs, byte_fs = zip(*spent, strict=True)
    if not sum(pairs) or not max(byte_fs) or (has_backward and not sum(backward_pairs)):
        return None
    backward = sum(backward_fs) // sum(backward_pairs) if has_backward else 0
    return sum(forward_fs) // sum(pairs), backward, max(byte_fs)


def _permille(numbers: Sequence[Numbers]) -> tuple[int, int]:
    """Return what calls with copies, and those without, took of what was expected; 1000 until all ranks saw both."""
    if not all(of.with_permille and of.without_permille for of in numbers):
        return 1000, 1000
    return max(of.with_permille for of in numbers), max(of.without_permille for of in numbers)


def _taken_fs(report: LayerReport) -> int:
    backward_s = 0.0 if report.backward is None else report.backward.total_s
    return _femtoseconds(report.forward.total_s + backward_s)


def _read(report: LayerReport) -> _Call:
    backward = report.backward
    return _Call(
        _copies_of(report) is not None,
        report.pair_offsets[-1],
        _femtoseconds(report.forward.lane_s(*FORWARD_KINDS)),
        0 if backward is None else _femtoseconds(backward.lane_s(*BACKWARD_KINDS)),
        _byte_fs(report, report.forward),
    )


def _byte_fs(report: LayerReport, forward: PassReport) -> int:
    """Return the time from the first dispatch to the last arrival before results go home, by bytes of the busiest port.

    The metadata, which every rank sends right before its first rows, has come by then: so no rank is late any more.
    """
    busiest = max(_bytes_on_ports(report))
    timings = [timing for timing in forward.steps if timing.step.kind in KINDS_IN]
    if not busiest or not timings:
        return 0
    (metadata,) = (timing for timing in forward.steps if timing.step.kind is StepKind.METADATA)
    began = max(metadata.end_s, timings[0].start_s + timings[0].post_s)
    return _femtoseconds(max(0.0, max(timing.end_s for timing in timings) - began)) // busiest


def _bytes_on_ports(report: LayerReport) -> list[int]:
    """Return what KINDS_IN send over the busier direction of each rank's port."""
    traffic: list[list[int]] = report.traffic_rows.tolist()
    sides = (traffic, zip(*traffic, strict=True))
    out, into = ([(sum(of) - of[rank]) * report.row_bytes for rank, of in enumerate(side)] for side in sides)
    said, planned = report.copies, _copies_of(report)
    if said is not None and planned is not None:
        for side, carried in zip((out, into), planned.on_each_port, strict=True):
            side[:] = [rows + int(copies * said.expert_bytes) for rows, copies in zip(side, carried, strict=True)]
    return list(map(max, out, into))


def _copies_of(report: LayerReport) -> ExpertCopies | None:
    return None if report.copies is None else report.copies.planned


def _femtoseconds(seconds: float) -> int:
    return max(1, int(seconds * 1e15))
