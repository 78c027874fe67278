"""Experts that take a time for each of their pairs by sleeping, in forward, backward and weight gradients."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.forward_run import ForwardRun

__all__ = ["sleeping_experts"]


@contextmanager
def sleeping_experts(pair_s: float) -> Iterator[None]:
    """Let all experts sleep so many seconds for each pair in each of the three instead of computing; they give zeros.

    A rank then takes as long as it has pairs, on any machine, beside any number of other ranks in the process. All else
    of a call is as it is: counts, plans, exchanges of rows, of copies and of their gradients.
    """

    def forward(run: ForwardRun, chunk: int, out: Tensor | None = None) -> Tensor:
        grouping = run.grouping.chunk(chunk)
        time.sleep(pair_s * grouping.num_pairs)
        shape = grouping.inverse.shape[0], run.rows.shape[1]
        return run.rows.new_zeros(shape) if out is None else out.zero_()

    def backward(
        run: BackwardRun, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        grouping = run.grouping.chunk(chunk)
        time.sleep(pair_s * grouping.num_pairs)
        dweights = run.topk_weights.new_zeros(grouping.inverse.shape)
        if not needs_dx:
            return None, dweights
        return dout.new_zeros(grouping.inverse.shape[0], dout.shape[1]) if out is None else out.zero_(), dweights

    def weight_grad(run: BackwardRun, dout: Tensor, needs: PerWeight[bool]) -> PerWeight[Tensor | None]:
        time.sleep(pair_s * run.grouping.num_pairs * (2 * needs.gate_up_proj + needs.down_proj) / 3)
        there = run.weights.map(torch.zeros_like)
        return PerWeight(*(grad if needed else None for grad, needed in zip(there, needs, strict=True)))

    with (
        patch.object(ForwardRun, "forward", forward),
        patch.object(BackwardRun, "backward", backward),
        patch.object(BackwardRun, "weight_grad", weight_grad),
    ):
        yield
