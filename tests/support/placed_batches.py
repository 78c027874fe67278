"""Batches whose experts are placed by an ExpertPlacement."""

from dataclasses import dataclass

import torch
from batches import Batch
from torch import Tensor

import tritonmoe as tm

PERMUTED = {2: ((3, 0, 5), (1, 2, 4)), 3: ((5, 0), (1, 4), (2, 3))}
REPLICATED = {2: ((1, 0, 3, 4), (2, 5, 1, 3)), 3: ((1, 0, 2), (3, 1, 4), (1, 5, 0))}
"""Expert 1 is the hot one."""


@dataclass
class PlacedBatch(Batch):
    placement: tm.ExpertPlacement | None = None

    def of_rank(self, rank: int) -> dict[str, Tensor]:
        mine = {name: self.tokens[name][rank].clone() for name in ("x", "topk_weights")}
        held = list(self.placement.experts_of_rank[rank])
        return mine | {name: w[held].clone() for name, w in self.weights.items()}


def run(batch: PlacedBatch, overlap, backend: str = "reference", frozen: tuple[str, ...] = ()) -> list[dict]:
    def rank_call(transport):
        leaves = batch.of_rank(transport.rank)
        wanted = [name for name in leaves if name not in frozen]
        for name in wanted:
            leaves[name].requires_grad_()
        out = batch.call(transport, leaves, overlap, backend=backend, placement=batch.placement)
        grads = torch.autograd.grad(
            out, [leaves[name] for name in wanted], batch.tokens["dout"][transport.rank], allow_unused=True
        )
        return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}

    return tm.run_on_emulated_ranks(rank_call, num_ranks=batch.num_ranks)


def compare(batch: PlacedBatch, results: list[dict]) -> None:
    expected = batch.on_one_device()
    for name in ("out", "x", "topk_weights"):
        got = torch.cat([result[name] for result in results])
        torch.testing.assert_close(got, expected[name], rtol=1e-9, atol=1e-9, msg=name)
    for rank, result in enumerate(results):
        held = list(batch.placement.experts_of_rank[rank])
        for name in batch.weights:
            torch.testing.assert_close(result[name], expected[name][held], rtol=1e-9, atol=1e-9, msg=name)
