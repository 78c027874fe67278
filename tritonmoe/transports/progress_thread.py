"""ProgressThread: it waits inside gloo or MPI for as long as messages of its transport are under way."""

import math
import queue
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from tritonmoe.transports.base import PendingExchange
from tritonmoe.transports.waiting import LongWait, wait_aloud

__all__ = ["LABEL", "Message", "ProgressThread", "Receipt", "ThreadedExchange"]

LABEL = "tritonmoe:all_to_all"
"""How the label of an exchange begins in a trace of torch.profiler, which has its messages without their peers."""

SECONDS_TO_STOP = 2.0
"""How long a process that ends waits for exchanges that nobody waited for."""
SECONDS_TO_LET_GO = 0.2
"""How long it waits for the thread to come back from connections that are cut. If it doesn't at once, it never does."""


Request = TypeVar("Request")
"""What the library gives for a message that it was told to send or receive."""


@dataclass(frozen=True)
class Message(Generic[Request]):
    """One message under way."""

    request: Request
    """The library's; it doesn't keep the exchange alive."""
    peer: int
    is_received: bool


class ThreadedExchange(PendingExchange, Generic[Request]):
    """The messages of one exchange; a ProgressThread waits for them, so that the caller's wait can be interrupted."""

    def __init__(self, rows: Tensor, out: Tensor, what: str, timeout_s: float | None) -> None:
        self.what = what
        self.messages: list[Message[Request]] = []
        """The messages that haven't ended, as far as that is known; those that this rank receives stand first."""
        self.has_ended = threading.Event()
        self.arrived_at: float | None = None
        self.arrived: dict[int, float] = {}
        """By rank: when its rows had come, as far as that is known."""
        self.failure: str | None = None
        self._rows: Tensor | None = rows  # read until the messages have left
        self._out = out
        self._timeout_s = timeout_s
        self._rank, self._size = 0, 0  # as posted
        self.number = 0
        """Of the exchange among those of its group, the same on all ranks."""
        self.group: tuple[str, Sequence[int]] = "", ()
        """What its transport's generation is called on all ranks, and the numbers of these ranks in the job."""
        self.posted_at = time.perf_counter()

    def post(
        self,
        rank: int,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        receive: Callable[[Tensor, int], Request],
        send: Callable[[Tensor, int], Request],
    ) -> None:
        """Post a message to and from every other rank that has rows, the receives first, and copy this rank's own.

        A peer whose receive is posted can send at once, and the library needs no copy of what comes.

        Args:
            sent, received: the rows for and from each rank.
            receive, send: post a message, given the rows and the peer, and give the library's request.
        """
        self._rank, self._size = rank, len(sent)
        size, is_profiled = self._size, torch.autograd._profiler_enabled()
        with torch.profiler.record_function(_label(self, sent, received)) if is_profiled else nullcontext():
            for step in range(1, size):
                peer = (rank - step) % size
                if received[peer].numel():
                    self.messages.append(Message(receive(received[peer], peer), peer, True))
            for step in range(1, size):
                peer = (rank + step) % size
                if sent[peer].numel():
                    self.messages.append(Message(send(sent[peer], peer), peer, False))
            received[rank].copy_(sent[rank])

    @abstractmethod
    def block(self) -> None:
        """Wait for all messages, on the progress thread; set `failure` where one fails, and arrived_at where known."""

    @abstractmethod
    def fail(self, reason: str) -> NoReturn:
        """Raise TransportError."""

    def missing(self) -> tuple[str, list[int]]:
        """Return what has not come in time, to stand behind "rank k", and the ranks that are taken for the cause."""
        messages = list(self.messages)
        ranks = sorted({message.peer for message in messages if message.is_received})
        if ranks:
            return f"has not heard from ranks {ranks} within timeout_s = {self._timeout_s}", ranks
        ranks = sorted({message.peer for message in messages})
        return f"could not send all rows to ranks {ranks} within timeout_s = {self._timeout_s}", ranks

    def waited_for(self) -> str:
        """Name the ranks that this one waits for."""
        received = sorted({message.peer for message in self.messages if message.is_received})
        return f"ranks {received or sorted({message.peer for message in self.messages})}"

    def show(self, words: str) -> None:
        """Show the other ranks what this one waits in; "" when it is over."""

    def wait(self) -> Tensor:
        if not self.has_ended.wait(0) and not self._wait_aloud():
            self.fail(f"it took longer than timeout_s = {self._timeout_s}")
        if self.failure is not None:
            self.fail(self.failure)
        self._rows = None
        return self._out

    def _wait_aloud(self) -> bool:
        who = f"rank {self._rank} of {self._size}"
        long = LongWait(who, self.waited_for, self.what, self._timeout_s, self.show)
        return wait_aloud(self.has_ended.wait, long, self._timeout_s)

    def finished_at(self) -> float | None:
        return self.arrived_at if self.has_ended.is_set() else None

    def arrivals(self) -> tuple[float | None, ...] | None:
        return tuple(map(self.arrived.get, range(self._size))) if self.has_ended.is_set() else None


