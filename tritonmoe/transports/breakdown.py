"""Breakdown: whether a transport is broken on this rank, and whose fault it is, as far as other ranks' notices tell."""

import threading
from collections.abc import Sequence

from tritonmoe.transports.notices import GRACE_S, Notice, Notices

__all__ = ["Breakdown"]


class Breakdown:
    """Whether one generation of a transport is broken on this rank, and why. The first failure counts."""

    def __init__(self, notices: Notices, rank: int, generation: int) -> None:
        self._notices, self._rank, self._generation = notices, rank, generation
        self._lock = threading.Lock()
        self._is_claimed = False
        self._is_known = threading.Event()
        self._notice: Notice | None = None
        self._words = ""
        self._ended: tuple[int, ...] = ()

    def claim(self) -> bool:
        """Return whether this failure is the first; then the caller must call note()."""
        with self._lock:
            is_first, self._is_claimed = not self._is_claimed, True
        return is_first

    def note(self, what: str, because_of: Sequence[int] = (), closed: Sequence[int] = ()) -> None:
        """Record the reason, unless there is one, and put up a notice; the arguments are those of a Notice."""
        if self._notice is not None:
            return
        self._notice = Notice(self._notices.number, self._generation, what, tuple(because_of), tuple(closed))
        self._notices.put_up(self._notice)
        self._is_known.set()

    def show_wait(self, number: int, words: str) -> None:
        """Call Notices.show_wait() for this generation."""
        self._notices.show_wait(self._generation, number, words)

    def whom(self, suspects: Sequence[int], number: int) -> str:
        """Return Notices.whom() of this generation."""
        return self._notices.whom(suspects, self._generation, number)

    @property
    def has_happened(self) -> bool:
        return self._is_claimed

    def ended(self) -> tuple[int, ...]:
        """Return the ranks whose connections were closed and that left no word: they have died, as it seems."""
        self.explain()
        return self._ended

    def explain(self) -> str:
        """Return what this rank waited for and, as far as the other ranks' notices show, which rank is to blame."""
        self._is_known.wait(GRACE_S)
        with self._lock:
            if not self._words and self._notice is not None:
                self._words = self._find_words(self._notice)
        return self._words

    def _find_words(self, own: Notice) -> str:
        said = [f"rank {self._rank} {own.what}"]
        if own.because_of:
            roots, notices = self._notices.find_roots(own.because_of, self._generation)
            closed = {*own.closed, *(rank for notice in notices.values() for rank in notice.closed)}
            said += [f"rank {rank} {notice.what}" for rank, notice in sorted(notices.items())]
            self._ended = tuple(rank for rank in roots if rank not in notices and rank in closed)
            for rank in sorted({*roots} - {*notices}):
                if rank in self._ended:
                    said.append(f"rank {rank} has ended: its connection is closed and it left no word")
                elif (elsewhere := self._notices.find_elsewhere(rank)) is not None:
                    said.append(
                        f"rank {rank} {elsewhere.what} in transport {elsewhere.number} of this group, and here it is "
                        f"{own.number}: make the calls of a group's transports in the same order on every rank"
                    )
                else:
                    said.append(f"rank {rank} gave no sign: it is late, stands still or does something else")
        return "; ".join(said)
