"""Notices: what the ranks of a group leave in its store when a transport breaks, and how they meet to rebuild it.

A rank whose exchange fails puts up a notice before it lets go of its connections, so that whoever finds one closed can
read why; a rank that has died leaves none. No exchange uses anything here as long as all is well.
"""

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, TypeVar

from tritonmoe.errors import TransportError
from tritonmoe.transports.waiting import LongWait

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["GRACE_S", "Missed", "Notice", "Notices"]

Result = TypeVar("Result")

GRACE_S = 1.0
"""How long a rank looks for the notice of another one that has let go, or that it has waited for in vain."""
STORE_S = 2.0
"""How long the store may take for an answer: the process that hosts it may be the one that stands still."""
WORDS_S = 1.0
"""How long it may take where a wait only says more of itself: by so much such a wait may end later, once."""
POLL_S = (0.005, 0.2)
"""From how often to how seldom a waiting rank looks into the store."""


@dataclass(frozen=True)
class Notice:
    """Why a rank can't go on in one generation of a transport."""

    number: int
    """Which of the transports made on this group it is, in the order in which they were made."""
    generation: int
    what: str
    """What the rank did, behind "rank k"."""
    because_of: tuple[int, ...] = ()
    """Ranks that it waited for; none where it failed by itself."""
    closed: tuple[int, ...] = ()
    """Those of them whose connections were closed."""

    @classmethod
    def from_json(cls, text: bytes) -> "Notice":
        number, generation, what, because_of, closed = json.loads(text)
        return cls(number, generation, what, tuple(because_of), tuple(closed))


class Missed(TransportError):
    """Raised where some ranks did not come to a meeting."""

    def __init__(self, words: str, ranks: list[int]) -> None:
        super().__init__(words.format(ranks))
        self.ranks = ranks


