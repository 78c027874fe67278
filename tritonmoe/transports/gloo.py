"""Exchanges between processes over gloo; rows travel as one message from each rank to each other.

Not gloo's all_to_all, which posts its sends before its receives: on the rank that comes later the sent rows then stand
before the note that lets the peer send, on the one connection between the two, and the directions take turns.

Each generation of a transport has connections of its own, so that nothing of it can reach another one, or collectives
of the user's group. A rank that can't go on cuts them: that ends the waiting of all others at once.
"""

import contextlib
import os
import sys
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol, cast

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports.breakdown import Breakdown
from tritonmoe.transports.progress_thread import (
    SECONDS_TO_LET_GO,
    SECONDS_TO_STOP,
    ProgressThread,
    Receipt,
    ThreadedExchange,
)

if TYPE_CHECKING:
    from torch.distributed import Store, Work

__all__ = ["GlooExchange", "GlooLinks", "end_links", "let_compute_go_on"]

FOREVER = timedelta(days=365)
"""The timeout that gloo gets, at whose end it closes all connections: the transport decides itself when to do that."""

AT_ONCE = timedelta(milliseconds=1)
"""The timeout of a wait that is to make gloo close all connections."""

THREAD_NAME = "gloo_tcp_loop"


def let_compute_go_on() -> None:
    """Make gloo's own threads wait for the end of a time slice instead of interrupting compute (SCHED_BATCH, Linux).

    Otherwise such a thread, which is woken for every few packets, interrupts compute; and where compute was just
    handing rows over to gloo, it spins for the lock that the interrupted thread holds. An idle core runs it at once.
    Older gloos (torch 2.10) don't name their threads, which then stay as they are.
    """
    if sys.platform == "linux":
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended, or this user may not
                if (task / "comm").read_text().strip() == THREAD_NAME:
                    os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))


class LostConnection(Exception):
    """A message can't be posted, since the connection to its peer is closed."""

    def __init__(self, peer: int) -> None:
        super().__init__(peer)
        self.peer = peer


class PointToPoint(Protocol):
    """The part of torch's ProcessGroupGloo that is used here, which its type declarations leave out."""

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> "Work": ...

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> "Work": ...


class GlooLinks:
    """This rank's connections to all others, in one generation of a transport; all ranks make theirs together.

    group: see ThreadedExchange. Raises RuntimeError where connecting takes longer than timeout_s.
    """

    def __init__(
        self, store: "Store", rank: int, size: int, timeout_s: float, group: tuple[str, Sequence[int]]
    ) -> None:
        import torch.distributed as dist

        self.group = group

        self._peers = [peer for peer in range(size) if peer != rank]
        self._gloo = cast(PointToPoint, dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s)))
        let_compute_go_on()

    def receive(self, part: Tensor, peer: int, tag: int) -> "Work":
        try:
            return self._gloo.recv([part], peer, tag)
        except RuntimeError as error:
            raise LostConnection(peer) from error

    def send(self, part: Tensor, peer: int, tag: int) -> "Work":
        try:
            return self._gloo.send([part], peer, tag)
        except RuntimeError as error:
            raise LostConnection(peer) from error

    def cut(self) -> None:
        """Close all connections: what is under way ends with an error here, and on the other ranks.

        gloo does so when it has waited too long for a message, as for one that nobody sends.
        """
        for peer in self._peers:
            with contextlib.suppress(RuntimeError):
                self._gloo.recv([torch.empty(1, dtype=torch.uint8, device="cpu")], peer, 0).wait(AT_ONCE)


def end_links(pid: int, progress: ProgressThread, links: GlooLinks, breakdown: Breakdown) -> None:
    """End the thread; exchanges that nobody waited for get a little time, unless the connections are cut already.

    A thread that came back from gloo while the interpreter ends would abort the process. A child has no such thread.
    """
    if os.getpid() != pid:
        return
    if not breakdown.has_happened and not progress.end():
        breakdown.claim()  # what the thread sees now is no failure to tell of
        links.cut()
    progress.end(SECONDS_TO_LET_GO)


def _wait(request: "Work") -> None:
    request.wait(FOREVER)


class GlooExchange(ThreadedExchange["Work"]):
    """The messages of one exchange, those that post_rows() has posted."""

    def __init__(
        self, links: GlooLinks, breakdown: Breakdown, rows: Tensor, out: Tensor, what: str, timeout_s: float
    ) -> None:
        super().__init__(rows, out, what, timeout_s)
        self._links, self._breakdown, self.group = links, breakdown, links.group
        self._receipts: dict[int, Receipt[Work]] = {}

    def watch(self, progress: ProgressThread) -> None:
        """Have every peer's message waited for by a thread of its own: block() takes them in the order of posting."""
        for message in self.messages:
            if message.is_received:
                self._receipts[message.peer] = receipt = Receipt(message, _wait)
                progress.of_peer(message.peer).put(receipt)

    def post_rows(
        self,
        rank: int,
        number: int,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor,
    ) -> None:
        """Post all messages.

        Args: as in Transport.exchange, checked, in a dtype that travels; rank: of this process in the group; number: of
            the exchange among those of this generation.
        Raises:
            TransportError: a peer's connection is closed.
        """

        self.number = number

        def tag(part: Tensor) -> int:
            # Ends that disagree on exchange, size or dtype never meet: gloo aborts a process that gets too many bytes.
            kind = f"{number} {part.numel() * part.element_size()} {part.dtype}"
            return zlib.crc32(kind.encode()) >> 1 | 1

        try:
            self.post(
                rank,
                rows.split(list(input_splits)),
                out.split(list(output_splits)),
                lambda part, peer: self._links.receive(part, peer, tag(part)),
                lambda part, peer: self._links.send(part, peer, tag(part)),
            )
        except LostConnection as lost:
            self._lose(lost.peer)
            self.fail("")

    def block(self) -> None:
        has_lost = []
        num_receives = sum(message.is_received for message in self.messages)
        for number, message in enumerate(self.messages, 1):
            try:
                if message.is_received and message.peer in self._receipts:
                    arrived_at = self._receipts[message.peer].take()
                else:
                    _wait(message.request)
                    arrived_at = time.perf_counter()
                if message.is_received and (self._receipts or num_receives == 1) and arrived_at is not None:
                    self.arrived[message.peer] = arrived_at
            except RuntimeError:
                self._lose(message.peer)
                has_lost.append(message)
            if number == num_receives:
                self.arrived_at = time.perf_counter()
        self.messages = has_lost
        if has_lost:
            self.failure = "messages were lost"
            self._breakdown.note(*self.missing())  # unless the reason is known

    def _lose(self, peer: int) -> None:
        """Note that the peer's connection is closed, where that isn't the consequence of a failure known here."""
        if self._breakdown.claim():
            self._breakdown.note(f"lost its connection to rank {peer}", [peer], [peer])
            self._links.cut()

    def waited_for(self) -> str:
        return self._breakdown.whom(self.missing()[1], self.number)

    def show(self, words: str) -> None:
        self._breakdown.show_wait(self.number, words)

    def fail(self, reason: str) -> NoReturn:
        if self.failure is None and self._breakdown.claim():  # it takes too long
            self._links.cut()
            self.has_ended.wait(SECONDS_TO_STOP)
            self._breakdown.note(*self.missing())
        elapsed = time.perf_counter() - self.posted_at
        where = f"exchange failed {elapsed:.2f} s after it was posted ({self.what})"
        raise TransportError(f"{where}: {self._breakdown.explain()}")
