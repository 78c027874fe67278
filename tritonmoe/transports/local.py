"""LocalTransport: one rank, so that every row is at home already."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.runtime.other_ranks import has_other_ranks
from tritonmoe.transports.base import PendingExchange, Transport
from tritonmoe.transports.exchange_arguments import as_counts, check_counts, check_exchange

__all__ = ["LocalTransport"]


class CompletedExchange(PendingExchange):
    """Rows that have arrived."""

    def __init__(self, received: Tensor) -> None:
        self._received = received
        self._finished_at = time.perf_counter()

    def wait(self) -> Tensor:
        return self._received

    def finished_at(self) -> float | None:
        return None if self._received.is_cuda else self._finished_at


class LocalTransport(Transport):
    """The transport of one device: what this rank sends, it receives.

    Without `out`, exchange() gives `rows` itself, not a copy.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._is_closed = False

    @property
    def job_ranks(self) -> tuple[int, ...] | None:
        """This process alone, where torch.distributed knows others."""
        return (torch.distributed.get_rank(),) if has_other_ranks() else None

    def exchange(
        self,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor | None = None,
    ) -> PendingExchange:
        self._check_open()
        received = rows if out is None else out
        check_exchange(self, rows, as_counts(input_splits), as_counts(output_splits), received)
        if out is not None:
            out.copy_(rows)
        return CompletedExchange(received)

    def post_counts(self, counts: Tensor) -> PendingExchange:
        self._check_open()
        check_counts(self, counts)
        return CompletedExchange(counts.clone())

    def rebuild(self) -> None:
        self._check_open()
        self.generation += 1

    def close(self) -> None:
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransportError("this LocalTransport is closed: make a new one")