class Notices:
    """One rank's view of the notices of one transport.

    Args:
        store: that of the group; a prefix keeps the keys apart from torch's.
        number: of the transport on this group, the same on every rank.
    """

    def __init__(self, store: "Store", rank: int, size: int, number: int) -> None:
        self._store, self.number = store, number
        self._rank, self._size = rank, size
        self._last_meeting = -1
        self._is_silent = False
        if number:  # what this rank left of an earlier transport would say that it makes the calls of that one
            with contextlib.suppress(TransportError):
                self._ask(lambda: self._store.set(f"notice/latest/{rank}", ""))

    def put_up(self, notice: Notice) -> None:
        """Publish why this rank lets go; where the store can't be reached, nobody will read it."""
        with contextlib.suppress(TransportError):
            self._set_notices(json.dumps(astuple(notice)))
            self._ask(lambda: self._store.set(f"broken/{self.number}", json.dumps([notice.generation, self._rank])))

    def take_down(self) -> None:
        """Take this rank's notice back, once all ranks have met."""
        self._set_notices("")

    def _set_notices(self, text: str) -> None:
        def write() -> None:
            for where in (self.number, "latest"):
                self._store.set(f"notice/{where}/{self._rank}", text)

        self._ask(write)

    def find_broken(self, generation: int) -> int | None:
        """Return a rank that has put up a notice of this generation, by one question; None where none has."""
        text = self._get(f"broken/{self.number}")
        if not text:
            return None
        broken, rank = json.loads(text)
        return rank if broken >= generation else None

    def find_roots(self, suspects: Sequence[int], generation: int) -> tuple[list[int], dict[int, Notice]]:
        """Follow the notices of the ranks that were waited for to those that leave none, or failed by themselves.

        Returns:
            Those ranks, none where ranks wait for each other in a circle, and all notices that were found.
        """
        notices: dict[int, Notice] = {}
        until = time.perf_counter() + GRACE_S
        while True:
            roots, unread, seen = [], list(suspects), {self._rank}
            while unread:
                rank = unread.pop()
                if rank in seen:
                    continue
                seen.add(rank)
                notice = notices.get(rank) or self._read(rank)
                if notice is None or notice.generation < generation:
                    roots.append(rank)
                    continue
                notices[rank] = notice
                if notice.because_of:
                    unread += notice.because_of
                else:
                    roots.append(rank)
            silent = [rank for rank in roots if rank not in notices]
            if not silent or time.perf_counter() > until:
                return sorted(roots), notices
            time.sleep(0.05)

    def meet(self, generation: int, timeout_s: float, ended: Sequence[int] = (), *, is_rebuild: bool = True) -> int:
        """Wait until all ranks want to connect, and give the number of the generation that they agree on.

        It is at least `generation`, and larger where an earlier meeting was missed by some ranks.

        Args:
            ended: ranks that seem to have died: they get GRACE_S to show that they haven't.
            is_rebuild: whether the ranks leave an earlier generation; the first one has no other number.
        Raises:
            Missed: a rank has ended, didn't come within timeout_s, or has given up this generation already.
        """
        started = time.perf_counter()
        wanted = max(generation, self._last_meeting + 1) if is_rebuild else generation
        others = [rank for rank in range(self._size) if rank != self._rank]
        pause = POLL_S[0]
        absent: list[int] = []
        what = "rebuild()" if is_rebuild else "the first exchange"
        long = LongWait(f"rank {self._rank} of {self._size}", lambda: f"ranks {absent}", what, timeout_s)
        try:
            while True:
                self._last_meeting = wanted
                left_s = started + timeout_s - time.perf_counter()
                theirs = self._ask(functools.partial(self._meetings, wanted, others), max(STORE_S, left_s))
                latest = max([wanted, *theirs.values()])
                absent = [rank for rank in others if theirs[rank] < latest]
                if not absent and latest == wanted:
                    return wanted
                waited = time.perf_counter() - started
                if is_rebuild:
                    wanted = latest
                    gone = [rank for rank in absent if rank in ended and theirs[rank] < generation]
                    if gone and waited > GRACE_S:
                        raise Missed("ranks {} have ended: their connections are closed and they left no word", gone)
                else:
                    given_up = [rank for rank in others if theirs[rank] > wanted or self._read(rank)]
                    if given_up:
                        raise Missed("ranks {} have given up already", given_up)
                long.look(waited)
                if waited > timeout_s:
                    raise Missed(f"ranks {{}} did not come within timeout_s = {timeout_s}", absent)
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])
        except BaseException:
            self._leave()
            raise

    def show_wait(self, generation: int, number: int, words: str) -> None:
        """Show the other ranks that this one waits in an exchange of this number; "" when that is over."""
        text = json.dumps([self.number, generation, number, words]) if words else ""
        self._ask_in_wait(lambda: self._store.set(f"waiting/{self._rank}", text))

    def whom(self, suspects: Sequence[int], generation: int, number: int) -> str:
        """Name those of the ranks that don't wait in this exchange, with what they show instead; all, if all do."""
        keys = {rank: f"waiting/{rank}" for rank in suspects}
        texts = self._ask_in_wait(
            lambda: {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}
        )
        said, elsewhere = [], []
        for rank in suspects:
            text = (texts or {}).get(rank)
            place = json.loads(text) if text else [None, None, None, ""]
            if place[:3] != [self.number, generation, number]:
                said.append(rank)
                elsewhere += [f"rank {rank} waits in: {place[3]}"] if text else []
        return f"ranks {said or list(suspects)}" + (f" ({'; '.join(elsewhere)})" if elsewhere else "")

    def _ask_in_wait(self, question: Callable[[], Result]) -> Result | None:
        """Ask the store what a wait can go on without; never again once it gave no answer in time."""
        if self._is_silent:
            return None
        try:
            return self._ask(question, WORDS_S)
        except TransportError:
            self._is_silent = True
            return None

    def find_elsewhere(self, rank: int) -> Notice | None:
        """Return the rank's latest notice if it is of another transport on this group."""
        notice = self._read(rank, "latest")
        return None if notice is None or notice.number == self.number else notice

    def _meetings(self, wanted: int, others: Sequence[int]) -> dict[int, int]:
        """Publish which generation this rank wants, and return what the others want, -1 if nothing."""
        if self._meeting_of(self._rank) != wanted:  # it may be an earlier question's answer that comes late
            self._store.set(f"meeting/{self.number}/{self._rank}", str(wanted))
        return {rank: self._meeting_of(rank) for rank in others}

    def _meeting_of(self, rank: int) -> int:
        key = f"meeting/{self.number}/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else -1

    def _leave(self) -> None:
        """Take the wish back, so that a rank that comes later doesn't take this one for present."""
        with contextlib.suppress(TransportError):
            self._ask(lambda: self._store.set(f"meeting/{self.number}/{self._rank}", "-1"))

    def _read(self, rank: int, where: int | str | None = None) -> Notice | None:
        text = self._get(f"notice/{self.number if where is None else where}/{rank}")
        return Notice.from_json(text) if text else None

    def _get(self, key: str) -> bytes:
        """Return what the store has under a key; nothing where it can't be reached."""
        try:
            return self._ask(lambda: self._store.get(key) if self._store.check([key]) else b"")
        except TransportError:
            return b""

    def _ask(self, question: Callable[[], Result], within_s: float = STORE_S) -> Result:
        """Run a request to the store in a thread of its own, since nobody knows how long a request takes.

        Raises:
            TransportError: the store can't be reached.
        """
        answers: list[Result] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                answers.append(question())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="store-question", daemon=True)
        thread.start()
        thread.join(within_s)
        if answers:
            return answers[0]
        why = f"{type(errors[0]).__name__}: {errors[0]}" if errors else f"it gave no answer within {within_s:.1f} s"
        raise TransportError(f"the store of the group, which one of its processes hosts, can't be reached ({why})")
