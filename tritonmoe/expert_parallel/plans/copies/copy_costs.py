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
LEAST_SPREAD_PERCENT = 25
"""By so much more than their mean the busiest rank must have computed for what pairs cost, and what none costs, to be
told apart."""
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
    """Which its experts have computed, a mean over these calls as all pairs and their times are."""
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
    with_forward_permille: int = 0
    """What the forwards of calls with copies took of what was expected of these calls; 0 where none has."""
    with_backward_permille: int = 0
    without_forward_permille: int = 0
    """This and the next one are the same of calls without copies."""
    without_backward_permille: int = 0


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
        self._permille: dict[bool, deque[tuple[int, int]]] = {of: deque(maxlen=KEPT_CALLS) for of in (True, False)}
        """What forwards and backwards of calls with copies, and without, took of what was expected of the calls."""
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
                forward_fs, backward_fs = (1000 * of // watched.expected_fs for of in _taken_fs(watched))
                self._permille[call.has_copies].append((forward_fs, backward_fs))
        if len(self._calls) < LEAST_CALLS:
            return Numbers()
        return Numbers(
            *_spent(self._calls),
            *_spent(self._without),
            min(self._planning_fs, default=PLANNING_FS),
            *self._median_permille(True),
            *self._median_permille(False),
        )

    def _median_permille(self, has_copies: bool) -> tuple[int, int]:
        """Return what both passes took of what was expected; zeros before there are enough calls to judge by."""
        found = self._permille[has_copies]
        if len(found) < JUDGED_CALLS[has_copies]:
            return 0, 0
        forward, backward = map(statistics.median_low, zip(*found, strict=True))
        return forward, backward


def _spent(calls: Collection[_Call]) -> tuple[int, int, int, int, int]:
    """Return the first five numbers of Numbers."""
    byte_fs = [call.byte_fs for call in calls if call.byte_fs]
    with_backward = [call for call in calls if call.backward_fs]
    return (
        _mean([call.pairs for call in calls]),
        _mean([call.forward_fs for call in calls]),
        _mean([call.pairs for call in with_backward]),
        _mean([call.backward_fs for call in with_backward]),
        statistics.median_low(byte_fs) if byte_fs else 0,
    )


def _mean(of_calls: Sequence[int]) -> int:
    return sum(of_calls) // max(1, len(of_calls))


def agreed_costs(
    numbers: Sequence[Numbers],
    *,
    has_backward: bool,
    row_bytes: tuple[int, int, int],
    expert_bytes: int,
    gradient_bytes: int,
) -> CopyCosts | None:
    """Return what all ranks take for the costs of the next call; None where some rank has not measured enough.

    Args:
        row_bytes: of a row in the forward's dispatch, in the adjoint of combine, and in other exchanges. The others: as
            in CopyCosts.
    """
    if not all(of.planning_fs for of in numbers):
        return None
    with_permille, without_permille = _permille(numbers)
    fixed = CopyCosts(
        forward_fs=0,
        backward_fs=0,
        byte_fs=0,
        call_fs=max(of.planning_fs for of in numbers),
        row_bytes=row_bytes[0],
        gradient_row_bytes=row_bytes[1],
        other_row_bytes=row_bytes[2],
        expert_bytes=expert_bytes,
        gradient_bytes=gradient_bytes,
        with_permille=with_permille,
        without_permille=without_permille,
    )
    costs = _measured(fixed, [of[:5] for of in numbers], has_backward)
    without = _measured(fixed, [of[5:10] for of in numbers], has_backward)
    return None if costs is None else costs._replace(without=without)


def _measured(costs: CopyCosts, spent: Sequence[tuple[int, ...]], has_backward: bool) -> CopyCosts | None:
    """Return the costs with what ranks have measured; None where they have not."""
    pairs, forward_fs, backward_pairs, backward_fs, byte_fs = zip(*spent, strict=True)
    if not sum(pairs) or not max(byte_fs) or (has_backward and not sum(backward_pairs)):
        return None
    pair_fs, rank_fs = _fit(pairs, forward_fs)
    backward_pair_fs, backward_rank_fs = _fit(backward_pairs, backward_fs) if has_backward else (0, 0)
    return costs._replace(
        forward_fs=pair_fs,
        forward_rank_fs=rank_fs,
        backward_fs=backward_pair_fs,
        backward_rank_fs=backward_rank_fs,
        byte_fs=max(byte_fs),
    )


def _fit(pairs: Sequence[int], taken_fs: Sequence[int]) -> tuple[int, int]:
    """Return what ranks have taken for each pair, and for any number of them: the line of least squares through both.

    Where ranks had about as many pairs, all is taken to be for pairs. A quarter is in any case.
    """
    size, all_pairs, all_fs = len(pairs), sum(pairs), sum(taken_fs)
    mean_fs = pair_fs = all_fs // all_pairs
    if 100 * max(pairs) * size > (100 + LEAST_SPREAD_PERCENT) * all_pairs:
        spread = size * sum(of**2 for of in pairs) - all_pairs**2
        both = size * sum(of * fs for of, fs in zip(pairs, taken_fs, strict=True)) - all_pairs * all_fs
        pair_fs = min(max(both // spread, mean_fs // 4), mean_fs)
    return pair_fs, (all_fs - pair_fs * all_pairs) // size


def _permille(numbers: Sequence[Numbers]) -> tuple[int, int]:
    """Return what calls with copies, and those without, took of what was expected; 1000 until all ranks saw both.

    Every rank waits between its passes until all have begun their backward, so each pass takes what it takes where it
    takes longest.
    """
    if not all(of.with_forward_permille and of.without_forward_permille for of in numbers):
        return 1000, 1000
    with_forward, with_backward, without_forward, without_backward = map(
        max, zip(*(of[-4:] for of in numbers), strict=True)
    )
    return with_forward + with_backward, without_forward + without_backward


def _taken_fs(call: _Watched) -> tuple[int, int]:
    """Return what the forward took, from when its copies were planned, and what the backward took."""
    forward, backward = call.report.forward, call.report.backward
    return call.planning_fs + _femtoseconds(forward.total_s), 0 if backward is None else _femtoseconds(backward.total_s)


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
