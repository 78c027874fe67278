"""Expert parallelism in processes, through gloo and through MPI, equals one device: outputs and every gradient."""

import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from batches import NAMES, Batch, assert_equals_one_device
from own_transport import own_transport

import tritonmoe as tm
from tritonmoe.transports import Transport, TwoLevelTransport

OVERLAPS = (tm.OverlapConfig(1, serial=True), tm.OverlapConfig(3))
ONE_LEVEL_OVERLAPS = (
    *OVERLAPS,
    tm.OverlapConfig(3, chunk_by="experts"),
    tm.OverlapConfig(3, capacity=100),
    tm.OverlapConfig(2, capacity=0.1),
    tm.OverlapConfig(2, balance="always"),
)
"""Those with a capacity: rows fit, and don't."""
HALVES = None
"""In the place of chunks: tm.two_batches."""


def overlaps(two_levels: bool) -> tuple[tm.OverlapConfig, ...]:
    return OVERLAPS if two_levels else ONE_LEVEL_OVERLAPS


def batch(num_ranks: int, dtype: torch.dtype) -> Batch:
    return Batch(num_ranks, num_experts=4 * num_ranks, top_k=3, dtype=dtype)


def run_halves(given: Batch, transport: Transport, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """Both halves of this rank's tokens at once."""
    ids = given.ids[transport.rank]

    def run_half(tokens: slice) -> torch.Tensor:
        own = {name: leaves[name][tokens] for name in ("x", "topk_weights")}
        settings = {"num_experts": given.num_experts, "transport": transport, "overlap": tm.OverlapConfig(2)}
        return tm.expert_parallel_mlp(topk_ids=ids[tokens], **{**leaves, **own}, **settings, backend="reference")

    return torch.cat(tm.two_batches(run_half, slice(len(ids) // 2), slice(len(ids) // 2, None)))


def run_rank(transport: Transport) -> list[dict[str, torch.Tensor]]:
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        given = batch(transport.size, dtype)
        for overlap in (*overlaps(isinstance(transport, TwoLevelTransport)), HALVES):
            leaves = {name: value.requires_grad_() for name, value in given.of_rank(transport.rank).items()}
            if overlap is HALVES:
                out = run_halves(given, transport, leaves)
            else:
                out = given.call(transport, leaves, overlap, backend="reference")
            grads = torch.autograd.grad(out, list(leaves.values()), given.tokens["dout"][transport.rank])
            results.append(dict(zip(("out", *NAMES), (out.detach(), *grads), strict=True)))
    return results


def main(folder: str, backend: str, rank: int = -1, size: int = -1) -> None:
    torch.set_num_threads(1)
    with own_transport(folder, backend, rank, size, timeout_s=20) as transport:
        torch.save(run_rank(transport), f"{folder}/{transport.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
else:
    from processes import NEEDS_MPI, run_processes

    @pytest.mark.parametrize(
        ("backend", "size"),
        [
            ("gloo", 2),
            pytest.param("gloo", 4, marks=pytest.mark.thorough),
            pytest.param("gloo two levels", 4, marks=pytest.mark.thorough),
            pytest.param("mpi", 2, marks=[NEEDS_MPI, pytest.mark.thorough]),
            pytest.param("mpi", 4, marks=[NEEDS_MPI, pytest.mark.thorough]),
        ],
    )
    def test_equals_one_device(backend: str, size: int, tmp_path: Path) -> None:
        ended = run_processes(size, backend, __file__, str(tmp_path), backend)
        assert not any(ended.statuses), ended.output
        by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
        num_overlaps = len(overlaps("two levels" in backend)) + 1
        for number, dtype in enumerate((torch.float64, torch.bfloat16)):
            expected = batch(size, dtype).on_one_device()
            for overlap in range(num_overlaps):
                parts = [results[num_overlaps * number + overlap] for results in by_rank]
                actual = {name: torch.cat([part[name] for part in parts]) for name in ("out", *NAMES)}
                assert_equals_one_device(actual, expected, (backend, size, dtype, overlap))
