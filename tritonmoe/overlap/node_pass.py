"""NodePass: what a relay does with a chunk: spread its rows inside the node, let the experts run, bring the sums back.

To the outer pass of a two-level layer it is the experts. Its exchanges run inside the node while those of the outer
pass, over the slow link, are under way; they are waited for where they are posted, and count as the experts' time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.reference import WeightGrads
from ..dispatch import DispatchPlan
from ..transports import Transport
from ..wire import WireFormat
from .executor import ExpertsPass, LayerPass

__all__ = ["NodePass"]


@dataclass
class NodePass:
    """One layer call's inner level on one rank; see ExpertsPass for the calls. A chunk here is an outer segment."""

    plan: DispatchPlan
    """The inner plan: its tokens are the rows that this rank relays."""
    transport: Transport
    """Of the ranks of this node."""
    combine: Callable[..., Tensor]
    relayed: Tensor
    """(R, D) rows that the outer level brought here."""
    experts: ExpertsPass
    rows: Tensor
    """(R', D): what the experts work on."""
    dout_rows: Tensor | None = None
    """(R', D): the gradients of the experts' outputs."""

    @classmethod
    def receive(
        cls,
        plan: DispatchPlan,
        transport: Transport,
        combine: Callable[..., Tensor],
        relayed: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        make_experts: Callable[[DispatchPlan, Tensor, Tensor, Tensor], ExpertsPass],
    ) -> "NodePass":
        """Spread the ids (R, K) and weights (R, K) of the relayed rows inside the node, and make the experts."""
        rows = relayed.new_empty(plan.num_received, relayed.shape[1])
        inner = LayerPass(plan, transport, combine, make_experts)
        pending, metadata = inner.send_metadata(topk_ids, topk_weights)
        pending.wait()
        ids, weights = inner.receive_metadata(metadata, topk_ids.shape[1])
        return cls(plan, transport, combine, relayed, make_experts(plan, rows, ids, weights), rows)

    def forward(self, chunk: int, out: Tensor | None = None) -> Tensor:
        """Give the weighted partial sums of the relayed rows of `chunk`, over the experts of this node."""
        self._spread(self.relayed, chunk, self.rows)
        return self._gather(self.experts.forward(chunk), chunk, out)

    def backward(
        self, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Give dx of the relayed rows of `chunk`, None unless needed, and the gradient of their topk_weights."""
        if self.dout_rows is None:
            self.dout_rows = torch.empty_like(self.rows)
        self._spread(dout, chunk, self.dout_rows)
        partial, dweights = self.experts.backward(chunk, self.dout_rows, needs_dx)
        dx = None if partial is None else self._gather(partial, chunk, out)
        # Every pair is computed by one rank only: the other ranks' terms are zero.
        return dx, self._gather(dweights.to(torch.float32), chunk, None)

    def weight_grad(self, dout: Tensor, needs: tuple[bool, bool, bool, bool]) -> WeightGrads:
        """Give the gradients of this rank's experts."""
        assert self.dout_rows is not None
        return self.experts.weight_grad(self.dout_rows, needs)

    def _pass(self) -> LayerPass:
        return LayerPass(self.plan, self.transport, self.combine, make_experts=None)

    def _spread(self, relayed: Tensor, chunk: int, received: Tensor) -> None:
        self._pass().send_chunk(relayed, chunk, received, WireFormat(relayed.dtype)).wait()

    def _gather(self, partial: Tensor, chunk: int, out: Tensor | None) -> Tensor:
        """Bring one row per received row back to its relay, and sum them there, in rank order, in fp32."""
        tokens = self.plan.token_slice(chunk)
        home = partial.new_empty(self.plan.num_home, partial.shape[1])
        self._pass().return_chunk(partial, chunk, home, WireFormat(partial.dtype)).wait()
        return self.combine(home, self.plan.tokens.home_index[tokens], out=out)