def _label(exchange: ThreadedExchange, sent: Sequence[Tensor], received: Sequence[Tensor]) -> str:
    """Return what a trace is to tell of an exchange: its group, its number there, and the rows for and from each rank.

    For example "tritonmoe:all_to_all group 0/0 ranks 0,1 number 7 row_bytes 64 element_bytes 4 sent 3,5 received 3,2".
    """
    name, ranks = exchange.group
    row_bytes = math.prod(sent[0].shape[1:]) * sent[0].element_size()
    numbers = (ranks, map(len, sent), map(len, received))
    of_ranks, of_sent, of_received = (",".join(map(str, of)) for of in numbers)
    return (
        f"{LABEL} group {name} ranks {of_ranks} number {exchange.number} row_bytes {row_bytes} "
        f"element_bytes {sent[0].element_size()} sent {of_sent} received {of_received}"
    )


class Receipt(Generic[Request]):
    """One received message, for which a thread of its own waits, so that it is known when it came."""

    def __init__(self, message: Message[Request], wait: Callable[[Request], object]) -> None:
        self._message, self._wait = message, wait
        self.has_ended = threading.Event()
        self.arrived_at: float | None = None
        self.failure: RuntimeError | None = None

    def block(self) -> None:
        try:
            self._wait(self._message.request)
        except RuntimeError as error:
            self.failure = error

    def take(self) -> float | None:
        """Wait until it has come and give when it did; raises RuntimeError where it can't come."""
        self.has_ended.wait()
        if self.failure is not None:
            raise self.failure
        return self.arrived_at


class ProgressThread:
    """Waits for exchanges in the order in which they were posted. It starts with the first one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._under_way: queue.SimpleQueue[ThreadedExchange | Receipt | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._of_peer: dict[int, ProgressThread] = {}

    def of_peer(self, peer: int) -> "ProgressThread":
        """Return the thread that waits for what comes from one peer; it ends before this one."""
        if peer not in self._of_peer:
            self._of_peer[peer] = ProgressThread(f"{self._name}-{peer}")
        return self._of_peer[peer]

    def add(self, exchange: ThreadedExchange) -> None:
        if not exchange.messages:
            exchange.arrived_at = time.perf_counter()
            exchange.has_ended.set()
            return
        self.put(exchange)

    def put(self, exchange: ThreadedExchange | Receipt) -> None:
        """Wait for it behind those before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._under_way.put(exchange)

    def end(self, within_s: float = SECONDS_TO_STOP) -> bool:
        """End the threads when nothing is under way any more, and return whether they have ended."""
        deadline = time.perf_counter() + within_s
        threads = [thread.end(max(0.0, deadline - time.perf_counter())) for thread in self._of_peer.values()]
        return self._end_own(max(0.0, deadline - time.perf_counter())) and all(threads)

    def _end_own(self, within_s: float) -> bool:
        self._under_way.put(None)
        if self._thread is None or self._thread is threading.current_thread():
            return True
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (exchange := self._under_way.get()) is not None:
            exchange.block()
            exchange.arrived_at = exchange.arrived_at or time.perf_counter()
            exchange.has_ended.set()
            del exchange  # its tensors
