"""EmulatedTransport: N ranks as threads of one process, with a link model in wall time and faults by script.

Exchanges are matched by number: the s-th one of a rank belongs to the s-th one of every other rank. Only wait() ever
waits for a peer. One thread per world, the delivery thread, copies a message when both of its ends have posted and
its modelled time has come. On CUDA it also looks when the rows of an exchange are ready, where its time starts.
"""

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.config import is_number
from tritonmoe.errors import TransportError
from tritonmoe.transports.base import PendingExchange, Transport, as_counts, check_counts, check_exchange, describe
from tritonmoe.transports.device_clock import DeviceClock, Moment

__all__ = ["Death", "Delay", "EmulatedTransport", "EmulatedWorld", "LinkModel"]

POLL_S = 50e-6
"""How often the delivery thread looks whether a device has computed rows; when it did is read from the device."""


@dataclass(frozen=True)
class LinkModel:
    """A link of every rank: so many bytes a second in each direction, and a fixed time for each message.

    Args:
        bandwidth_gb_per_s: 1e9 bytes a second, per rank and direction; None is infinitely fast.
        latency_us: microseconds that every message takes on top.
    """

    bandwidth_gb_per_s: float | None
    latency_us: float = 0.0

    def __post_init__(self) -> None:
        bandwidth = self.bandwidth_gb_per_s
        if bandwidth is not None and not (is_number(bandwidth) and bandwidth > 0):
            raise ValueError(f"bandwidth_gb_per_s must be a positive number, or None for no limit, got {bandwidth!r}")
        if not (is_number(self.latency_us) and self.latency_us >= 0):
            raise ValueError(f"latency_us must be a finite number that is not negative, got {self.latency_us!r}")

    def transfer_s(self, num_bytes: int) -> float:
        """Give the seconds for which num_bytes occupy a port; the latency is not in it."""
        return 0.0 if self.bandwidth_gb_per_s is None else num_bytes / (self.bandwidth_gb_per_s * 1e9)


@dataclass(frozen=True)
class Delay:
    """A fault: the rank comes to this exchange (counted from 0, count exchanges too) so many seconds late."""

    rank: int
    exchange: int
    seconds: float

    def __post_init__(self) -> None:
        if not (is_number(self.seconds) and self.seconds >= 0):
            raise ValueError(f"seconds must be a finite number that is not negative, got {self.seconds!r}")


@dataclass(frozen=True)
class Death:
    """A fault: the rank stops where it would have made this exchange (counted from 0, count exchanges too)."""

    rank: int
    exchange: int


class RankStopped(BaseException):
    """What a Death raises in its rank's thread; no `except Exception` in the rank's code survives it."""


class PeerFailure(TransportError):
    """An exchange that failed because another rank had failed: never the first cause."""


class EmulatedExchange(PendingExchange):
    """One rank's side of one exchange. The world's lock guards all that changes after the constructor."""

    def __init__(
        self,
        transport: "EmulatedTransport",
        call: str,
        rows: Tensor,
        input_splits: list[int],
        output_splits: list[int],
        out: Tensor,
    ) -> None:
        self.rank = transport.rank
        self.number = -1  # given by the world
        self.words = describe(transport, input_splits, output_splits)
        self.input_splits = input_splits
        self.output_splits = output_splits
        # Every rank must say the same here.
        self.format = f"{call} of rows {tuple(rows.shape[1:])} {rows.dtype} on {rows.device.type}"
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        self.bytes_out = (sum(input_splits) - input_splits[self.rank]) * row_bytes
        self.bytes_in = (sum(output_splits) - output_splits[self.rank]) * row_bytes
        self.ready_at: float | None = None  # when the rows were there to be sent, as soon as that is known
        self.start: float | None = None  # when this rank's port turns to it, as soon as that is known
        self.peers: list[
            EmulatedExchange
        ] = []  # whom it sends to as soon as both have started; empty from its start on
        self.finished: float | None = None
        self.failure: TransportError | None = None
        self.has_changed = threading.Condition(transport.world.lock)

        self._world = transport.world
        self._out = out
        # Messages under way, by peer. Rows that have been copied leave them, and with the last one goes the memory.
        self.outgoing = dict(enumerate(rows.detach().split(input_splits)))
        self.incoming = dict(enumerate(out.detach().split(output_splits)))
        self.incoming.pop(self.rank).copy_(self.outgoing.pop(self.rank), non_blocking=True)
        self.ready: Moment | None = None  # behind it the rows are written and `out` is free
        self.copied: list[torch.cuda.Event] = []
        if transport.world.clock is not None and rows.device == transport.world.device:
            self.ready = transport.world.clock.mark(rows)
            self.copied.append(self.ready.event)

    def wait(self) -> Tensor:
        self._world.wait(self)
        if self._out.is_cuda:
            stream = torch.cuda.current_stream(self._out.device)
            for event in self.copied:
                stream.wait_event(event)
        return self._out

    def finished_at(self) -> float | None:
        # On CUDA the host knows only when the copies were enqueued.
        return None if self._out.is_cuda else self.finished


