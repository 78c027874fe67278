"""CopyExchanges: how the weights of copied experts reach their copies, and how the gradients of these go home."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from tritonmoe.backends.ops import WeightGrads, accumulation_dtype
from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.overlap.executor import Actions
from tritonmoe.overlap.steps import StepKind
from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.cpu_memory import to_device
from tritonmoe.transports import PendingExchange, Transport

__all__ = ["CopyExchanges", "expert_bytes", "parts_of"]

ALIGNMENT = 16
"""In bytes: that of every weight in a row, since the values and the scales of packed weights have different dtypes."""


class CopyExchanges:
    """The exchanges of one pass's copies. A row is the bytes of one expert, its weights side by side.

    Args:
        own: the weights of this rank's own experts.
        needs: of which kinds of weight some rank needs the gradient.
    """

    _arriving: Tensor
    """(copies on this rank, bytes), from send() on."""

    def __init__(
        self, copies: ExpertCopies, transport: Transport, own: PerWeight[Tensor], needs: PerWeight[bool]
    ) -> None:
        self.copies, self.transport, self.own, self.needs = copies, transport, own, needs
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
        """Post an exchange that a rank which gets nothing of it needs not wait for before settle()."""
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
    def parts(self) -> tuple[PerWeight[bool], ...]:
        """What is needed, in the two parts in which it goes home: gate_up_proj and what is its own, then down_proj."""
        return parts_of(self.needs)

    @property
    def returned(self) -> tuple[int, ...]:
        """The parts of which there is anything."""
        return tuple(part for part, needs in enumerate(self.parts) if any(needs))

    def return_gradients(self, part: int, grads: WeightGrads) -> tuple[PendingExchange, Tensor]:
        """Send a part of the gradients of this rank's copies to the owners.

        The second result is where that of its own experts arrives. grads: none at all where no pair came for a copy.
        """
        rank, needs = self.transport.rank, self.parts[part]
        received, splits = self.copies.received(rank), list(map(len, self.copies.sent(rank)))
        rows, arriving = self.rows(sum(received), needs), self.rows(sum(splits), needs)
        if all(grad is None for grad in grads):
            rows.zero_()
        for grad, target in zip(grads, self._views(rows, needs), strict=True):
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
    def there(self) -> PerWeight[bool]:
        """Which kinds of weight there are."""
        return PerWeight(*(weight is not None for weight in self.own))

    def pack(self, experts: Sequence[int]) -> Tensor:
        """Return the rows of some of this rank's own experts."""
        device = self.own.gate_up_proj.device
        index = to_device(torch.tensor(experts, dtype=torch.int64, device="cpu"), device)
        rows = self.rows(len(experts), self.there)
        for weight, target in zip(self.own, self._views(rows, self.there), strict=True):
            if weight is not None and target is not None:
                torch.index_select(_selectable(weight.detach()), 0, index, out=_selectable(target))
        return rows

    def row_bytes(self, there: PerWeight[bool]) -> int:
        """Return the bytes of a row of the kinds of weight that are there."""
        kinds = zip(self.own, there, strict=True)
        return sum(_row_bytes(weight) for weight, is_there in kinds if weight is not None and is_there)

    def rows(self, num_experts: int, there: PerWeight[bool]) -> Tensor:
        """Return memory for the rows of experts, of the kinds of weight that are there."""
        like = self.own.gate_up_proj.new_empty(0, dtype=torch.uint8)
        return cpu_memory.empty(num_experts, self.row_bytes(there), like=like)

    def _views(self, rows: Tensor, there: PerWeight[bool]) -> PerWeight[Tensor | None]:
        """Return the rows as weights, or as gradients, of the kinds that are there; None for the others."""
        found: list[Tensor | None] = []
        first = 0
        for weight, is_there in zip(self.own, there, strict=True):
            if weight is None or not is_there:
                found.append(None)
                continue
            columns = rows[:, first : first + weight[0].nbytes].view(weight.dtype)
            found.append(columns.unflatten(1, weight.shape[1:]))
            first += _row_bytes(weight)
        return PerWeight(*found)

    def unpack(self, rows: Tensor, there: PerWeight[bool]) -> PerWeight[Tensor]:
        """Return the weights, or the gradients, of rows: contiguous, of the kinds that are there."""
        found = [
            view if view is None or view.is_contiguous() else cpu_memory.empty(*view.shape, like=view).copy_(view)
            for view in self._views(rows, there)
        ]
        return cast(PerWeight[Tensor], PerWeight(*found))


class _SentOnly(PendingExchange):
    """What a rank that gets nothing waits for: nothing."""

    def __init__(self, arriving: Tensor) -> None:
        self._arriving = arriving

    def wait(self) -> Tensor:
        return self._arriving


def _row_bytes(weight: Tensor) -> int:
    """Return the bytes that one expert of a weight takes in a row, so that the next weight is aligned."""
    return -(-weight[0].nbytes // ALIGNMENT) * ALIGNMENT


def _selectable(weight: Tensor) -> Tensor:
    """Return fp8 as bytes, since torch selects no rows of fp8 on a CPU."""
    return weight.view(torch.uint8) if weight.itemsize == 1 else weight


def parts_of(needs: PerWeight[bool]) -> tuple[PerWeight[bool], PerWeight[bool]]:
    """Return which of the gradients that are needed are of the up-projection, and which are of the down-projection."""
    names = PerWeight._fields
    of_up, of_down = (
        PerWeight(*(needed and name.startswith(projection) for name, needed in zip(names, needs, strict=True)))
        for projection in ("gate_up", "down")
    )
    return of_up, of_down


def expert_bytes(weights: PerWeight[Tensor], needs: PerWeight[bool] | None = None) -> int:
    """Return the bytes of one expert's weights, or of the gradients of those that need one."""
    there = [True] * len(weights) if needs is None else needs
    return sum(of[0].nbytes for of, needed in zip(weights, there, strict=True) if of is not None and needed)
