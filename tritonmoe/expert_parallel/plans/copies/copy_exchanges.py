"""CopyExchanges: how the weights of copied experts reach their copies, and how the gradients of these go home."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.ops.backends.ops import WeightGrads, accumulation_dtype
from tritonmoe.overlap.executor import Actions
from tritonmoe.overlap.steps import StepKind
from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.cpu_memory import to_device
from tritonmoe.transports import PendingExchange, Transport

__all__ = ["CopyExchanges", "copy_exchanges", "expert_bytes", "gradient_bytes"]

Dtypes = PerWeight[torch.dtype | None]
"""That of each kind of weight, None where there is no such kind."""

ALIGNMENT = 16
"""In bytes: that of every weight in a row, since the values and the scales of packed weights have different dtypes."""


class CopyExchanges:
    """The exchanges of one pass's copies. A row is the bytes of one expert, its weights side by side.

    Args:
        own: the weights of this rank's own experts.
        plan: says of which kinds of weight some rank needs the gradient, and which of these travel in fp32.
    """

    _arriving: Tensor
    """(copies on this rank, bytes), from send() on."""

    def __init__(self, copies: ExpertCopies, transport: Transport, own: PerWeight[Tensor], plan: DispatchPlan) -> None:
        self.copies, self.transport, self.own = copies, transport, own
        self._needs, self._are_wide = plan.needs_weights, plan.has_wide_grads
        self._under_way: list[PendingExchange] = []

    def actions(self) -> Actions:
        """Return what brings the weights to the copies, by the kind of its step."""
        return {StepKind.COPIES: self.send, StepKind.SPREAD_COPIES: self.spread}

    def send(self) -> PendingExchange:
        """Send the weights of this rank's experts to their copies, and receive those of its own copies."""
        rank = self.transport.rank
        experts, received = self.copies.sent(rank), self.copies.received(rank)
        rows, self._arriving = self.pack([*chain(*experts)]), self.rows(sum(received), self.there)
        return self.post(rows, list(map(len, experts)), received, self._arriving)

    def post(self, rows: Tensor, sent: list[int], received: list[int], arriving: Tensor) -> PendingExchange:
        """Start an exchange; a rank that receives nothing defers its wait to settle()."""
        pending = self.transport.exchange(rows, sent, received, arriving)
        if any(received):
            return pending
        self._under_way.append(pending)
        return _SentOnly(arriving)

    def settle(self) -> None:
        """Wait until all that this rank only sends has gone."""
        while self._under_way:
            self._under_way.pop().wait()

    def spread(self) -> PendingExchange:
        """Pass on what send() has brought, where copies are relayed."""
        raise NotImplementedError("owners send every copy all of its weights")

    @cached_property
    def weights(self) -> PerWeight[Tensor]:
        """The weights of this rank's copies, once they have arrived."""
        weights = self.unpack(self._arriving, self.there)
        del self._arriving
        return weights

    @cached_property
    def parts(self) -> tuple[Dtypes, Dtypes]:
        """The dtypes of the gradients of copies, in the two parts in which these go home."""
        return _parts_of(self.own, self._needs, self._are_wide)

    @property
    def returned(self) -> tuple[int, ...]:
        """The parts of which there is anything."""
        return tuple(number for number, part in enumerate(self.parts) if any(part))

    def needed(self, part: int) -> PerWeight[bool]:
        """Return of which kinds of weight the gradients are in a part."""
        return PerWeight(*(dtype is not None for dtype in self.parts[part]))

    def sums(self, part: int) -> PerWeight[Tensor | None]:
        """Return zeros to which the gradients of this rank's copies are added that travel in a wider dtype."""
        num_copies = len(self.copies.on(self.transport.rank))

        def zeros(weight: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
            if weight is None or dtype is None or dtype == weight.dtype:
                return None
            return weight.new_zeros(num_copies, *weight.shape[1:], dtype=dtype)

        return PerWeight(*map(zeros, self.own, self.parts[part]))

    def return_gradients(self, part: int, grads: WeightGrads) -> tuple[PendingExchange, Tensor]:
        """Send a part of the gradients of this rank's copies to the owners.

        The second result is where that of its own experts arrives. grads: none at all where no pair came for a copy.
        """
        rank, dtypes = self.transport.rank, self.parts[part]
        received, splits = self.copies.received(rank), list(map(len, self.copies.sent(rank)))
        rows, arriving = self.rows(sum(received), dtypes), self.rows(sum(splits), dtypes)
        if all(grad is None for grad in grads):
            rows.zero_()
        for grad, target in zip(grads, self._views(rows, dtypes), strict=True):
            if grad is not None and target is not None:
                target.copy_(grad)
        return self.transport.exchange(rows, received, splits, arriving), arriving

    def add_gradients(
        self, part: int, arrived: Tensor, grads: WeightGrads, main_grads: PerWeight[Tensor | None] | None
    ) -> None:
        """Add a part of copies' gradients to those of this rank's own pairs, in place; by rank, in fp32, rounded once.

        main_grads: where the gradients of own pairs were added, if they are not in `grads`.
        """
        rows_of: dict[int, list[int]] = {}
        for row, expert in enumerate(chain(*self.copies.sent(self.transport.rank))):
            rows_of.setdefault(expert, []).append(row)
        of_copies = self.unpack(arrived, self.parts[part])
        for kind, grad in enumerate(grads):
            total = grad if grad is not None or main_grads is None else main_grads[kind]
            terms = of_copies[kind]
            if total is None or terms is None:
                continue
            for expert, rows in rows_of.items():
                sums = total[expert].to(accumulation_dtype(total.dtype))  # a view where that is its own dtype
                for row in rows:
                    sums.add_(terms[row])
                if sums.dtype != total.dtype:
                    total[expert].copy_(sums)

    @cached_property
    def there(self) -> Dtypes:
        """The dtypes of the weights."""
        return self.own.map(lambda weight: weight.dtype)

    def pack(self, experts: Sequence[int]) -> Tensor:
        """Return the rows of some of this rank's own experts."""
        device = self.own.gate_up_proj.device
        index = to_device(torch.tensor(experts, dtype=torch.int64, device="cpu"), device)
        rows = self.rows(len(experts), self.there)
        for weight, target in zip(self.own, self._views(rows, self.there), strict=True):
            if weight is not None and target is not None:
                torch.index_select(_selectable(weight.detach()), 0, index, out=_selectable(target))
        return rows

    def row_bytes(self, there: Dtypes) -> int:
        """Return the bytes of a row of the kinds of weight that are there."""
        return sum(_row_bytes(weight, dtype) for weight, dtype in _there(self.own, there))

    def rows(self, num_experts: int, there: Dtypes) -> Tensor:
        """Return memory for the rows of experts, of the kinds of weight that are there."""
        like = self.own.gate_up_proj.new_empty(0, dtype=torch.uint8)
        return cpu_memory.empty(num_experts, self.row_bytes(there), like=like)

    def _views(self, rows: Tensor, there: Dtypes) -> PerWeight[Tensor | None]:
        """Return the rows as weights, or as gradients, of the kinds that are there; None for the others."""
        found: list[Tensor | None] = []
        first = 0
        for weight, dtype in zip(self.own, there, strict=True):
            if weight is None or dtype is None:
                found.append(None)
                continue
            columns = rows[:, first : first + weight[0].numel() * dtype.itemsize].view(dtype)
            found.append(columns.unflatten(1, weight.shape[1:]))
            first += _row_bytes(weight, dtype)
        return PerWeight(*found)

    def unpack(self, rows: Tensor, there: Dtypes) -> PerWeight[Tensor]:
        """Return the weights, or the gradients, of rows: contiguous, of the kinds that are there."""
        found = [
            view if view is None or view.is_contiguous() else cpu_memory.empty(*view.shape, like=view).copy_(view)
            for view in self._views(rows, there)
        ]
        return cast(PerWeight[Tensor], PerWeight(*found))


class RelayedCopies(CopyExchanges):
    """Exchanges in which weights of copied experts reach their copies by way of each other.

    An owner sends every copy of an expert another piece of its weights (send), and the ranks that have copies pass
    their pieces on to each other (spread). So the weights leave the owner once, however many copies an expert has. A
    row is a unit of ALIGNMENT bytes here.
    """

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


class _SentOnly(PendingExchange):
    """What a rank that gets nothing waits for: nothing."""

    def __init__(self, arriving: Tensor) -> None:
        self._arriving = arriving

    def wait(self) -> Tensor:
        return self._arriving


def _there(weights: PerWeight[Tensor], dtypes: Dtypes) -> Iterator[tuple[Tensor, torch.dtype]]:
    """Yield the weights of the kinds that are there, and the dtypes in which they, or their gradients, travel."""
    for weight, dtype in zip(weights, dtypes, strict=True):
        if weight is not None and dtype is not None:
            yield weight, dtype


def _row_bytes(weight: Tensor, dtype: torch.dtype) -> int:
    """Return the bytes that one expert of a weight takes in a row, so that the next weight is aligned."""
    return -(-weight[0].numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _selectable(weight: Tensor) -> Tensor:
    """Return fp8 as bytes, since torch selects no rows of fp8 on a CPU."""
    return weight.view(torch.uint8) if weight.itemsize == 1 else weight


def _parts_of(weights: PerWeight[Tensor], needs: PerWeight[bool], are_wide: PerWeight[bool]) -> tuple[Dtypes, Dtypes]:
    """Return the dtypes of gradients: first those of gate_up_proj and what is its own, then all others."""

    def part(is_up: bool) -> Dtypes:
        found: list[torch.dtype | None] = []
        for name, weight, needed, is_wide in zip(PerWeight._fields, weights, needs, are_wide, strict=True):
            is_there = weight is not None and needed and name.startswith("gate_up") == is_up
            dtype = weight.dtype if weight is not None and is_there else None
            found.append(accumulation_dtype(dtype) if dtype is not None and is_wide else dtype)
        return PerWeight(*found)

    return part(True), part(False)


def expert_bytes(weights: PerWeight[Tensor]) -> int:
    """Return the bytes of one expert's weights."""
    return sum(weight[0].nbytes for weight in weights if weight is not None)


def gradient_bytes(weights: PerWeight[Tensor], needs: PerWeight[bool], are_wide: PerWeight[bool]) -> tuple[int, int]:
    """Return the bytes of one expert's gradients, as they go home in two parts; arguments as in DispatchPlan."""

    def of(part: Dtypes) -> int:
        return sum(weight[0].numel() * dtype.itemsize for weight, dtype in _there(weights, part))

    of_up, of_down = _parts_of(weights, needs, are_wide)
    return of(of_up), of(of_down)