class EmulatedTransport(Transport):
    """One rank of an EmulatedWorld; run_on_emulated_ranks() makes one for each thread.

    It may be used by one thread at a time. On CUDA all ranks share the device, each on a stream of its own: wait()
    blocks the host until the peers have posted and the modelled time is over, then orders the current stream. Under a
    link model that time starts when the device has computed the rows, and exchanges take their turn as posted.
    """

    def __init__(self, world: "EmulatedWorld", rank: int) -> None:
        self.world = world
        self.rank = rank
        self.size = world.num_ranks

    def exchange(
        self,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor | None = None,
    ) -> PendingExchange:
        return self._exchange("exchange", rows, input_splits, output_splits, out)

    def exchange_counts(self, counts: Tensor) -> Tensor:
        check_counts(self, counts)
        ones = [1] * self.size
        return self._exchange("exchange_counts", counts.contiguous(), ones, ones, None).wait()

    def close(self) -> None:
        """Say that this rank makes no further exchanges; the last rank to do so ends the world."""
        self.world.end_rank(self.rank, None)

    def _exchange(
        self,
        call: str,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor | None,
    ) -> EmulatedExchange:
        input_splits, output_splits = as_counts(input_splits), as_counts(output_splits)
        out = check_exchange(self, rows, input_splits, output_splits, out)
        if rows.is_cuda and rows.device != self.world.device:
            raise ValueError(
                f"rows are on {rows.device}, but these ranks were made for {self.world.device}: "
                f'run_on_emulated_ranks(..., device="{rows.device}")'
            )
        self.world.act_out_faults(self.rank)
        with torch.no_grad():
            exchange = EmulatedExchange(self, call, rows, input_splits, output_splits, out)
        self.world.post(exchange)
        return exchange


