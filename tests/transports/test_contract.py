"""The contract of base.Transport, on every transport; the cases are in contract_cases.py."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import contract_cases
import pytest
import torch

import tritonmoe
from tritonmoe.emulation import run_on_emulated_ranks
from tritonmoe.errors import TransportError
from tritonmoe.transports import LinkModel, LocalTransport, ProcessGroupTransport, Transport

GLOO_SIZES = (2, 3)
LINK = LinkModel(bandwidth_gb_per_s=0.001, latency_us=500)
EMULATED = {
    **{f"W{size}": (size, None) for size in (1, 2, 3, 4)},
    **{f"W{size}-link": (size, LINK) for size in (1, 2, 3, 4)},
}


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@functools.cache
def process_results(size: int, backend: str = "gloo", device: str = "cpu") -> dict[str, dict[str, str | None]]:
    """Run all cases in `size` processes; gives what failed, by rank and case. One start for all tests of a size."""
    package_folder = str(Path(tritonmoe.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package_folder, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, contract_cases.__file__, str(rank), str(size), folder, backend, device],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        results: dict[str, dict[str, str | None]] = {}
        try:
            for rank, process in enumerate(processes):
                output, _ = process.communicate(timeout=60)
                file = Path(folder) / f"{rank}.json"
                results[str(rank)] = json.loads(file.read_text()) if file.exists() else {"start": output}
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return results


def check_processes(name: str, ranks: range, size: int, backend: str = "gloo", device: str = "cpu") -> None:
    results = process_results(size, backend, device)
    for rank in ranks:
        failure = results[str(rank)].get(name, "was not reached")
        assert failure is None, f"rank {rank} of {size}: {failure}\nall results: {results}"


@pytest.mark.parametrize("name", contract_cases.CASES)
def test_local(name: str) -> None:
    contract_cases.CASES[name](LocalTransport())


@pytest.mark.parametrize("where", EMULATED)
@pytest.mark.parametrize("name", contract_cases.CASES)
def test_emulated(name: str, where: str) -> None:
    size, link = EMULATED[where]
    run_on_emulated_ranks(contract_cases.CASES[name], size, link=link, timeout_s=10)


@pytest.mark.parametrize("size", GLOO_SIZES)
@pytest.mark.parametrize("name", contract_cases.CASES)
def test_gloo(name: str, size: int) -> None:
    check_processes(name, range(size), size)


@pytest.mark.parametrize("size", GLOO_SIZES)
@pytest.mark.parametrize("name", contract_cases.FATAL_CASES)
def test_gloo_survivors(name: str, size: int) -> None:
    check_processes(name, range(size - 1), size)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("where", ["W1", "W3", "W3-link"])
@pytest.mark.parametrize("name", contract_cases.CASES)
def test_emulated_on_cuda(name: str, where: str) -> None:
    def fn(transport: Transport) -> None:
        with torch.device("cuda"):
            contract_cases.CASES[name](transport)

    size, link = EMULATED[where]
    run_on_emulated_ranks(fn, size, device="cuda", link=link, timeout_s=10)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize("name", contract_cases.CASES)
def test_nccl_with_one_rank(name: str, backend: str) -> None:
    check_processes(name, range(1), 1, backend, "cuda")


@pytest.mark.parametrize("size", [1, 2])
def test_closed_emulated(size: int) -> None:
    run_on_emulated_ranks(check_closed, size)


def test_closed_local() -> None:
    check_closed(LocalTransport())


def check_closed(transport: Transport) -> None:
    transport.close()
    transport.close()
    with pytest.raises(TransportError, match=r"closed|ended"):
        transport.exchange(torch.zeros(transport.size, 2), [1] * transport.size, [1] * transport.size)
    with pytest.raises(TransportError, match=r"closed|ended"):
        transport.exchange_counts(torch.zeros(transport.size, 2, dtype=torch.int64))


def test_process_group_needs_a_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        ProcessGroupTransport()
    with pytest.raises(ValueError, match="timeout_s must be positive"):
        ProcessGroupTransport(timeout_s=0)


def test_importing_the_transports_leaves_torch_distributed_alone() -> None:
    code = "import sys, torch; before = set(sys.modules); import tritonmoe.transports, tritonmoe.emulation; "
    code += "new = set(sys.modules) - before; assert not any(m.startswith('torch.distributed') for m in new), new"
    environment = {**os.environ, "PYTHONPATH": str(Path(tritonmoe.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
