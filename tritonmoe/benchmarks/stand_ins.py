"""What stands in for a layer's experts while its communication is measured: experts that compute nothing."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tritonmoe.backends import choose
from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.count_exchange import post_backward
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.plan import DispatchPlan, exchange_plan
from tritonmoe.dispatch.send_plan import plan_tokens
from tritonmoe.dispatch.terms import CallTerms, plan_terms
from tritonmoe.experts.tensors import NO_TENSORS
from tritonmoe.overlap.layer_pass import BackwardPass, ForwardPass
from tritonmoe.overlap.report import PassReport
from tritonmoe.overlap.row_exchanges import RowExchanges
from tritonmoe.transports import Transport

__all__ = ["FixedExperts", "run_layer_pass"]


class FixedExperts:
    """Experts that take a given time for all rows of a call, each row its share, and compute nothing.

    Args:
        total_s: seconds of a forward; a backward takes no time.
        row_offsets: where each segment starts in `rows`, and its end.
    """

    def __init__(self, total_s: float, row_offsets: tuple[int, ...], rows: Tensor, top_k: int) -> None:
        self.total_s = total_s
        self.row_offsets = row_offsets
        self.rows = rows
        self.top_k = top_k

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        first, last = self.row_offsets[segment : segment + 2]
        if self.total_s:
            time.sleep(self.total_s * (last - first) / max(1, self.row_offsets[-1]))
        return self.rows[first:last] if out is None else out.zero_()

    def backward(
        self, segment: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        first, last = self.row_offsets[segment : segment + 2]
        dweights = torch.zeros(last - first, self.top_k, dtype=torch.float32, device=dout.device)
        if not needs_dx:
            return None, dweights
        return dout[first:last] if out is None else out.zero_(), dweights

    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> PerWeight[Tensor | None]:
        return NO_WEIGHTS


def run_layer_pass(
    transport: Transport,
    overlap: OverlapPlan,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    make_experts: Callable[[Tensor, DispatchPlan], FixedExperts],
    dout: Tensor | None = None,
) -> list[PassReport]:
    """Run a layer call with other experts, and with dout (T, D) its backward too; gives the reports of the passes.

    make_experts: (rows (R, D), the plan) -> the experts.
    """
    needs = int(dout is not None)
    tokens = plan_tokens(topk_ids, num_experts, transport.rank, transport.size, overlap)
    header = CallHeader(
        terms=CallTerms(plan_terms(overlap)),
        num_experts=num_experts,
        top_k=topk_ids.shape[1],
        hidden_size=x.shape[1],
        grad_enabled=needs,
        needs_any=needs,
        needs_x=needs,
        needs_topk_weights=needs,
    )
    plan = exchange_plan(transport, header, tokens, overlap)
    exchanges = RowExchanges(plan, transport, choose("auto", x.device, x.dtype).gather_sum)
    given = NO_TENSORS._replace(x=x, topk_ids=topk_ids, topk_weights=topk_weights)
    forward = ForwardPass(exchanges, lambda plan, received, _: make_experts(received.x, plan), given)
    reports = [forward.run()[1]]
    if dout is not None:
        agreement = post_backward(transport, CallHeader(is_backward=1))
        needs_weights = PerWeight(False, False, False, False)
        backward = BackwardPass(exchanges, forward.experts, forward.received_weights, dout, needs_weights)
        reports.append(backward.run(agreement)[1])
    return reports
