"""How far a measurement is and how long it still takes: plain lines on stderr, on a terminal and in a file alike."""

import sys
import time

__all__ = ["Progress", "say"]

FIRST_S, EVERY_S = 2.0, 10.0
"""Seconds until the first estimate and between two of them."""


def say(message: str) -> None:
    """Print a line on stderr: what stdout is piped to gets the figures alone."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Counts the calls of a measurement; the time they still need is that of the calls so far.

    Args:
        what: says what is measured.
        num_calls: how often advance() will be called.
        speaks: False on all ranks but one, which say nothing.
    """

    def __init__(self, what: str, num_calls: int, *, speaks: bool = True) -> None:
        self._what, self._num_calls, self._speaks = what, num_calls, speaks
        self._calls = 0
        self._started = time.perf_counter()
        self._next_s = FIRST_S
        self._say(f"{what}: {num_calls} calls ...")

    def advance(self) -> None:
        """Count one call, and give an estimate now and then."""
        self._calls += 1
        elapsed = time.perf_counter() - self._started
        left = self._num_calls - self._calls
        if left == 0:
            self._say(f"{self._what}: done in {duration(elapsed)}")
        elif elapsed >= self._next_s:
            self._next_s = elapsed + EVERY_S
            left_s = elapsed / self._calls * left
            self._say(f"{self._what}: {self._calls} of {self._num_calls} calls, about {duration(left_s)} left")

    def _say(self, message: str) -> None:
        if self._speaks:
            say(message)


def duration(seconds: float) -> str:
    """Give a time in words: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
