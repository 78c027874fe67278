"""What stands in for a layer's experts while its communication is measured: experts that compute nothing."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tritonmoe.backends import choose
from tritonmoe.backends.ops import WeightGrads
from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.count_exchange import post_backward
from tritonmoe.dispatch.header import DTYPE_CODES, CallHeader
from tritonmoe.dispatch.plan import DispatchPlan, exchange_plan
from tritonmoe.dispatch.send_plan import plan_tokens
from tritonmoe.overlap.executor import ExpertsPass, LayerPass
from tritonmoe.overlap.report import PassReport
from tritonmoe.transports import Transport

__all__ = ["FixedExperts", "run_layer_pass"]


class FixedExperts:
    """Experts that take a given time for all rows of a call, each row its share, and compute nothing.

    Args:
        total_s: of a forward; a backward takes no time.
        row_offsets: where each segment starts in `rows`, and its end.
    """

    def __init__(self, total_s: float, row_offsets: tuple[int, ...], rows: Tensor, top_k: int) -> None:
        self.total_s = total_s
        self.row_offsets = row_offsets
        self.rows = rows
        self.top_k = top_k

    def forward(self, chunk: int, out: Tensor | None = None) -> Tensor:
        first, last = self.row_offsets[chunk : chunk + 2]
        if self.total_s:
            time.sleep(self.total_s * (last - first) / max(1, self.row_offsets[-1]))
        return self.rows[first:last] if out is None else out.zero_()

    def backward(
        self, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        first, last = self.row_offsets[chunk : chunk + 2]
        dweights = torch.zeros(last - first, self.top_k, dtype=torch.float32, device=dout.device)
        if not needs_dx:
            return None, dweights
        return dout[first:last] if out is None else out.zero_(), dweights

    def weight_grad(self, dout: Tensor, needs: tuple[bool, bool, bool, bool]) -> WeightGrads:
        return WeightGrads(None, None, None, None)


def run_layer_pass(
    transport: Transport,
    overlap: OverlapPlan,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    make_experts: Callable[[Tensor, DispatchPlan], ExpertsPass],
    dout: Tensor | None = None,
) -> list[PassReport]:
    """Run a layer call with other experts, and with dout (T, D) its backward too; gives the reports of the passes.

    make_experts: (rows (R, D), the plan) -> the experts.
    """
    needs = int(dout is not None)
    tokens = plan_tokens(topk_ids, num_experts, transport.rank, transport.size, overlap)
    header = CallHeader.of(
        overlap,
        sequence=0,
        num_experts=num_experts,
        top_k=topk_ids.shape[1],
        hidden_size=x.shape[1],
        dtype=DTYPE_CODES[x.dtype],
        grad_enabled=needs,
        needs_any=needs,
        needs_x=needs,
        needs_topk_weights=needs,
        error=0,
        nonfinite_rows=0,
    )
    plan = exchange_plan(transport, header, tokens, overlap)
    ops = choose("auto", x.device, x.dtype)
    layer_pass = LayerPass(plan, transport, ops.gather_sum, lambda plan, rows, *_: make_experts(rows, plan))
    reports = [layer_pass.forward(x, topk_ids, topk_weights)[1]]
    if dout is not None:
        agreement = post_backward(transport, CallHeader(is_backward=1))
        reports.append(layer_pass.backward(dout, (False, False, False, False), agreement)[3])
    return reports
