"""HalvesTrial: whether, and how, a model's steps are faster in two halves, found out by trying, alike on every rank."""

import statistics
import time
from dataclasses import dataclass, field

from tritonmoe.tuning.tuner import SETTLING_CALLS

__all__ = ["WHOLE", "HalvesTrial"]

WHOLE = 0
"""Instead of a number of chunks: a step of the whole batch."""
ORDER = (1, 2, WHOLE) * 4
"""The steps that are tried: in halves, of so many chunks, or WHOLE. Each stands at even and at odd places, since in
gradient accumulation every second step may be followed by an optimizer's."""
SMALLEST_GAIN = 0.02
"""Steps run in halves if they are faster by at least this share."""


@dataclass
class HalvesTrial:
    """What is known of a model's training steps so far; it is the same on every rank.

    A step's time is that from its forward's beginning to the next one's, on the slowest rank. First come steps of whole
    batches, in which num_chunks="auto" settles, and then steps of all ways in turn.
    """

    num_layers: int
    num_steps: int = 0
    times_ns: dict[int, list[int]] = field(default_factory=lambda: {way: [] for way in ORDER})
    """Of the tried steps, by the way."""
    decision: int | None = None
    """WHOLE, or the chunks of a half."""
    reason: str = ""
    """Of the decision, in one sentence."""
    _began: float | None = None

    @property
    def num_settling(self) -> int:
        """How many steps come before those that are tried."""
        return -(-SETTLING_CALLS // self.num_layers) + 1

    def elapsed_ns(self) -> int:
        """Give this rank's time of the step before the one that begins now; 0 where nothing is to be compared."""
        before, self._began = self._began, time.perf_counter()
        return 0 if before is None or self.decision is not None else max(1, int((self._began - before) * 1e9))

    def begin(self, slowest_ns: int) -> tuple[int, str]:
        """Begin a step: take in the slowest rank's time of the step before; give WHOLE or a half's chunks, and why."""
        place = self.num_steps - self.num_settling
        if self.decision is None and 0 < place <= len(ORDER):
            self.times_ns[ORDER[place - 1]].append(slowest_ns)
        if self.decision is None and place >= len(ORDER):
            self._decide()
        self.num_steps += 1
        if self.decision is not None:
            return self.decision, self.reason
        if place < 0:
            return WHOLE, f"step {self.num_steps} of {self.num_settling} before two halves are tried"
        return ORDER[place], f"trying all ways: step {place + 1} of {len(ORDER)}"

    def _decide(self) -> None:
        times_ms = {way: statistics.median_low(times) / 1e6 for way, times in self.times_ns.items()}
        whole_ms = times_ms.pop(WHOLE)
        best = min(times_ms, key=times_ms.__getitem__)
        is_faster = times_ms[best] < (1 - SMALLEST_GAIN) * whole_ms
        self.decision = best if is_faster else WHOLE
        words = "faster" if is_faster else f"not faster by {SMALLEST_GAIN:.0%}"
        found = " and ".join(f"{ms:.1f} ms with {way} chunk{'s' * (way > 1)}" for way, ms in times_ms.items())
        self.reason = f"two halves were {words}: steps took {found}, and of one batch {whole_ms:.1f} ms"
