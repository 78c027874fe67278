"""How far a command is and how long it still takes: plain lines on stderr, on a terminal and in a file alike."""

import sys
import time

__all__ = ["Progress", "say"]

FIRST_S, EVERY_S = 2.0, 10.0
"""Seconds until the first estimate and between two of them."""


def say(message: str) -> None:
    """Print a line on stderr: what stdout is piped to gets the figures alone."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """A line that shows how much of a work is done, and the time that the rest needs at the pace so far.

    Args:
        what: says what is done.
        total: how much there is to do.
        unit: what it is shown in, and how much one of these is.
        speaks: False on all ranks but one, which say nothing.
    """

    def __init__(self, what: str, total: int, unit: tuple[str, float] = ("calls", 1), *, speaks: bool = True) -> None:
        self._what, self._total, self._unit, self._speaks = what, total, unit, speaks
        self._done = 0
        self._started = time.perf_counter()
        self._next_s = FIRST_S
        self._say(f"{what}: {self._shown(total)} {unit[0]} ...")

    def advance(self, amount: int = 1) -> None:
        """Count so much as done, and give an estimate now and then."""
        self._done += amount
        elapsed = time.perf_counter() - self._started
        if self._done >= self._total:
            self._say(f"{self._what}: done in {duration(elapsed)}")
        elif elapsed >= self._next_s:
            self._next_s = elapsed + EVERY_S
            left = duration(elapsed / self._done * (self._total - self._done))
            done, total = self._shown(self._done), self._shown(self._total)
            self._say(f"{self._what}: {done} of {total} {self._unit[0]}, about {left} left")

    def _shown(self, amount: int) -> str:
        _, size = self._unit
        return str(amount) if size == 1 else f"{amount / size:.2f}"

    def _say(self, message: str) -> None:
        if self._speaks:
            say(message)


def duration(seconds: float) -> str:
    """Return a time in words: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
