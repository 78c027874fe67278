"""CopyExchanges: how the weights of copied experts reach their copies, and how the gradients of these go home."""

from functools import cached_property
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from tritonmoe.backends.ops import WeightGrads, accumulation_dtype
from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.cpu_memory import to_device
from tritonmoe.transports import PendingExchange, Transport

__all__ = ["CopyExchanges", "expert_bytes"]


class CopyExchanges:
    """The exchanges of one pass's copies. A row is one expert, its weights side by side.

    Args:
        own: the weights of this rank's own experts.
        needs: of which kinds of weight some rank needs the gradient.
    """

    _arriving: Tensor
    """(copies on this rank, columns), from send() on."""

    def __init__(
        self, copies: ExpertCopies, transport: Transport, own: PerWeight[Tensor], needs: PerWeight[bool]
    ) -> None:
        self.copies, self.transport, self.own, self.needs = copies, transport, own, needs

    def send(self) -> PendingExchange:
        """Send the weights of this rank's experts to their copies, and receive those of its own copies."""
        rank = self.transport.rank
        experts, received = self.copies.sent(rank), self.copies.received(rank)
        parts = [weight.detach() for weight in self.own if weight is not None]
        index = to_device(torch.tensor([*chain(*experts)], dtype=torch.int64, device="cpu"), parts[0].device)
        widths = [part[0].numel() for part in parts]
        rows = cpu_memory.empty(len(index), sum(widths), like=parts[0])
        for part, columns in zip(parts, rows.split(widths, dim=1), strict=True):
            torch.index_select(part, 0, index, out=columns.unflatten(1, part.shape[1:]))
        self._arriving = cpu_memory.empty(sum(received), sum(widths), like=parts[0])
        return self.transport.exchange(rows, list(map(len, experts)), received, self._arriving)

    @cached_property
    def weights(self) -> PerWeight[Tensor]:
        """The weights of this rank's copies, once they have arrived."""
        weights = self._unpack(self._arriving, PerWeight(*(weight is not None for weight in self.own)))
        del self._arriving
        return weights

    def return_gradients(self, grads: WeightGrads) -> tuple[PendingExchange, Tensor]:
        """Send the gradients of this rank's copies to the owners; the second result is where those of its own arrive.

        grads: none at all where no pair came for a copy.
        """
        rank, received = self.transport.rank, self.copies.received(self.transport.rank)
        own = [of for of, needed in zip(self.own, self.needs, strict=True) if of is not None and needed]
        widths = [weight[0].numel() for weight in own]
        parts = [grad for grad in grads if grad is not None]
        rows = cpu_memory.empty(sum(received), sum(widths), like=own[0])
        if not parts:
            rows.zero_()
        for part, columns in zip(parts, rows.split(widths, dim=1) if parts else (), strict=True):
            columns.copy_(part.flatten(1))
        splits = list(map(len, self.copies.sent(rank)))
        arriving = cpu_memory.empty(sum(splits), sum(widths), like=own[0])
        return self.transport.exchange(rows, received, splits, arriving), arriving

    def add_gradients(
        self, arrived: Tensor, grads: WeightGrads, main_grads: PerWeight[Tensor | None] | None
    ) -> WeightGrads:
        """Add the copies' gradients to those of this rank's own pairs, in place; by rank, in fp32, rounded once.

        main_grads: where the gradients of own pairs were added, if they are not in `grads`.
        """
        rows_of: dict[int, list[int]] = {}
        for row, expert in enumerate(chain(*self.copies.sent(self.transport.rank))):
            rows_of.setdefault(expert, []).append(row)
        of_copies = self._unpack(arrived, self.needs)
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
        return grads

    def _unpack(self, rows: Tensor, there: PerWeight[bool]) -> PerWeight[Tensor]:
        """Return rows as weights, or as gradients, of the kinds that are there."""
        found: list[Tensor | None] = []
        first = 0
        for weight, is_there in zip(self.own, there, strict=True):
            if weight is None or not is_there:
                found.append(None)
                continue
            last = first + weight[0].numel()
            part = rows[:, first:last].unflatten(1, weight.shape[1:])
            is_whole = part.is_contiguous()
            found.append(part if is_whole else cpu_memory.empty(*part.shape, like=part).copy_(part))
            first = last
        return cast(PerWeight[Tensor], PerWeight(*found))


def expert_bytes(weights: PerWeight[Tensor], needs: PerWeight[bool] | None = None) -> int:
    """Return the bytes of one expert's weights, or of the gradients of those that need one."""
    there = [True] * len(weights) if needs is None else needs
    return sum(of[0].nbytes for of, needed in zip(weights, there, strict=True) if of is not None and needed)
