"""EmulatedExchange: one emulated rank's side of one exchange, from its post to its last message."""

import math
import threading
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports.base import PendingExchange
from tritonmoe.transports.device_clock import Moment
from tritonmoe.transports.exchange_arguments import describe

if TYPE_CHECKING:
    from tritonmoe.transports.emulated.transport import EmulatedTransport

__all__ = ["EmulatedExchange"]


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
        bytes_out = (sum(input_splits) - input_splits[self.rank]) * row_bytes
        bytes_in = (sum(output_splits) - output_splits[self.rank]) * row_bytes
        self.link = link = transport.world.link
        # How long this rank's port is occupied in each direction.
        self.out_s, self.in_s = (
            0.0 if link is None else link.transfer_s(of, self.rank) for of in (bytes_out, bytes_in)
        )
        self.ready_at: float | None = None  # when the rows were there to be sent, as soon as that is known
        self.start: float | None = None  # when this rank's port turns to it, as soon as that is known
        self.peers: list[
            EmulatedExchange
        ] = []  # whom it sends to as soon as both have started; empty from its start on
        self.finished: float | None = None
        self.arrived: dict[int, float] = {}  # by rank: when its rows had been copied
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
        self._world.unfinished.discard(self)
        self.has_changed.notify_all()

    def finished_at(self) -> float | None:
        # On CUDA the host knows only when the copies were enqueued.
        return None if self._out.is_cuda else self.finished

    def arrivals(self) -> tuple[float | None, ...] | None:
        return None if self._out.is_cuda else tuple(map(self.arrived.get, range(len(self.input_splits))))
