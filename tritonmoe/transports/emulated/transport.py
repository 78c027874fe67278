"""EmulatedTransport: one of N ranks that are threads of one process, with links in wall time and faults by script."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonmoe.transports.base import PendingExchange, Transport
from tritonmoe.transports.emulated.exchange import EmulatedExchange
from tritonmoe.transports.exchange_arguments import as_counts, check_counts, check_exchange, raise_in_child

if TYPE_CHECKING:
    from tritonmoe.transports.emulated.world import EmulatedWorld

__all__ = ["EmulatedTransport"]


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

    def post_counts(self, counts: Tensor) -> PendingExchange:
        check_counts(self, counts)
        ones = [1] * self.size
        return self._exchange("exchange_counts", counts.contiguous(), ones, ones, None)

    def give_up(self, what: str) -> None:
        self.world.give_up(self.rank, what)

    def rebuild(self) -> None:
        """Meet the other ranks, as Transport.rebuild() says; exchanges of faults are counted from the largest number.

        A rank that has ended can't come any more.
        """
        self._check_process()
        self.world.rebuild(self.rank)

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
        self._check_process()
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

    def _check_process(self) -> None:
        if self.world.pid != os.getpid():
            raise_in_child(self, self.world.pid)
