"""Copies of hot experts in processes that pass pieces of weights on to each other, through gloo and through MPI."""

import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from own_transport import own_transport

import tritonmoe as tm
from tritonmoe.transports import Transport

SIZE, HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, TOKENS = 5, 6, 10, 10, 2, 24
CONFIG = tm.OverlapConfig(2, balance="always")


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN), (NUM_EXPERTS, HIDDEN, INTERMEDIATE)
    up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return up, down


def tokens(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_ids and topk_weights of a rank; every token needs a hot expert, in the next step another one's."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    others = torch.randint(1, NUM_EXPERTS, (TOKENS, 1), generator=generator)
    hot = torch.full((TOKENS, 1), 3 * step)
    return x, torch.cat([hot, (hot + others) % NUM_EXPERTS], 1), torch.rand(TOKENS, TOP_K, generator=generator)


def run_rank(transport: Transport) -> None:
    """Compare outputs and gradients with those of one device, which has the tokens of all ranks."""
    rank, local = transport.rank, NUM_EXPERTS // transport.size
    own = slice(rank * local, (rank + 1) * local)
    for step, save in ((0, "hidden"), (1, "input"), (2, "hidden")):
        whole = [weight.requires_grad_() for weight in weights()]
        batches = [tokens(of, step) for of in range(transport.size)]
        x, ids, gates = (torch.cat(parts).detach() for parts in zip(*batches, strict=True))
        expected = tm.moe_mlp(x.requires_grad_(), ids, gates, *whole, backend="reference")
        expected.square().sum().backward()
        parts = [weight[own].clone().requires_grad_() for weight in weights()]
        x_here = batches[rank][0].requires_grad_()
        settings = {"num_experts": NUM_EXPERTS, "transport": transport, "overlap": CONFIG, "save": save}
        y = tm.expert_parallel_mlp(x_here, *batches[rank][1:], *parts, **settings, backend="reference")
        y.square().sum().backward()
        here = slice(rank * TOKENS, (rank + 1) * TOKENS)
        torch.testing.assert_close(y, expected[here])
        torch.testing.assert_close(x_here.grad, x.grad[here])
        for part, weight in zip(parts, whole, strict=True):
            torch.testing.assert_close(part.grad, weight.grad[own])
        kinds = [timing.step.kind for timing in REPORTS[-1].forward.steps]
        assert "spread_copies" in kinds, kinds


REPORTS: list = []


class Collect:
    def before_forward(self, *_: object) -> None: ...
    def after_backward(self, *_: object) -> None: ...
    def after_forward(self, transport: Transport, header: object, report: object, grouping: object) -> None:
        REPORTS.append(report)


def main(folder: str, backend: str, rank: int = -1, size: int = -1) -> None:
    from tritonmoe.expert_parallel.call import listeners

    torch.set_num_threads(1)
    listeners.append(Collect())
    with own_transport(folder, backend, rank, size, timeout_s=60) as transport:
        run_rank(transport)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
else:
    from processes import NEEDS_MPI, run_processes

    @pytest.mark.thorough
    @pytest.mark.parametrize("backend", ["gloo", pytest.param("mpi", marks=NEEDS_MPI)])
    def test_pieces_of_weights_travel_between_processes(backend: str, tmp_path: Path) -> None:
        ended = run_processes(SIZE, backend, __file__, str(tmp_path), backend, timeout_s=200)
        assert not any(ended.statuses), ended.output