class EmulatedWorld:
    """What the ranks share: their exchanges, their ports and the thread that delivers.

    Args:
        num_ranks: W, at least 1.
        device: where the rows live; count exchanges and other CPU rows work in every world.
        link: None delivers as fast as the copies go.
        faults: Delay and Death, at most one of a kind for a rank and exchange.
        timeout_s: how long wait() waits before it raises TransportError.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        device: torch.device | str = "cpu",
        link: LinkModel | None = None,
        faults: Sequence[Delay | Death] = (),
        timeout_s: float = 30.0,
    ) -> None:
        if num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f'ranks are emulated on "cpu" or "cuda", got "{self.device}"')
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f'device="{self.device}" needs a CUDA device and there is none: use device="cpu"')
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
        self.clock = DeviceClock(self.device) if self.device.type == "cuda" else None
        for fault in faults:
            if not isinstance(fault, Delay | Death):
                raise TypeError(f"a fault is a Delay or a Death, got {fault!r}")
            if not 0 <= fault.rank < num_ranks or fault.exchange < 0:
                raise ValueError(f"{fault} must name a rank from 0 to {num_ranks - 1} and an exchange from 0 on")
        self.num_ranks = num_ranks
        self.link = link
        self.timeout_s = timeout_s
        self.lock = threading.Lock()
        self.transports = [EmulatedTransport(self, rank) for rank in range(num_ranks)]
        self._delays = {(fault.rank, fault.exchange): fault.seconds for fault in faults if isinstance(fault, Delay)}
        self._deaths = {(fault.rank, fault.exchange) for fault in faults if isinstance(fault, Death)}
        self._num_posted = [0] * num_ranks
        self._port_is_free_at = [0.0] * num_ranks
        self._not_started: list[deque[EmulatedExchange]] = [deque() for _ in range(num_ranks)]  # as posted, by rank
        self._posted: dict[int, list[EmulatedExchange]] = {}  # by number; goes when every rank is in it
        self._unfinished: set[EmulatedExchange] = set()
        self._ended: dict[int, str | None] = {}  # what the rank raised, if it did; in the order of their ends
        self._closed_because: str | None = None
        self._is_closed = threading.Event()
        self._messages: list[tuple[float, int, EmulatedExchange, EmulatedExchange]] = []  # heap by arrival time
        self._message_number = itertools.count()
        self._has_messages = threading.Condition(self.lock)
        self._delivery_thread: threading.Thread | None = None
        self._copy_streams: list[torch.cuda.Stream] = []

    def act_out_faults(self, rank: int) -> None:
        """Hold up or stop the calling rank if its next exchange is to fail."""
        number = self._num_posted[rank]
        if (rank, number) in self._deaths:
            death = RankStopped(f"rank {rank} was stopped by its fault at exchange {number}")
            self.end_rank(rank, death)
            raise death
        delay_s = self._delays.get((rank, number))
        if delay_s is not None:
            self._is_closed.wait(delay_s)

    def post(self, exchange: EmulatedExchange) -> None:
        """Number an exchange and pair it with those that its peers have posted."""
        rank = exchange.rank
        with self.lock:
            if self._closed_because is not None:
                raise TransportError(f"exchange on closed emulated ranks: {self._closed_because} ({exchange.words})")
            if rank in self._ended:
                raise TransportError(f"exchange on a rank that has ended ({exchange.words})")
            exchange.number = number = self._num_posted[rank]
            self._num_posted[rank] += 1
            if exchange.ready is None or self.link is None:
                exchange.ready_at = time.perf_counter()
            self._not_started[rank].append(exchange)
            self._start_ready(rank)
            self._unfinished.add(exchange)
            peers = self._posted.setdefault(number, [])
            for peer in peers:
                self._pair(exchange, peer)
            peers.append(exchange)
            if len(peers) == self.num_ranks:
                del self._posted[number]
            if exchange.start is None:
                self._wake_delivery()
            for ended_rank in self._ended:
                self._fail_if_waiting_for(exchange, ended_rank)
            self._finish_if_complete(exchange)

    def wait(self, exchange: EmulatedExchange) -> None:
        """Block until the exchange is complete; raise TransportError when it can't be, or takes too long."""
        with self.lock:
            exchange.has_changed.wait_for(
                lambda: exchange.finished is not None or exchange.failure is not None or self._closed_because,
                self.timeout_s,
            )
            if exchange.finished is not None:
                return
            if exchange.failure is not None:
                raise type(exchange.failure)(*exchange.failure.args)
            if self._closed_because is not None:
                raise TransportError(
                    f"exchange {exchange.number} was cut off: {self._closed_because} ({exchange.words})"
                )
            absent = [rank for rank in exchange.incoming if self._num_posted[rank] <= exchange.number]
            if absent:
                reason = f"has not heard from ranks {absent}"
            else:
                under_way = sorted({*exchange.incoming, *exchange.outgoing})
                reason = f"still has rows under way from or to ranks {under_way}: give a longer timeout_s"
            raise TransportError(
                f"exchange {exchange.number} took longer than timeout_s = {self.timeout_s}: "
                f"rank {exchange.rank} {reason} ({exchange.words})"
            )

    def end_rank(self, rank: int, error: BaseException | None) -> None:
        """Note that a rank posts no more, and fail the exchanges that wait for it. The first call counts."""
        with self.lock:
            if rank in self._ended:
                return
            # Words only: the error's traceback holds the rank's tensors, and this world.
            self._ended[rank] = None if error is None else f"{type(error).__name__}: {error}"
            for exchange in list(self._unfinished):
                self._fail_if_waiting_for(exchange, rank)
            all_have_ended = len(self._ended) == self.num_ranks
        if all_have_ended:
            self.close("all ranks have ended")

    def close(self, reason: str = "the emulated ranks were closed") -> None:
        """End the delivery thread; exchanges under way and later ones raise TransportError."""
        with self.lock:
            if self._closed_because is None:
                self._closed_because = reason
            self._is_closed.set()
            self._messages.clear()
            self._posted.clear()
            for waiting in self._not_started:
                for exchange in waiting:
                    exchange.peers.clear()
                waiting.clear()
            self._has_messages.notify_all()
            for exchange in self._unfinished:
                exchange.has_changed.notify_all()
            self._unfinished.clear()
            thread = self._delivery_thread
        if thread is not None:
            thread.join()

    # The methods below are called with the lock held, unless they say otherwise.

    def _pair(self, one: EmulatedExchange, other: EmulatedExchange) -> None:
        """Send the two messages between two ranks on their way, or fail both ranks where they disagree."""
        where = f"exchange {one.number}"
        if one.format != other.format:
            disagreement = f"{where}: rank {one.rank} made {one.format}, rank {other.rank} made {other.format}"
        else:
            disagreement = " and ".join(
                f"rank {sender.rank} sends {sender.input_splits[receiver.rank]} rows to rank {receiver.rank}, "
                f"which expects {receiver.output_splits[sender.rank]}"
                for sender, receiver in ((one, other), (other, one))
                if sender.input_splits[receiver.rank] != receiver.output_splits[sender.rank]
            )
            disagreement = disagreement and f"{where}: {disagreement}"
        if disagreement:
            for exchange in (one, other):
                self._fail(exchange, TransportError(f"{disagreement} ({exchange.words})"))
            return
        if one.start is not None and other.start is not None:
            self._send(one, other)
        for end, peer in ((one, other), (other, one)):
            if end.start is None:
                end.peers.append(peer)

    def _start_ready(self, rank: int) -> None:
        """Let a rank's port turn to the exchanges whose rows are ready, up to the first one whose rows are not."""
        waiting = self._not_started[rank]
        while waiting and (start := waiting[0].ready_at) is not None:
            exchange = waiting.popleft()
            if self.link is not None:
                start = max(start, self._port_is_free_at[rank])
                occupied_s = self.link.transfer_s(max(exchange.bytes_out, exchange.bytes_in))
                self._port_is_free_at[rank] = start + occupied_s
            exchange.start = start
            for peer in exchange.peers:
                if peer.start is not None:
                    self._send(exchange, peer)
            exchange.peers.clear()

    def _send(self, one: EmulatedExchange, other: EmulatedExchange) -> None:
        """Send the two messages between two ranks, whose ports have both turned to them, on their way."""
        assert one.start is not None
        assert other.start is not None
        for sender, receiver in ((one, other), (other, one)):
            arrival = max(one.start, other.start)
            if self.link is not None:
                arrival += self.link.transfer_s(max(sender.bytes_out, receiver.bytes_in)) + self.link.latency_us * 1e-6
            heapq.heappush(self._messages, (arrival, next(self._message_number), sender, receiver))
        self._wake_delivery()

    def _wake_delivery(self) -> None:
        if self._delivery_thread is None:
            self._delivery_thread = threading.Thread(target=self._deliver, name="emulated-delivery", daemon=True)
            self._delivery_thread.start()
        self._has_messages.notify()

    def _fail_if_waiting_for(self, exchange: EmulatedExchange, rank: int) -> None:
        if rank == exchange.rank or self._num_posted[rank] > exchange.number:
            return
        error = self._ended[rank]
        if error is None:
            failure = TransportError(
                f"exchange {exchange.number}: rank {rank} returned or closed after {self._num_posted[rank]} exchanges, "
                f"but every rank must make the same ones ({exchange.words})"
            )
        else:
            failure = PeerFailure(f"exchange {exchange.number}: rank {rank} failed with {error} ({exchange.words})")
        self._fail(exchange, failure)

    def _fail(self, exchange: EmulatedExchange, failure: TransportError) -> None:
        if exchange.failure is None and exchange.finished is None:
            exchange.failure = failure
            self._unfinished.discard(exchange)
            exchange.has_changed.notify_all()

    def _finish_if_complete(self, exchange: EmulatedExchange) -> None:
        if not exchange.incoming and not exchange.outgoing and exchange.failure is None:
            exchange.finished = time.perf_counter()
            self._unfinished.discard(exchange)
            exchange.has_changed.notify_all()

    def _deliver(self) -> None:
        """Run the delivery thread. Called without the lock."""
        # Rows posted under inference mode may be written only under it; everybody else's may be too.
        with torch.inference_mode():
            while self._deliver_next():
                pass

    def _deliver_next(self) -> bool:
        """Copy the next message, or wait a while; False when the world is closed. Called without the lock."""
        if self.clock is not None:
            self._note_ready()
        with self.lock:
            if self._closed_because is not None:
                return False
            wait_s = self._messages[0][0] - time.perf_counter() if self._messages else None
            if wait_s is None or wait_s > 0:
                if any(self._not_started):
                    wait_s = POLL_S if wait_s is None else min(wait_s, POLL_S)
                self._has_messages.wait(wait_s)
                return True
            _, _, sender, receiver = heapq.heappop(self._messages)
            source, target = sender.outgoing[receiver.rank], receiver.incoming[sender.rank]
            is_wanted = receiver.failure is None
        # Not under the lock: posting must never wait for a copy.
        failure = None
        copied = None
        if is_wanted and source.shape[0] > 0:
            try:
                copied = self._copy(sender, receiver, source, target)
            except Exception as error:
                failure = (
                    f"exchange {sender.number}: copying from rank {sender.rank} to {receiver.rank} failed: {error}"
                )
        with self.lock:
            del sender.outgoing[receiver.rank], receiver.incoming[sender.rank]
            for exchange in (sender, receiver):
                if copied is not None:
                    exchange.copied.append(copied)
                if failure is not None:
                    self._fail(exchange, TransportError(f"{failure} ({exchange.words})"))
                self._finish_if_complete(exchange)
        return True

    def _note_ready(self) -> None:
        """Start the exchanges whose rows the device has computed since. Called without the lock."""
        with self.lock:
            firsts = [waiting[0] for waiting in self._not_started if waiting]
        for exchange in firsts:
            assert exchange.ready is not None
            failure = None
            try:
                if not exchange.ready.has_come():
                    continue
                # Not under the lock either: it asks the device what time it is.
                ready_at = exchange.ready.time()
            except Exception as error:
                ready_at = time.perf_counter()
                failure = f"exchange {exchange.number}: the rows of rank {exchange.rank} were not computed: {error}"
            with self.lock:
                exchange.ready_at = ready_at
                if failure is not None:
                    self._fail(exchange, TransportError(f"{failure} ({exchange.words})"))
                self._start_ready(exchange.rank)

    def _copy(
        self, sender: EmulatedExchange, receiver: EmulatedExchange, source: Tensor, target: Tensor
    ) -> torch.cuda.Event | None:
        """Copy one message; on CUDA enqueue it and give the event behind it. Called without the lock."""
        if not target.is_cuda:
            target.copy_(source)
            return None
        if not self._copy_streams:
            self._copy_streams = [torch.cuda.Stream(self.device, priority=-1) for _ in range(self.num_ranks)]
        stream = self._copy_streams[receiver.rank]
        with torch.cuda.stream(stream):
            for end in (sender, receiver):
                assert end.ready is not None, "CUDA rows are posted with an event"
                stream.wait_event(end.ready.event)
            target.copy_(source, non_blocking=True)
            # A rank may drop either tensor without ever waiting; the allocator must then know of this copy.
            source.record_stream(stream)
            target.record_stream(stream)
            return stream.record_event()
