"""ReplayTransport: one rank of many runs alone; the others answer as they did in a call that was recorded."""

import math
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports.base import PendingExchange, Transport
from tritonmoe.transports.device_clock import DeviceClock, Moment
from tritonmoe.transports.emulated.link_model import LinkModel
from tritonmoe.transports.exchange_arguments import as_counts, check_counts, check_exchange, describe
from tritonmoe.transports.local import CompletedExchange

__all__ = ["Port", "ReplayTransport"]

SPIN_S = 200e-6
"""A sleep ends so long before the time that is waited for, since it may overshoot; the rest is polled."""


class Port:
    """A rank's port under a link model: exchanges take their turn, in the order in which they were posted.

    An exchange takes max(bytes out, bytes in) / bandwidth, from when its rows are ready and the port is free, and the
    latency on top: the peers are taken to post when this rank does, and to have no more to send and receive.
    """

    def __init__(self, link: LinkModel) -> None:
        self.link = link
        self._is_free_at = 0.0
        self._posted: deque[ReplayExchange] = deque()
        self._on_device: tuple[torch.cuda.Stream, DeviceClock] | None = None

    def post(self, exchange: "ReplayExchange") -> None:
        self._posted.append(exchange)

    def arrival(self, exchange: "ReplayExchange") -> float:
        """Return the time.perf_counter() at which an exchange's rows arrive; wait until its own rows are ready."""
        while exchange.arrives_at is None:
            first = self._posted.popleft()
            start = max(first.ready_at(), self._is_free_at)
            self._is_free_at = start + self.link.transfer_s(first.num_bytes)
            first.arrives_at = self._is_free_at + self.link.latency_us * 1e-6
        return exchange.arrives_at

    def on_device(self, device: torch.device) -> tuple[torch.cuda.Stream, DeviceClock]:
        """Return the stream that copies, and the device's clock."""
        if self._on_device is None:
            # Of high priority: a stream of the ordinary pool might be the one that computes.
            self._on_device = torch.cuda.Stream(device, priority=-1), DeviceClock(device)
        return self._on_device


class ReplayExchange(PendingExchange):
    """Recorded rows that arrive when the port says so.

    On CUDA they are copied on a stream of the port's; wait() blocks the host until they have arrived.
    """

    def __init__(self, port: Port, recorded: Tensor, out: Tensor, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.arrives_at: float | None = None  # set by the port
        self._port, self._out = port, out
        self._posted_at = time.perf_counter()
        self._ready: Moment | None = None  # behind it the rows that are sent are written and `out` is free
        self._copied: torch.cuda.Event | None = None
        if out.is_cuda:
            copying, clock = port.on_device(out.device)
            self._ready = clock.mark(out)
            copying.wait_event(self._ready.event)
            with torch.cuda.stream(copying):
                out.copy_(recorded, non_blocking=True)
            out.record_stream(copying)
            self._copied = copying.record_event()
        else:
            out.copy_(recorded)
        port.post(self)

    def ready_at(self) -> float:
        """Return the time.perf_counter() at which the rows that are sent were ready; blocks until then.

        On CUDA the host posts them long before the device has computed them.
        """
        return self._posted_at if self._ready is None else self._ready.time()

    def wait(self) -> Tensor:
        arrival = self._port.arrival(self)
        while (left := arrival - time.perf_counter()) > 0:
            time.sleep(max(0.0, left - SPIN_S))
        if self._copied is not None:
            torch.cuda.current_stream(self._out.device).wait_event(self._copied)
        return self._out

    def finished_at(self) -> float | None:
        return None if self._out.is_cuda else self.arrives_at


class ReplayTransport(Transport):
    """Passes its first call on and remembers what came; from then on gives that, without any peer.

    Call rewind() before each call: it must make the exchanges of the recorded one. The rows that it sends are not
    looked at. What this rank says in a count exchange otherwise than in the recorded one, all ranks say: they count
    their calls alike, and have the same wishes for plans and the same times.

    Args:
        transport: what the recorded call goes over.
        port: when rows arrive after that; None: at once, what remains of the link is one copy of the rows.
    """

    def __init__(self, transport: Transport, port: Port | None = None) -> None:
        self.rank, self.size = transport.rank, transport.size
        self.received: list[Tensor] = []
        """By every exchange of the recorded call; another transport's may be put here."""
        self._transport, self._port = transport, port
        self._position: int | None = None

    def rewind(self) -> None:
        """Begin a call: the first one, which is passed on, or another one like it."""
        self._position = 0 if self.received else None

    def exchange(
        self, rows: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], out: Tensor | None = None
    ) -> PendingExchange:
        if self._position is None:
            received = self._transport.exchange(rows, input_splits, output_splits, out).wait()
            self.received.append(received.detach().clone())
            return CompletedExchange(received)
        input_splits, output_splits = as_counts(input_splits), as_counts(output_splits)
        out = check_exchange(self, rows, input_splits, output_splits, out)
        return self._replay(self._position, rows, input_splits, output_splits, out)

    def post_counts(self, counts: Tensor) -> PendingExchange:
        if self._position is None:
            self.received.append(self._transport.exchange_counts(counts))
            return CompletedExchange(self.received[-1].clone())
        check_counts(self, counts)
        ones = [1] * self.size
        told = self._replay(self._position, counts, ones, ones, torch.empty_like(counts)).wait()
        is_new = counts[self.rank] != told[self.rank]
        told[:, is_new] = counts[self.rank, is_new]
        return CompletedExchange(told)

    def _replay(
        self, position: int, rows: Tensor, input_splits: list[int], output_splits: list[int], out: Tensor
    ) -> PendingExchange:
        """Return the recorded rows of this position in `out`, and go on to the next one."""
        self._position = position + 1
        recorded = self.received[position] if position < len(self.received) else None
        if recorded is None or (recorded.shape, recorded.dtype) != (out.shape, out.dtype):
            what = "none" if recorded is None else f"{tuple(recorded.shape)} {recorded.dtype}"
            raise TransportError(
                f"exchange {position} of a replayed call receives {tuple(out.shape)} {out.dtype}, recorded was {what}: "
                f"record a call of the same plan and routing ({describe(self, input_splits, output_splits)})"
            )
        if self._port is None:
            out.copy_(recorded)
            return CompletedExchange(out)
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        travelling = (sum(splits) - splits[self.rank] for splits in (input_splits, output_splits))
        return ReplayExchange(self._port, recorded, out, max(travelling) * row_bytes)
