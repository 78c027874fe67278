"""RelayedCopies: weights of copied experts reach their copies by way of each other, in two exchanges.

An owner sends every copy of an expert another piece of its weights, and the ranks that have copies pass their pieces on
to each other. So the weights leave the owner once, however many copies an expert has.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.overlap.copy_exchanges import ALIGNMENT, CopyExchanges
from tritonmoe.runtime import cpu_memory
from tritonmoe.transports import PendingExchange, Transport

__all__ = ["RelayedCopies", "copy_exchanges"]


class RelayedCopies(CopyExchanges):
    """As CopyExchanges, but send() sends pieces, which spread() passes on; a row is a unit of ALIGNMENT bytes."""

    _pieces: Tensor
    """(units, bytes): those that this rank passes on, copy by copy, from send() on."""
    _others: Tensor
    """(units, bytes): those of the other ranks, rank by rank, from spread() on."""

    def send(self) -> PendingExchange:
        """Send a piece of this rank's experts to each of their copies, and receive those of its own copies."""
        rank, num_own = self.transport.rank, self.copies.num_own
        experts = [expert for expert in self.copies.ranks_of if expert // num_own == rank]
        units = self.pack([expert % num_own for expert in experts]).unflatten(1, (-1, ALIGNMENT))
        of_ranks = [
            [
                units[row, self._piece(expert, other)]
                for row, expert in enumerate(experts)
                if other in self.copies.ranks_of[expert]
            ]
            for other in range(self.transport.size)
        ]
        received = [0] * self.transport.size
        for expert in self._held:
            received[expert // num_own] += _length(self._piece(expert, rank))
        pending, self._pieces = self._exchange(of_ranks, received)
        return pending

    def spread(self) -> PendingExchange:
        """Pass the pieces of this rank on to the other copies of each expert, and receive theirs."""
        rank = self.transport.rank
        own = self._pieces.split([_length(self._piece(expert, rank)) for expert in self._held])
        of_ranks: list[list[Tensor]] = [[] for _ in range(self.transport.size)]
        for expert, piece in zip(self._held, own, strict=True):
            for other in self.copies.ranks_of[expert]:
                if other != rank:
                    of_ranks[other].append(piece)
        received = [0] * self.transport.size
        for other, _, piece in self._pieces_of_others():
            received[other] += _length(piece)
        pending, self._others = self._exchange(of_ranks, received)
        return pending

    @cached_property
    def weights(self) -> PerWeight[Tensor]:
        """The weights of this rank's copies, once both exchanges have brought their pieces."""
        rows = self.rows(len(self._held), self.there)
        units, rank = rows.unflatten(1, (-1, ALIGNMENT)), self.transport.rank
        own = [(row, self._piece(expert, rank)) for row, expert in enumerate(self._held)]
        others = [(row, piece) for _, row, piece in self._pieces_of_others()]
        for arrived, places in ((self._pieces, own), (self._others, others)):
            parts = arrived.split([_length(piece) for _, piece in places])
            for (row, piece), part in zip(places, parts, strict=True):
                units[row, piece] = part
        del self._pieces, self._others
        return self.unpack(rows, self.there)

    @cached_property
    def _held(self) -> list[int]:
        """The experts of which this rank has copies."""
        return [copy.expert for copy in self.copies.on(self.transport.rank)]

    def _piece(self, expert: int, rank: int) -> slice:
        """Return which units of an expert's weights `rank` has from the owner."""
        ranks, num_units = self.copies.ranks_of[expert], self.row_bytes(self.there) // ALIGNMENT
        number = ranks.index(rank)
        return slice(num_units * number // len(ranks), num_units * (number + 1) // len(ranks))

    def _pieces_of_others(self) -> Iterator[tuple[int, int, slice]]:
        """Yield the rank, the row among this rank's copies, and the units of each piece that spread() brings."""
        for other in range(self.transport.size):
            for row, expert in enumerate(self._held):
                if other != self.transport.rank and other in self.copies.ranks_of[expert]:
                    yield other, row, self._piece(expert, other)

    def _exchange(self, of_ranks: Sequence[Sequence[Tensor]], received: list[int]) -> tuple[PendingExchange, Tensor]:
        """Send each rank its pieces; the second result is where so many units from each rank arrive."""
        like = self.own.gate_up_proj.new_empty(0, dtype=torch.uint8)
        arriving = cpu_memory.empty(sum(received), ALIGNMENT, like=like)
        pieces = [piece for of_rank in of_ranks for piece in of_rank]
        rows = torch.cat(pieces) if pieces else like.view(0, ALIGNMENT)
        sent = [sum(map(len, of_rank)) for of_rank in of_ranks]
        return self.post(rows, sent, received, arriving), arriving


def copy_exchanges(
    copies: ExpertCopies, transport: Transport, own: PerWeight[Tensor], plan: DispatchPlan
) -> CopyExchanges:
    """Return the exchanges of a pass whose experts have these copies; arguments as in CopyExchanges."""
    return (RelayedCopies if copies.are_relayed else CopyExchanges)(copies, transport, own, plan)


def _length(piece: slice) -> int:
    return int(piece.stop - piece.start)
