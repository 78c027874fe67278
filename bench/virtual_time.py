"""Emulated ranks in virtual time: one thread runs at a time, and time passes only while all of them sleep or wait.

What ranks compute takes no time then, only what they sleep does, and the links: a job takes as long on a machine that
does other things too, and in every run. Every look at the clock takes a little, so that no step is empty.
"""

import contextlib
import heapq
import itertools
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from unittest import mock

import tritonmoe.transports.emulated.delivery
import tritonmoe.transports.emulated.world

__all__ = ["VirtualTime"]

Result = TypeVar("Result")

LOOK_S = 2e-6
THREADED = tritonmoe.transports.emulated.delivery, tritonmoe.transports.emulated.world
"""The modules whose conditions ranks wait for."""


class _Turn:
    """What a thread waits for when it is not its turn."""

    def __init__(self) -> None:
        self.baton = threading.Lock()
        self.baton.acquire()
        self.waits = 0
        """How often it has begun to wait: what would have woken it from an earlier wait does nothing."""


class VirtualTime:
    """A clock, and whose turn it is among the threads that run by it."""

    def __init__(self, num_threads: int) -> None:
        """num_threads: so many call run() at the start; none goes on before all have."""
        self._now = 100.0
        self._lock = threading.Lock()
        self._own = threading.local()
        self._ready: deque[_Turn] = deque()
        self._timers: list[tuple[float, int, _Turn, int]] = []
        self._numbers = itertools.count()
        self._is_idle = False
        self._start = threading.Barrier(num_threads, action=self._next)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Have the whole process live by this clock."""
        threads = types.SimpleNamespace(**{**vars(threading), "Condition": self._condition, "Thread": self._thread})
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(time, "perf_counter", self.now))
            stack.enter_context(mock.patch.object(time, "sleep", self.sleep))
            for module in THREADED:
                stack.enter_context(mock.patch.object(module, "threading", threads))
            yield

    def run(self, number: int, work: Callable[[], Result]) -> Result:
        """Run the thread of this number, as one of those that run at the start."""
        turn = self._own.turn = _Turn()
        with self._lock:
            heapq.heappush(self._timers, (self._now, number - 1000, turn, 0))
        self._start.wait()
        turn.baton.acquire()
        try:
            return work()
        finally:
            self._leave()

    def now(self) -> float:
        self._now += LOOK_S
        return self._now

    def sleep(self, seconds: float) -> None:
        self._wait_until(self._now + max(0.0, seconds))

    def _wait_until(self, at: float | None, lock: "threading.Lock | None" = None) -> None:
        """Run other threads until a time has come, or this thread is made ready; a lock is free meanwhile."""
        turn = self._own.turn
        if at is not None:
            with self._lock:
                heapq.heappush(self._timers, (at, next(self._numbers), turn, turn.waits))
        if lock is not None:
            lock.release()
        self._next()
        turn.baton.acquire()
        if lock is not None:
            lock.acquire()

    def _next(self) -> None:
        """Run the thread whose time comes first; none where all wait for a thread that isn't one of them."""
        with self._lock:
            while self._timers or self._ready:
                if self._ready:
                    turn = self._ready.popleft()
                else:
                    at, _, turn, waits = heapq.heappop(self._timers)
                    if waits != turn.waits:
                        continue
                    self._now = max(self._now, at)
                turn.waits += 1
                turn.baton.release()
                return
            self._is_idle = True

    def _leave(self) -> None:
        del self._own.turn
        self._next()

    def _make_ready(self, turns: Sequence[_Turn]) -> None:
        with self._lock:
            self._ready.extend(turns)
            was_idle, self._is_idle = self._is_idle, False
        if was_idle:
            self._next()

    def _thread(self, target: Callable[[], object], name: str, daemon: bool) -> threading.Thread:
        """Return a thread that has its turn with the others from its start on."""
        turn = _Turn()

        def run() -> None:
            self._own.turn = turn
            turn.baton.acquire()
            try:
                target()
            finally:
                self._leave()

        thread = threading.Thread(target=run, name=name, daemon=daemon)
        self._make_ready([turn])
        return thread

    def _condition(self, lock: threading.Lock) -> "_Condition":
        return _Condition(self, lock)


class _Condition:
    """As threading.Condition, in virtual time."""

    def __init__(self, clock: VirtualTime, lock: threading.Lock) -> None:
        self._clock, self._lock = clock, lock
        self._waiting: deque[tuple[_Turn, int]] = deque()

    def wait(self, timeout: float | None = None) -> None:
        turn = self._clock._own.turn
        self._waiting.append((turn, turn.waits))
        self._clock._wait_until(None if timeout is None else self._clock._now + timeout, self._lock)

    def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> object:
        until = None if timeout is None else self._clock._now + timeout
        while not (found := predicate()):
            if until is not None and self._clock._now >= until:
                break
            self.wait(None if until is None else until - self._clock._now)
        return found

    def notify(self) -> None:
        self._notify(1)

    def notify_all(self) -> None:
        self._notify(len(self._waiting))

    def _notify(self, most: int) -> None:
        """Make those ready that still wait since they came here."""
        turns: list[_Turn] = []
        while self._waiting and len(turns) < most:
            turn, waits = self._waiting.popleft()
            if waits == turn.waits:
                turn.waits += 1
                turns.append(turn)
        if turns:
            self._clock._make_ready(turns)
