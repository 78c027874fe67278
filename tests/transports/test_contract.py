"""The contract of base.Transport, on every transport; the cases are in contract_cases.py."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import contract_cases
import pytest
import torch
from processes import ENVIRONMENT, NEEDS_MPI, run_processes

from tritonmoe.errors import TransportError
from tritonmoe.transports import LinkModel, LocalTransport, ProcessGroupTransport, Transport, TwoLevelTransport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks

GLOO_SIZES = MPI_SIZES = (2, pytest.param(3, marks=pytest.mark.thorough))
LINK = LinkModel(bandwidth_gb_per_s=0.001, latency_us=500)
EMULATED = {
    **{f"W{size}": (size, None) for size in (1, 2, 3, 4)},
    **{f"W{size}-link": (size, LINK) for size in (1, 2, 3, 4)},
}
FIRST = ("W1", "W3", "W2-link")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@functools.cache
def process_results(size: int, backend: str, device: str) -> dict[str, dict[str, str | None]]:
    """Run all cases in `size` processes; gives what failed, by rank and case. One start for all tests of a size."""
    with tempfile.TemporaryDirectory() as folder:
        ended = run_processes(size, backend, contract_cases.__file__, folder, backend, device)
        results: dict[str, dict[str, str | None]] = {}
        for rank in range(size):
            file = Path(folder) / f"{rank}.json"
            results[str(rank)] = json.loads(file.read_text()) if file.exists() else {"start": ended.output}
        results["all"] = {"output": ended.output, "statuses": str(ended.statuses)}
    return results


def check_processes(name: str, ranks: range, size: int, backend: str = "gloo", device: str = "cpu") -> None:
    results = process_results(size, backend, device)
    for rank in ranks:
        failure = results[str(rank)].get(name, "was not reached")
        assert failure is None, f"rank {rank} of {size}: {failure}\nall results: {results}"


@pytest.mark.parametrize("name", contract_cases.CASES)
def test_local(name: str) -> None:
    contract_cases.CASES[name](LocalTransport())


@pytest.mark.parametrize(
    "where", [pytest.param(where, marks=() if where in FIRST else pytest.mark.thorough) for where in EMULATED]
)
@pytest.mark.parametrize("name", contract_cases.CASES)
def test_emulated(name: str, where: str) -> None:
    size, link = EMULATED[where]
    run_on_emulated_ranks(contract_cases.CASES[name], size, link=link, timeout_s=10)


@pytest.mark.parametrize("view", ["between_nodes", "inside_node"])
@pytest.mark.parametrize("name", contract_cases.CASES)
def test_views_of_two_levels(name: str, view: str) -> None:
    def fn(world: Transport) -> None:
        contract_cases.CASES[name](getattr(TwoLevelTransport(world, 2), view))

    run_on_emulated_ranks(fn, 4, timeout_s=10)


@pytest.mark.parametrize("name", contract_cases.CASES)
def test_two_levels(name: str) -> None:
    run_on_emulated_ranks(lambda world: contract_cases.CASES[name](TwoLevelTransport(world, 2)), 4, timeout_s=10)


@pytest.mark.parametrize("size", GLOO_SIZES)
@pytest.mark.parametrize("name", contract_cases.CASES)
def test_gloo(name: str, size: int) -> None:
    check_processes(name, range(size), size)


@pytest.mark.parametrize("size", GLOO_SIZES)
@pytest.mark.parametrize("name", contract_cases.FATAL_CASES)
def test_gloo_survivors(name: str, size: int) -> None:
    check_processes(name, range(size - 1), size)


@NEEDS_MPI
@pytest.mark.parametrize("size", MPI_SIZES)
@pytest.mark.parametrize("name", contract_cases.CASES)
def test_mpi(name: str, size: int) -> None:
    check_processes(name, range(size), size, "mpi")


@NEEDS_MPI
@pytest.mark.parametrize("size", MPI_SIZES)
@pytest.mark.parametrize("name", contract_cases.MPI_FATAL_CASES)
def test_mpi_survivors(name: str, size: int) -> None:
    check_processes(name, range(size if "message" in name else size - 1), size, "mpi")


@NEEDS_MPI
@pytest.mark.parametrize("size", MPI_SIZES)
def test_mpi_is_aborted_after_a_failure(size: int) -> None:
    """MPI_Finalize would wait for ever; the reason has been logged before."""
    everybody = process_results(size, "mpi", "cpu")["all"]
    assert everybody["statuses"] != "[0]"
    assert "MPI_Abort when this process ends: exchange 0 failed" in str(everybody["output"])
    assert "took longer than timeout_s = 1.0" in str(everybody["output"])


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


@pytest.mark.slow
@NEEDS_MPI
def test_mpi_message_beyond_int32(tmp_path: Path) -> None:
    """Two rows of more than 2 GiB in all, which take 5 GB of memory."""
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import torch
        from mpi4py import MPI
        from tritonmoe.transports import MPITransport

        transport = MPITransport(MPI.COMM_WORLD)
        is_sender = transport.rank == 0
        rows = torch.zeros(2 if is_sender else 0, 2**30 + 1, dtype=torch.uint8)
        rows[:, -1] = torch.tensor([3, 7])[: len(rows)]
        splits = ([0, 2], [0, 0]) if is_sender else ([0, 0], [2, 0])
        received = transport.exchange(rows, *splits).wait()
        print(received[:, -1].tolist())
    """)
    assert "[3, 7]" in run_processes(2, "mpi", str(script), timeout_s=120).output


@pytest.mark.thorough
@NEEDS_MPI
def test_mpi_arguments() -> None:
    code = """if True:
        import mpi4py
        mpi4py.rc.thread_level = "serialized"
        from mpi4py import MPI
        from tritonmoe.transports import MPITransport
        for timeout_s in (0, 1.0):
            try:
                MPITransport(MPI.COMM_WORLD, timeout_s=timeout_s)
            except ValueError as error:
                print(error)
    """
    said = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "timeout_s must be positive, got 0" in said.stdout
    assert "initialised without MPI_THREAD_MULTIPLE" in said.stdout


@pytest.mark.thorough
@NEEDS_MPI
def test_closed_mpi() -> None:
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        from mpi4py import MPI
        from test_contract import check_closed
        from tritonmoe.transports import MPITransport
        check_closed(MPITransport(MPI.COMM_WORLD))
    """
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], env=ENVIRONMENT, check=True)


@pytest.mark.thorough
@NEEDS_MPI
def test_a_process_of_mpi_that_ends_with_rows_under_way_aborts() -> None:
    """MPI_Finalize would wait for ever, here and on the other ranks."""
    code = """if True:
        from mpi4py import MPI
        from tritonmoe.transports import MPITransport, mpi
        mpi.SECONDS_BEFORE_ABORT = 0
        transport = MPITransport(MPI.COMM_WORLD)
        transport._progress.end = lambda: False  # its thread waits for rows
        print("the process ends", flush=True)
    """
    ended = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.stdout.startswith("the process ends"), ended.stderr
    assert "MPI_Abort when this process ends: a transport was closed with exchanges under way" in ended.stderr
    assert ended.returncode != 0


def test_importing_the_transports_leaves_torch_distributed_alone() -> None:
    code = "import sys, torch; before = set(sys.modules); "
    code += "import tritonmoe.transports, tritonmoe.transports.emulated.emulated_ranks; "
    code += "new = set(sys.modules) - before; "
    code += "assert not any(m.startswith(('torch.distributed', 'mpi4py')) for m in new), new"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)
