"""CollectiveExchange: rows over a group that enqueues its exchanges on the device (NCCL)."""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports.base import PendingExchange, Transport

if TYPE_CHECKING:
    from torch.distributed import Work

__all__ = ["CollectiveExchange"]


class CollectiveExchange(PendingExchange):
    """An asynchronous all_to_all_single of a backend that only the current stream waits for, and its two tensors."""

    def __init__(self, transport: Transport, work: "Work", rows: Tensor, out: Tensor, what: str) -> None:
        self._transport, self._generation = transport, transport.generation
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
            if self._generation == self._transport.generation:  # otherwise it was rebuilt since
                self._transport.give_up(f"lost an exchange: {error}")
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
