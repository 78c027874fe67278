"""Delivery: emulated exchanges, when their messages leave and arrive, and the thread that copies them then.

A rank's port turns to its exchanges one after the other, as they were posted, each when its rows are ready. On CUDA the
thread also looks when that is, where an exchange's time starts.
"""

import heapq
import itertools
import math
import threading
import time
from collections import deque

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports.base import Transport
from tritonmoe.transports.device_clock import DeviceClock, Moment
from tritonmoe.transports.emulated.link_model import LinkModel
from tritonmoe.transports.exchange_arguments import describe

__all__ = ["Delivery", "EmulatedExchange"]

POLL_S = 50e-6
"""How often the thread looks whether a device has computed rows; when it did is read from the device."""


class EmulatedExchange:
    """One rank's side of one exchange. The world's lock guards what changes after the constructor."""

    def __init__(
        self,
        delivery: "Delivery",
        transport: Transport,
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
        bytes_out = (sum(input_splits) - input_splits[self.rank]) * row_bytes
        bytes_in = (sum(output_splits) - output_splits[self.rank]) * row_bytes
        self.link = link = delivery.link
        # How long this rank's port is occupied in each direction.
        self.out_s, self.in_s = (
            0.0 if link is None else link.transfer_s(of, self.rank) for of in (bytes_out, bytes_in)
        )
        self.ready_at: float | None = None  # when the rows were there to be sent, as soon as that is known
        self.start: float | None = None  # when this rank's port turns to it, as soon as that is known
        # Whom it sends to as soon as both have started; empty from its start on.
        self.peers: list[EmulatedExchange] = []
        self.finished: float | None = None
        self.arrived: dict[int, float] = {}  # by rank: when its rows had been copied
        self.failure: TransportError | None = None
        self.has_changed = threading.Condition(delivery.lock)

        self._unfinished = delivery.unfinished
        # Messages under way, by peer. Rows that have been copied leave them, and with the last one goes the memory.
        self.outgoing = dict(enumerate(rows.detach().split(input_splits)))
        self.incoming = dict(enumerate(out.detach().split(output_splits)))
        self.incoming.pop(self.rank).copy_(self.outgoing.pop(self.rank), non_blocking=True)
        self.ready: Moment | None = None  # behind it the rows are written and `out` is free
        self.copied: list[torch.cuda.Event] = []
        if delivery.clock is not None and rows.device == delivery.device:
            self.ready = delivery.clock.mark(rows)
            self.copied.append(self.ready.event)

    def fail(self, failure: TransportError) -> None:
        """Note why it can't be completed, once. Called with the world's lock held."""
        if self.failure is None and self.finished is None:
            self.failure = failure
            self._end()

    def finish_if_complete(self) -> None:
        """Note the time if no message is under way any more. Called with the world's lock held."""
        if not self.incoming and not self.outgoing and self.failure is None:
            self.finished = time.perf_counter()
            self._end()

    def _end(self) -> None:
        self._unfinished.discard(self)
        self.has_changed.notify_all()


class Delivery:
    """The ports of all ranks, and one thread that copies a message when both of its ends have posted and its time came.

    Methods are called with the world's lock held, unless they say otherwise.
    """

    def __init__(self, num_ranks: int, device: torch.device, link: LinkModel | None, lock: threading.Lock) -> None:
        self.link = link
        self.device = device
        self.lock = lock
        self.clock = DeviceClock(device) if device.type == "cuda" else None
        self.unfinished: set[EmulatedExchange] = set()
        self._port_is_free_at = [0.0] * num_ranks
        self._link_is_free_at: dict[tuple[int, int], float] = {}
        self._not_started: list[deque[EmulatedExchange]] = [deque() for _ in range(num_ranks)]  # as posted, by rank
        self._messages: list[tuple[float, int, EmulatedExchange, EmulatedExchange]] = []  # heap by arrival time
        self._message_number = itertools.count()
        self._has_messages = threading.Condition(lock)
        self._thread: threading.Thread | None = None
        self._copy_streams: list[torch.cuda.Stream] = []
        self._is_closed = False

    def post(self, exchange: EmulatedExchange) -> None:
        """Queue the exchange at the rank's port, which takes it after earlier ones and once its rows are ready."""
        self.unfinished.add(exchange)
        if exchange.ready is None or self.link is None:
            exchange.ready_at = time.perf_counter()
        self._not_started[exchange.rank].append(exchange)
        self._start_ready(exchange.rank)
        if exchange.start is None:
            self._wake()

    def connect(self, one: EmulatedExchange, other: EmulatedExchange) -> None:
        """Send the two messages between two ranks as soon as both ports have turned to them."""
        if one.start is not None and other.start is not None:
            self._send(one, other, max(one.start, other.start))
        for end, peer in ((one, other), (other, one)):
            if end.start is None:
                end.peers.append(peer)

    def close(self) -> None:
        """Forget what is under way and let the thread end."""
        self._is_closed = True
        self._messages.clear()
        for waiting in self._not_started:
            for exchange in waiting:
                exchange.peers.clear()
            waiting.clear()
        for exchange in self.unfinished:
            exchange.has_changed.notify_all()
        self.unfinished.clear()
        self._has_messages.notify_all()

    def join(self) -> None:
        """Wait until the thread has ended. Called without the lock."""
        if self._thread is not None:
            self._thread.join()

    def _start_ready(self, rank: int) -> None:
        """Start the exchanges at a rank's port whose rows are ready, up to the first one whose rows are not."""
        waiting = self._not_started[rank]
        while waiting and (start := waiting[0].ready_at) is not None:
            exchange = waiting.popleft()
            if exchange.link is not None:
                start = max(start, self._port_is_free_at[rank])
                self._port_is_free_at[rank] = start + max(exchange.out_s, exchange.in_s)
            exchange.start = start
            for peer in exchange.peers:
                if peer.start is not None:
                    self._send(exchange, peer, max(start, peer.start))
            exchange.peers.clear()

    def _send(self, one: EmulatedExchange, other: EmulatedExchange, start: float) -> None:
        """Send the two messages between two ranks on their way; at `start` both ports have turned to them."""
        for sender, receiver in ((one, other), (other, one)):
            arrival = start if sender.link is None else self._arrival(sender.link, sender, receiver, start)
            heapq.heappush(self._messages, (arrival, next(self._message_number), sender, receiver))
        self._wake()

    def _arrival(self, link: LinkModel, sender: EmulatedExchange, receiver: EmulatedExchange, start: float) -> float:
        """Return when a message arrives to which both ports turned at `start`; on a slow link it waits its turn."""
        ends, link_s = (sender.rank, receiver.rank), 0.0
        if ends in link.slow_links:
            rows = sender.outgoing[receiver.rank]
            link_s = link.link_s(rows.numel() * rows.element_size(), *ends)
            start = max(start, self._link_is_free_at.get(ends, 0.0))
            self._link_is_free_at[ends] = start + link_s
        return start + max(link_s, sender.out_s, receiver.in_s) + link.message_s(*ends)

    def _wake(self) -> None:
        """Wake the thread to look at what has changed; the first such call starts it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver, name="emulated-delivery", daemon=True)
            self._thread.start()
        self._has_messages.notify()

    def _deliver(self) -> None:
        """Run the delivery thread. Called without the lock."""
        # Rows posted under inference mode may be written only under it; everybody else's may be too.
        with torch.inference_mode():
            while self._deliver_next():
                pass

    def _deliver_next(self) -> bool:
        """Copy the next message, or wait a while; False when the world is closed. Called without the lock."""
        if any(self._not_started):
            self._note_ready()
        with self.lock:
            if self._is_closed:
                return False
            due = self._next_with_rows()
            if due is None:
                wait_s = self._messages[0][0] - time.perf_counter() if self._messages else None
                if any(self._not_started):
                    wait_s = POLL_S if wait_s is None else min(wait_s, POLL_S)
                if wait_s is None or wait_s > 0:
                    self._has_messages.wait(wait_s)
                return True
            sender, receiver = due
            source, target = sender.outgoing[receiver.rank], receiver.incoming[sender.rank]
        # Not under the lock: posting must never wait for a copy.
        failure = None
        copied = None
        try:
            copied = self._copy(sender, receiver, source, target)
        except Exception as error:
            failure = f"exchange {sender.number}: copying from rank {sender.rank} to {receiver.rank} failed: {error}"
        with self.lock:
            for exchange in (sender, receiver):
                if copied is not None:
                    exchange.copied.append(copied)
                if failure is not None:
                    exchange.fail(TransportError(f"{failure} ({exchange.words})"))
            # Whoever waits goes on when the lock is free: the rows must not be held here any longer by then.
            del exchange, source, target
            self._finish(sender, receiver)
            del due, sender, receiver
        return True

    def _next_with_rows(self) -> tuple[EmulatedExchange, EmulatedExchange] | None:
        """Return sender and receiver of the next message that is due, if there is one; finish empty ones before it."""
        while self._messages and self._messages[0][0] <= time.perf_counter():
            _, _, sender, receiver = heapq.heappop(self._messages)
            if receiver.failure is None and sender.outgoing[receiver.rank].shape[0] > 0:
                return sender, receiver
            self._finish(sender, receiver)
        return None

    def _finish(self, sender: EmulatedExchange, receiver: EmulatedExchange) -> None:
        """Take a message off both its ends."""
        del receiver.incoming[sender.rank]
        if sender.outgoing.pop(receiver.rank).shape[0] > 0:
            receiver.arrived[sender.rank] = time.perf_counter()
        sender.finish_if_complete()
        receiver.finish_if_complete()

    def _note_ready(self) -> None:
        """Start the exchanges whose rows the device has computed since. Called without the lock."""
        with self.lock:
            firsts = [waiting[0] for waiting in self._not_started if waiting]
        # An exchange without a moment, on a CPU, was ready when it was posted.
        for exchange, ready in ((exchange, exchange.ready) for exchange in firsts if exchange.ready is not None):
            failure = None
            try:
                if not ready.has_come():
                    continue
                # Not under the lock either: it asks the device what time it is.
                ready_at = ready.time()
            except Exception as error:
                ready_at = time.perf_counter()
                failure = f"exchange {exchange.number}: the rows of rank {exchange.rank} were not computed: {error}"
            with self.lock:
                exchange.ready_at = ready_at
                if failure is not None:
                    exchange.fail(TransportError(f"{failure} ({exchange.words})"))
                self._start_ready(exchange.rank)

    def _copy(
        self, sender: EmulatedExchange, receiver: EmulatedExchange, source: Tensor, target: Tensor
    ) -> torch.cuda.Event | None:
        """Copy one message; on CUDA enqueue it and give the event behind it. Called without the lock."""
        if not target.is_cuda:
            target.copy_(source)
            return None
        if not self._copy_streams:
            self._copy_streams = [torch.cuda.Stream(self.device, priority=-1) for _ in self._not_started]
        stream = self._copy_streams[receiver.rank]
        with torch.cuda.stream(stream):
            for ready in (sender.ready, receiver.ready):
                if ready is not None:  # rows on a CPU are there
                    stream.wait_event(ready.event)
            target.copy_(source, non_blocking=True)
            # A rank may drop either tensor without ever waiting; the allocator must then know of this copy.
            source.record_stream(stream)
            target.record_stream(stream)
            return stream.record_event()
