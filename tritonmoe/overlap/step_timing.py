"""StepTiming: when one step of a pass ran."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tritonmoe.overlap.steps import Step

__all__ = ["StepTiming", "covered_s"]


@dataclass(frozen=True)
class StepTiming:
    """When one step ran, in seconds from the start of its pass."""

    step: Step
    start_s: float
    end_s: float
    """When it ended; an exchange ends when its rows have arrived, or where that is not known, when the wait for it is
    over."""
    wait_s: float
    """How long the compute lane stood still for an exchange."""
    post_s: float = 0.0
    """How long packing and posting an exchange took, on the compute lane."""
    arrivals_s: tuple[float | None, ...] | None = None
    """When the rows of every rank had arrived; None where that is not known, and for this rank's own."""
    is_end_known: bool = True
    """False for an exchange of which it is only known that it had ended when it was waited for (NCCL)."""

    def shifted(self, offset_s: float) -> "StepTiming":
        """Return it so much later."""
        arrivals = self.arrivals_s and tuple(None if at is None else at + offset_s for at in self.arrivals_s)
        return replace(self, start_s=self.start_s + offset_s, end_s=self.end_s + offset_s, arrivals_s=arrivals)


def covered_s(spans: Iterable[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Return for how long of the time from start_s to end_s any of the spans lasts.

    Example:
        covered_s([(0, 2), (1, 3), (4, 9)], 1, 5) gives 3.
    """
    total_s, reached_s = 0.0, start_s
    for begin_s, over_s in sorted(spans):
        total_s += max(0.0, min(over_s, end_s) - max(begin_s, reached_s))
        reached_s = max(reached_s, over_s)
    return total_s
