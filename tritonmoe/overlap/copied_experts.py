"""ForwardWithCopies and BackwardWithCopies: one rank's experts, and beside them its copies of other ranks' experts.

Both run on the rows that the rank received, each for its own pairs; a row that has pairs of both gets their sum. Own
experts come first, while weights of copies may be under way.
"""

from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from tritonmoe.backends.ops import WeightGrads
from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.experts.run import ExpertsRun
from tritonmoe.overlap.copy_exchanges import CopyExchanges
from tritonmoe.runtime import cpu_memory
from tritonmoe.transports import PendingExchange

__all__ = ["BackwardWithCopies", "ForwardWithCopies"]


class ForwardWithCopies:
    """What a forward needs of the experts of a call that has copies.

    Args:
        make_copies: makes the run of this rank's copies, once their weights are here.
        plan: of all pairs.
    """

    def __init__(self, own: ForwardRun, make_copies: Callable[[], ForwardRun], plan: DispatchPlan) -> None:
        self.own, self._make_copies, self._plan = own, make_copies, plan

    @cached_property
    def copies(self) -> ForwardRun | None:
        """The run of the copies, made by the first step that needs it; None where this rank has no pair for one."""
        return self._make_copies() if self._plan.copy_pair_offsets[-1] else None

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        """Return the weighted sums over own experts of the rows that a segment finishes, for add_copies() to add to."""
        if _who_has_pairs(self._plan, segment) == (False, True):
            return _sums(self.own, segment) if out is None else out
        return self.own.forward(segment, out)

    def add_copies(self, segment: int, sums: Tensor) -> None:
        """Add the weighted sums over copies to those of forward()."""
        has_own, has_copied = _who_has_pairs(self._plan, segment)
        if not has_copied or self.copies is None:
            return
        if has_own:
            sums.add_(self.copies.forward(segment, _sums(self.copies, segment)))
        else:
            self.copies.forward(segment, sums)


class BackwardWithCopies:
    """What a backward needs of them, and how the weights of copies and their gradients travel.

    Args:
        make_copies: makes the run of this rank's copies, once their weights are here.
        plan: that of the forward. exchanges: of the same copies.
    """

    def __init__(
        self, own: BackwardRun, make_copies: Callable[[], BackwardRun], plan: DispatchPlan, exchanges: CopyExchanges
    ) -> None:
        self.own, self._make_copies, self._plan, self.exchanges = own, make_copies, plan, exchanges
        self._grads: WeightGrads = NO_WEIGHTS
        self._arriving: dict[int, Tensor] = {}
        """By part: (copied experts of this rank, bytes), from return_copies() on."""

    @cached_property
    def copies(self) -> BackwardRun | None:
        """The run of the copies, made by the first step that needs it; None where this rank has no pair for one."""
        return self._make_copies() if self._plan.copy_pair_offsets[-1] else None

    def backward(
        self, segment: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Return what own experts give; see BackwardExperts. add_copies_backward() adds to both results."""
        if _who_has_pairs(self._plan, segment) != (False, True):
            return self.own.backward(segment, dout, needs_dx, out)
        # None of its pairs, but its buffers begin with its first segment.
        _, dweights = self.own.backward(segment, dout, False)
        return (_sums(self.own, segment) if out is None else out) if needs_dx else None, dweights

    def add_copies_backward(self, segment: int, dout: Tensor, dx: Tensor | None, dweights: Tensor) -> None:
        """Add what copies contribute to the results of backward()."""
        has_own, has_copied = _who_has_pairs(self._plan, segment)
        if not has_copied or self.copies is None:
            return
        sums = dx if dx is None or not has_own else _sums(self.copies, segment)
        copies_dx, copies_dweights = self.copies.backward(segment, dout, dx is not None, sums)
        if dx is not None and copies_dx is not None and has_own:
            dx.add_(copies_dx)
        dweights.add_(copies_dweights)  # each pair has one of the two, the other is zero

    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> WeightGrads:
        """Return the gradients of own experts' weights, over this rank's own pairs."""
        self.exchanges.settle()
        return self.own.weight_grad(dout, needs)

    def copy_weight_grad(self, part: int, dout: Tensor) -> None:
        """Compute a part of the gradients of the copies' weights."""
        if self.copies is None:
            return
        sums = self.copies.main_grads = self.exchanges.sums(part)
        grads = self.copies.weight_grad(dout, self.exchanges.needed(part))
        self._grads = PerWeight(*(grad if of is None else of for grad, of in zip(grads, sums, strict=True)))

    def return_copies(self, part: int) -> PendingExchange:
        """Send this part to the owners."""
        pending, self._arriving[part] = self.exchanges.return_gradients(part, self._grads)
        self._grads = NO_WEIGHTS
        return pending

    def add_copies(self, part: int, grads: WeightGrads) -> None:
        """Add what came home of it to the gradients of own experts' weights."""
        self.exchanges.add_gradients(part, self._arriving.pop(part), grads, self.own.main_grads)


def _sums(run: ExpertsRun, segment: int) -> Tensor:
    """Return memory for the sums of the rows that a segment finishes."""
    first, last = run.grouping.chunk_row_offsets[segment : segment + 2]
    return cpu_memory.empty(last - first, run.rows.shape[1], like=run.rows)


def _who_has_pairs(plan: DispatchPlan, segment: int) -> tuple[bool, bool]:
    """Say whether own experts have pairs in a segment, and whether copies have."""
    (first, last), (first_copied, last_copied) = (
        of[segment : segment + 2] for of in (plan.pair_offsets, plan.copy_pair_offsets)
    )
    return last - first > last_copied - first_copied, last_copied > first_copied
