"""Trials: how long whole calls take with the plans that "auto" tries, and later with the one that it keeps."""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.tuning.votes import Message

__all__ = ["DRIFT_CALLS", "TRIAL_ROUNDS", "Trials", "TriedCall"]

TRIAL_ROUNDS = 3
"""How often each plan is tried."""
DRIFT_CALLS = 16
"""Of how many calls the median is compared with that of the trials."""
SIMILAR_SIZE = 2
"""Calls that are tried are compared if the rows of their busiest ranks are within this factor."""
SAME_SIZE = 0.10
"""A call is compared with the tried ones if its busiest rank has as many rows, within this share."""


@dataclass
class TriedCall:
    """A call whose time the other ranks have not heard yet."""

    number: int
    """It counts from when the candidates were known."""
    rows: int
    """How many rows the busiest rank received."""
    report: LayerReport
    has_backward: bool
    """Whether the time of its backward counts too."""

    def nanoseconds(self) -> int | None:
        """Return the time of the whole call on this rank, None as long as the call isn't over."""
        passes = [self.report.forward]
        if self.report.first_run is not None:
            passes.append(self.report.first_run.forward)
        if self.has_backward:
            if self.report.backward is None:
                return None
            passes.append(self.report.backward)
        if not all(layer_pass.is_over for layer_pass in passes):
            return None
        return max(1, int(sum(layer_pass.total_s for layer_pass in passes) * 1e9))


@dataclass
class Trials:
    """The times of calls since the candidates were known, all ranks' alike but for what `tried` holds."""

    num_candidates: int
    num_calls: int = 0
    """How many calls there were since."""
    tried: deque[TriedCall] = field(default_factory=lambda: deque(maxlen=DRIFT_CALLS))
    """The last of them whose times the other ranks have not heard yet, the oldest first."""
    times: dict[int, list[float]] = field(default_factory=dict)
    """How long each candidate took: nanoseconds per row of the busiest rank, by the candidate's number."""
    usual: tuple[float, float] | None = None
    """Nanoseconds per row, and rows, of the chosen plan when it was tried, or of its first calls where it was not."""
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=DRIFT_CALLS))
    """Nanoseconds per row, and rows, of the last calls of the chosen plan."""

    def __post_init__(self) -> None:
        self.times = {number: [] for number in range(self.num_candidates)}

    @property
    def candidate(self) -> int:
        """The number of the candidate that the next call runs."""
        return self._candidate_of(self.num_calls)

    def _candidate_of(self, call: int) -> int:
        """Return the number of the candidate that a call runs.

        In each round every candidate runs once, in an order that shifts from round to round.
        """
        return (call + call // self.num_candidates) % self.num_candidates

    def message(self) -> Message:
        """Return the time of the oldest call that is over here and that the other ranks have not heard."""
        for call in self.tried:
            nanoseconds = call.nanoseconds()
            if nanoseconds is not None:
                return Message(measured_call=call.number, measured_ns=nanoseconds)
        return Message()

    def add(self, report: LayerReport, has_backward: bool) -> None:
        """Take in a call that has begun."""
        rows = int(report.traffic_rows.sum(0).max())
        self.tried.append(TriedCall(self.num_calls, rows, report, has_backward))
        self.num_calls += 1

    def hear(self, messages: Sequence[Message], *, is_chosen: bool) -> bool:
        """Take in the time of one call, if all ranks tell their time of the same one; say whether a trial has counted.

        Args:
            is_chosen: all calls run the chosen plan now.
        """
        numbers = {message.measured_call for message in messages}
        place = next((place for place, call in enumerate(self.tried) if numbers == {call.number}), None)
        if place is None:
            return False
        call = self.tried[place]
        del self.tried[place]
        rows = max(1, call.rows)
        per_row = max(message.measured_ns for message in messages) / rows
        if is_chosen:
            if self.usual is None or abs(rows - self.usual[1]) <= SAME_SIZE * self.usual[1]:
                self.recent.append((per_row, rows))
            return False
        self.usual = (per_row, rows) if self.usual is None else self.usual
        is_similar = self.usual[1] / SIMILAR_SIZE <= rows <= self.usual[1] * SIMILAR_SIZE
        if is_similar:
            self.times[self._candidate_of(call.number)].append(per_row)
        return is_similar

    @property
    def is_enough(self) -> bool:
        """Whether every candidate was measured in every round."""
        return all(len(times) >= TRIAL_ROUNDS for times in self.times.values())

    def medians(self) -> dict[int, float]:
        """Return the median time of each candidate."""
        return {number: statistics.median(times) for number, times in self.times.items()}

    def keep(self, per_row: float | None) -> None:
        """Begin to watch the chosen plan, whose trials took so long for a row; None: its first calls will say."""
        self.usual = None if per_row is None or self.usual is None else (per_row, self.usual[1])
        self.tried.clear()

    def drift(self) -> float:
        """Return by which share DRIFT_CALLS calls of the chosen plan took longer or shorter; 0 before so many."""
        if len(self.recent) < DRIFT_CALLS:
            return 0.0
        recent, rows = (statistics.median(values) for values in zip(*self.recent, strict=True))
        self.recent.clear()
        if self.usual is None:
            self.usual = recent, rows
        return abs(recent / self.usual[0] - 1)
