"""Fault: what makes steps of a job slow, in jobs of this package's layers and of other trainers."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Fault"]


@dataclass(frozen=True)
class Fault:
    """Something that makes steps slow."""

    kind: str
    """slow rank, late rank, slow link, slow network, imbalance, host overhead, and others of doctor_faults.py."""
    ranks: tuple[int, ...]
    """Who; of links sender and receiver, one pair after the other; empty: all, or another one in each step."""
    amount: float
    """How many times as slow, or seconds, or of an imbalance the share of tokens that choose the rank."""
    when: str = "always"
    """always, growing, periodic, for a while, by turns of its ranks, or by chance: at random, rare, flapping."""
    period: int = 0
    phase: str = ""
    """forward or backward alone; empty: both."""
    layer: int | None = None
    """In one layer alone, or before it."""
    since: int = 0
    until: int | None = None
    """For a while: the first and the last step; None: to the end."""

    def share(self, step: int, num_steps: int, by_chance: Callable[[], bool]) -> float:
        """Return how much of it there is in a step, from 0 to 1; by_chance says whether one by chance is there."""
        if self.when == "periodic":
            return float(step % self.period == self.period - 1)
        if self.when == "growing":
            return (step + 0.5) / num_steps
        if self.when == "for a while":
            return float(self.since <= step and (self.until is None or step <= self.until))
        return float(self.when in ("always", "turns") or by_chance())
