"""Ranks of test_offloading_processes.py: `offloading_worker.py FOLDER CASE...` says "passed CASE" of each."""

import itertools
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_offloading import FORMATS, HIDDEN, NUM_EXPERTS, TOP_K, compare, make_layer, step
from worker_cases import run_cases

import tritonmoe as tm
from tritonmoe.transports import ProcessGroupTransport

FOLDER = Path(sys.argv[1])
_numbers = itertools.count()


def new_folder() -> Path:
    return FOLDER / str(next(_numbers))


def case_bits() -> None:
    """Outputs and gradients of every format are those of experts in memory."""
    transport = ProcessGroupTransport(dist.group.WORLD)
    for case in FORMATS[1:]:
        for overlap in (tm.OverlapConfig(2), tm.OverlapConfig(2, chunk_by="experts")):
            resident, offloaded = (make_layer(*case, ranks=transport, overlap=overlap, bias=True) for _ in range(2))
            tm.offload_experts(offloaded, new_folder(), resident_bytes=20_000)
            for seed in range(2):
                own = 10 * seed + transport.rank
                compare(step(resident, case[1], seed=own), step(offloaded, case[1], seed=own))


def case_files() -> None:
    """A file that is cut or can't be read raises an error with the expert's name on every rank; all go on."""
    transport = ProcessGroupTransport(dist.group.WORLD)
    for victim, (how, when) in enumerate(itertools.product(("cut", "unreadable"), ("forward", "backward"))):
        folder = new_folder()
        experts = make_layer(ranks=transport, num_experts=48, overlap=tm.OverlapConfig(2))
        tm.offload_experts(experts, folder)
        x = torch.randn(200, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        ids, weights = torch.randint(0, 48, (200, TOP_K)), torch.rand(200, TOP_K)
        if when == "backward":
            y = experts(x, ids, weights)
        if transport.rank == victim % 2:
            (path,) = folder.glob(f"*rank-{transport.rank}*")
            if how == "cut":
                os.truncate(path, path.stat().st_size // 2)
            else:
                file = next(iter(experts.__dict__["_tritonmoe_offloaded"].reader.weights)).file
                os.dup2(os.open(folder, os.O_RDONLY), file._descriptor)
        transport.barrier()
        started = time.perf_counter()
        expected = tm.OffloadError if transport.rank == victim % 2 else tm.TransportError
        with pytest.raises(expected, match=rf"expert \d+ of .* could not be read from .*rank-{victim % 2}-of-2"):
            experts(x, ids, weights) if when == "forward" else y.sum().backward()
        assert time.perf_counter() - started < 20
        assert x.grad is None
        transport.rebuild()
        tm.offload_experts(other := make_layer(ranks=transport), new_folder())
        ids = torch.randint(0, NUM_EXPERTS, (200, TOP_K))
        other(x, ids, weights).sum().backward()
        assert x.grad is not None


if __name__ == "__main__":
    run_cases(lambda case: globals()[f"case_{case}"](), sys.argv[2:])
