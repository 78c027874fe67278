"""Warn on stderr when a host waits long for peers (which, and for what). Never interrupts a wait."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

__all__ = ["Doing", "LongWait", "wait_aloud", "watched"]

logger = logging.getLogger("tritonmoe")

SAY_AFTER_S = 10.0
"""How long a rank waits before it says so; a quarter of it before it shows the others where it waits."""
TIMES_LONGER = 6.0
"""By what factor longer it has waited each time that it says so again: after a minute, six minutes, half an hour."""


class _Thread(threading.local):
    doing: tuple[Callable[[], str], ...] = ()


_thread = _Thread()


class Doing:
    """A context in which this thread waits for other ranks, in words that are made where it has waited long."""

    __slots__ = ("_before", "_words")

    def __init__(self, words: Callable[[], str]) -> None:
        self._words = words

    def __enter__(self) -> None:
        self._before = _thread.doing
        _thread.doing = (*self._before, self._words)

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        _thread.doing = self._before


class LongWait:
    """What a rank says of one wait: whoever waits calls look() now and then, and end() when it is over.

    Args:
        who: names this rank. what: it waits in, where no Doing says so.
        whom: names those that it waits for.
        timeout_s: after which it raises; None where nobody here knows.
        show: shows the other ranks where this one waits, "" when it is over.
    """

    def __init__(
        self,
        who: str,
        whom: Callable[[], str],
        what: str,
        timeout_s: float | None = None,
        show: Callable[[str], None] | None = None,
    ) -> None:
        self._who, self._whom, self._timeout_s, self._show = who, whom, timeout_s, show
        self._doing, self._what = _thread.doing, what
        self._is_shown = False
        self.next_s = SAY_AFTER_S / 4 if show is not None else SAY_AFTER_S
        """How many seconds will have passed when it has something to do again."""

    def look(self, waited_s: float) -> None:
        """Log what is known so many seconds after the wait began."""
        if waited_s < self.next_s:
            return
        what = ", ".join(words() for words in self._doing) or self._what
        if self._show is not None and not self._is_shown:
            self._is_shown = True
            self._show(what)
        if waited_s < SAY_AFTER_S:
            self.next_s = SAY_AFTER_S
            return
        self.next_s = waited_s * TIMES_LONGER
        ends = "goes on waiting" if self._timeout_s is None else f"raises after timeout_s = {self._timeout_s:g}"
        logger.warning(
            "%s has waited %.3g s in: %s, for %s. It %s. Every rank must make the same calls, in the same order",
            *(self._who, waited_s, what, self._whom(), ends),
        )

    def end(self) -> None:
        """Take back what the others were shown."""
        if self._is_shown and self._show is not None:
            self._show("")


def wait_aloud(wait: Callable[[float | None], object], long: LongWait, timeout_s: float | None) -> bool:
    """Wait as wait(seconds) does, which says whether it is over, and say whether that came within timeout_s."""
    started = time.perf_counter()
    try:
        while True:
            long.look(time.perf_counter() - started)
            waited_s = time.perf_counter() - started  # what was said took its time of it
            left_s = None if timeout_s is None else timeout_s - waited_s
            step_s = max(0.0, long.next_s - waited_s)
            if wait(step_s if left_s is None else max(0.0, min(step_s, left_s))):
                return True
            if left_s is not None and left_s <= step_s:
                return False
    finally:
        long.end()


_lock = threading.Lock()
_watched: dict[LongWait, float] = {}
_is_any = threading.Event()
_watcher: threading.Thread | None = None


@contextlib.contextmanager
def watched(long: LongWait) -> Iterator[None]:
    """Make one shared thread watch a wait while this thread stands in a call that can't watch it."""
    global _watcher
    with _lock:
        _watched[long] = time.perf_counter()
        if _watcher is None or not _watcher.is_alive():  # a forked child has none
            _watcher = threading.Thread(target=_watch, name="tritonmoe-long-waits", daemon=True)
            _watcher.start()
    _is_any.set()
    try:
        yield
    finally:
        with _lock:
            del _watched[long]
        long.end()


def _watch() -> None:
    while _is_any.wait():
        time.sleep(SAY_AFTER_S / 8)
        with _lock:
            waits = [*_watched.items()]
            if not waits:
                _is_any.clear()
        for long, started in waits:
            long.look(time.perf_counter() - started)
