"""Exchanges over a group that enqueues them on the device (NCCL): of rows, and of counts where there is no gloo."""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports.base import PendingExchange, Transport
from tritonmoe.transports.notices import Breakdown

if TYPE_CHECKING:
    from torch.distributed import Work

__all__ = ["CollectiveExchange", "CountsCrossing"]


class CollectiveExchange(PendingExchange):
    """An asynchronous all_to_all_single of a backend that only the current stream waits for, and its two tensors."""

    def __init__(self, breakdown: Breakdown, work: "Work", rows: Tensor, out: Tensor, what: str) -> None:
        self._breakdown = breakdown
        self._work = work
        self._rows: Tensor | None = rows  # the collective reads it until wait() has returned
        self._out = out
        self._what = what
        self._posted_at = time.perf_counter()

    def wait(self) -> Tensor:
        try:
            # It only orders the current stream, so it is repeated for a caller on another stream.
            self._work.wait()
        except RuntimeError as error:
            elapsed = time.perf_counter() - self._posted_at
            if self._breakdown.claim():
                self._breakdown.note(f"lost an exchange: {error}")
            raise TransportError(
                f"exchange failed {elapsed:.2f} s after it was posted ({self._what}): {error}"
            ) from error
        if self._out.is_cuda:
            stream = torch.cuda.current_stream(self._out.device)
            self._out.record_stream(stream)
            if self._rows is not None:
                self._rows.record_stream(stream)
        self._rows = None
        return self._out


class CountsCrossing:
    """Sends counts through a group that has only NCCL: from pinned memory to the device, to the peers, and back."""

    def __init__(self) -> None:
        self._pinned: dict[int, tuple[Tensor, Tensor]] = {}
        """What is sent, and what is received, by their length."""
        self._stream: torch.cuda.Stream | None = None

    def exchange(self, transport: Transport, counts: Tensor) -> Tensor:
        """Give what every rank sent in row `transport.rank` of its counts (W, L); the host waits for it."""
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "counts can't cross NCCL while a CUDA graph is captured, since the host waits for them: initialise the "
                'group with backend="cpu:gloo,cuda:nccl"'
            )
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        size, length = counts.shape
        if length not in self._pinned:
            pinned = torch.empty(2, size, length, dtype=torch.int64, pin_memory=True, device="cpu")
            self._pinned[length] = (pinned[0], pinned[1])
        pinned_in, pinned_out = self._pinned[length]
        pinned_in.copy_(counts)
        ones = [1] * size
        # A stream of its own: on the current one the host would wait for all compute that is queued there.
        with torch.cuda.stream(self._stream):
            sent = pinned_in.to(self._stream.device, non_blocking=True)
            received = transport.exchange(sent, ones, ones).wait()
            pinned_out.copy_(received, non_blocking=True)
        self._stream.synchronize()
        return pinned_out.clone()

    def forget(self) -> None:
        """Release the pinned memory and the stream."""
        self._pinned.clear()
        self._stream = None
