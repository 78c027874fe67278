"""What a pass needs of the experts of one call: ForwardExperts, BackwardExperts, and what makes them."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from tritonmoe.backends.ops import WeightGrads
from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.experts.tensors import CallTensors

__all__ = ["BackwardExperts", "Experts", "ForwardExperts", "MakeExperts"]


class ForwardExperts(Protocol):
    """What a forward needs of the experts of one call.

    These are ForwardRun, NodeForward, ForwardWithCopies, and stand-ins of fixed duration.
    """

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        """Return the weighted sums over this rank's experts of the rows that a segment finishes."""
        ...


class BackwardExperts(Protocol):
    """What a backward needs of them: BackwardRun, NodeBackward, BackwardWithCopies, or such a stand-in."""

    def backward(
        self, segment: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Return dx of the rows that a segment finishes, None unless needed, and the gradients of their weights."""
        ...

    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> WeightGrads:
        """Return the gradients of the experts' weights, over all segments."""
        ...


Experts = TypeVar("Experts", bound=ForwardExperts)
MakeExperts = Callable[[DispatchPlan, CallTensors[Tensor], RowPlaces], Experts]
"""(the plan, the received rows x (R, D) with what came with them, where they lie) -> the experts of one call."""
