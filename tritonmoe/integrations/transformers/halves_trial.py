"""HalvesTrial: whether a model's steps are faster in two halves, found out by trying both, alike on every rank."""

import statistics
import time
from dataclasses import dataclass, field

from tritonmoe.overlap.tuning.tuner import SETTLING_CALLS

__all__ = ["HalvesTrial"]

ORDER = (True, False, False, True, True, False, False, True)
"""Which of the tried steps run in halves. Both ways stand at even and at odd places, since in gradient accumulation
every second step may be followed by an optimizer's."""
SMALLEST_GAIN = 0.02
"""Steps run in halves if they are faster by at least this share."""


@dataclass
class HalvesTrial:
    """What is known of a model's training steps so far; it is the same on every rank.

    A step's time is that from its forward's beginning to the next one's, on the slowest rank. First come steps of whole
    batches, in which num_chunks="auto" settles, and then steps of both kinds in turn.
    """

    num_layers: int
    num_steps: int = 0
    times_ns: dict[bool, list[int]] = field(default_factory=lambda: {True: [], False: []})
    """Of the tried steps, by whether they ran in halves."""
    decision: bool | None = None
    reason: str = ""
    """Of the decision, in one sentence."""
    _began: float | None = None
    _tried: bool | None = None
    """Whether the step that runs now is in halves, if it is one of those that are tried."""

    @property
    def num_settling(self) -> int:
        """How many steps come before those that are tried."""
        return -(-SETTLING_CALLS // self.num_layers) + 1

    def elapsed_ns(self) -> int:
        """Return this rank's time of the step before the one that begins now; 0 where nothing is to be compared."""
        before, self._began = self._began, time.perf_counter()
        return 0 if before is None or self.decision is not None else max(1, int((self._began - before) * 1e9))

    def end(self, slowest_ns: int) -> None:
        """Take in the slowest rank's time of the step that has ended, if that was tried."""
        if self._tried is not None:
            self.times_ns[self._tried].append(slowest_ns)
        self._tried = None

    def interrupt(self) -> None:
        """Forget the step that runs now: what comes before the next one is none. A tried one is tried again."""
        if self._tried is not None:
            self.num_steps -= 1
        self._began = self._tried = None

    def begin(self) -> tuple[bool, str]:
        """Begin a step that could run in halves: say whether it does, and why."""
        place = self.num_steps - self.num_settling
        if self.decision is None and place >= len(ORDER):
            self._decide()
        self.num_steps += 1
        if self.decision is not None:
            return self.decision, self.reason
        if place < 0:
            return False, f"step {self.num_steps} of {self.num_settling} before two halves are tried"
        self._tried = ORDER[place]
        return ORDER[place], f"trying both ways: step {place + 1} of {len(ORDER)}"

    def _decide(self) -> None:
        halves_ms, whole_ms = (statistics.median_low(self.times_ns[is_halved]) / 1e6 for is_halved in (True, False))
        self.decision = halves_ms < (1 - SMALLEST_GAIN) * whole_ms
        words = "faster" if self.decision else f"not faster by {SMALLEST_GAIN:.0%}"
        self.reason = f"two halves were {words}: steps took {halves_ms:.1f} ms, and of one batch {whole_ms:.1f} ms"
