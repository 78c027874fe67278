"""What every transport must do, as functions that each rank runs; test_contract.py runs them on all transports.

Run as a script it is one process of a group: contract_cases.py FOLDER BACKEND DEVICE RANK SIZE, or, started by mpiexec,
contract_cases.py FOLDER mpi.
"""

import json
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports import MPITransport, ProcessGroupTransport, Transport

CASES: dict[str, Callable[[Transport], None]] = {}
LATE_S = 0.3
TIMEOUT_S = 1.0


def case(function: Callable[[Transport], None]) -> Callable[[Transport], None]:
    CASES[function.__name__] = function
    return function


def uneven(size: int, step: int = 0) -> list[list[int]]:
    """Give splits[i][k], the rows from rank i to rank k: all different, with zeros among them."""
    return [[(3 * i + 2 * k + step) % 5 for k in range(size)] for i in range(size)]


def message(sender: int, receiver: int, count: int, tail: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Give `count` rows whose small integers tell sender, receiver, row and column."""
    columns = torch.arange(math.prod(tail))
    codes = 31 * sender + 7 * receiver + 3 * torch.arange(count)[:, None] + columns
    return (codes % (2 if dtype == torch.bool else 13)).reshape(count, *tail).to(dtype)


def sent_rows(rank: int, splits: list[list[int]], tail: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([message(rank, k, count, tail, dtype) for k, count in enumerate(splits[rank])])


def expected_rows(
    rank: int, splits: list[list[int]], tail: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.cat([message(i, rank, splits[i][rank], tail, dtype) for i in range(len(splits))])


def column(splits: list[list[int]], rank: int) -> list[int]:
    return [row[rank] for row in splits]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.is_contiguous()
    assert actual.tolist() == expected.tolist()


def check_round(
    transport: Transport, splits: list[list[int]], tail: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float32
) -> None:
    rank = transport.rank
    rows = sent_rows(rank, splits, tail, dtype)
    pending = transport.exchange(rows, splits[rank], column(splits, rank))
    assert_same(pending.wait(), expected_rows(rank, splits, tail, dtype))


@case
def uneven_splits(transport: Transport) -> None:
    for step in range(5):
        check_round(transport, uneven(transport.size, step))


@case
def ranks_without_rows(transport: Transport) -> None:
    size = transport.size
    check_round(transport, [[2 if i == 0 else 0] * size for i in range(size)])  # one sender
    check_round(transport, [[2 if k == 0 else 0 for k in range(size)] for _ in range(size)])  # one receiver
    check_round(transport, [[3 if i == k else 0 for k in range(size)] for i in range(size)])  # all stay at home


@case
def no_rows_at_all(transport: Transport) -> None:
    check_round(transport, [[0] * transport.size for _ in range(transport.size)])
    check_round(transport, [[0] * transport.size for _ in range(transport.size)], tail=(), dtype=torch.int32)
    check_round(transport, uneven(transport.size), tail=(0,))


@case
def several_in_flight_waited_in_any_order(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    pending = []
    for step in range(4):
        splits = uneven(size, step)
        pending.append(transport.exchange(sent_rows(rank, splits, (2,)), splits[rank], column(splits, rank)))
    order = [2, 0, 3, 1] if rank % 2 else [3, 1, 0, 2]
    for step in order:
        received = pending[step].wait()
        assert_same(received, expected_rows(rank, uneven(size, step), (2,)))
        assert pending[step].wait() is received
        finished_at = pending[step].finished_at()
        assert finished_at is None or finished_at <= time.perf_counter()


@case
def a_late_peer_holds_up_only_wait(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    splits = uneven(size, 1)
    rows = sent_rows(rank, splits, (3,))
    transport.exchange_counts(torch.zeros(size, 1, dtype=torch.int64, device="cpu"))  # all ranks start together
    if size > 1 and rank == size - 1:
        time.sleep(LATE_S)
    before = time.perf_counter()
    pending = transport.exchange(rows, splits[rank], column(splits, rank))
    assert time.perf_counter() - before < 0.5 * LATE_S
    assert_same(pending.wait(), expected_rows(rank, splits, (3,)))
    if size > 1 and rank != size - 1:
        assert time.perf_counter() - before > 0.5 * LATE_S


@case
def every_dtype(transport: Transport) -> None:
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
    ):
        for tail in ((), (3,), (2, 3)):
            check_round(transport, uneven(transport.size, 2), tail, dtype)


@case
def into_a_slice_of_a_larger_buffer(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    for dtype in (torch.float32, torch.int32):
        splits = uneven(size, 3)
        expected = expected_rows(rank, splits, (4,), dtype)
        buffer = torch.full((len(expected) + 5, 4), 99, dtype=dtype)
        out = buffer[2 : 2 + len(expected)]
        pending = transport.exchange(sent_rows(rank, splits, (4,), dtype), splits[rank], column(splits, rank), out)
        assert pending.wait() is out
        assert_same(buffer[2:-3], expected)
        assert (buffer[:2] == 99).all()
        assert (buffer[-3:] == 99).all()


@case
def buffers_are_reused_over_steps(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    splits = [[4] * size for _ in range(size)]
    rows, out = torch.empty(4 * size, 8), torch.empty(4 * size, 8)
    for step in range(6):
        rows.copy_(torch.arange(4 * size).repeat_interleave(8).reshape(-1, 8) + 100 * rank + 1000 * step)
        received = transport.exchange(rows, splits[rank], column(splits, rank), out).wait()
        rows.fill_(-1)  # wait() has given the send buffer back
        for sender in range(size):
            expected = torch.arange(4 * rank, 4 * rank + 4) + 100 * sender + 1000 * step
            assert received[4 * sender : 4 * sender + 4, 0].tolist() == expected.tolist()


@case
def swapped_splits_bring_the_rows_home(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    splits = uneven(size, 4)
    there, back = splits[rank], column(splits, rank)
    rows = sent_rows(rank, splits, (3,), torch.bfloat16)
    away = transport.exchange(rows, there, back).wait()
    assert_same(transport.exchange(away, back, there).wait(), rows)


@case
def counts(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    for length in (1, 5, 0):
        peers, columns = torch.arange(size, device="cpu")[:, None], torch.arange(length, device="cpu")
        received = transport.exchange_counts(100 * rank + 10 * peers + columns)
        assert_same(received, 100 * peers + 10 * rank + columns)
    transposed = (torch.arange(2 * size, device="cpu").reshape(2, size) + 100 * rank).T
    assert transport.exchange_counts(transposed)[:, 0].tolist() == [100 * sender + rank for sender in range(size)]


@case
def rows_of_a_graph_and_of_inference_mode(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    splits = uneven(size, 1)
    expected = expected_rows(rank, splits, (2,))
    rows = sent_rows(rank, splits, (2,)).requires_grad_() * 1
    assert_same(transport.exchange(rows, splits[rank], column(splits, rank)).wait().detach(), expected)
    with torch.inference_mode():
        rows = sent_rows(rank, splits, (2,))
        assert_same(transport.exchange(rows, splits[rank], column(splits, rank)).wait(), expected)
        out = torch.empty_like(expected)
        transport.exchange(rows, splits[rank], column(splits, rank), out).wait()
        assert_same(out, expected)


@case
def bad_arguments_send_nothing(transport: Transport) -> None:
    size = transport.size
    good = [1] * size
    rows = torch.zeros(size, 2)
    too_many_counts = torch.zeros(size + 1, 2, dtype=torch.int64, device="cpu")
    bad: list[tuple[str, Callable[[], object]]] = [
        ("one count per rank", lambda: transport.exchange(rows, [*good, 0], good)),
        ("one count per rank", lambda: transport.exchange(rows, good, good[1:])),
        ("must not be negative", lambda: transport.exchange(rows, [-1] * size, good)),
        ("sends to itself", lambda: transport.exchange(rows, good, [2] * size)),
        ("must have sum", lambda: transport.exchange(torch.zeros(size + 1, 2), good, good)),
        ("rows must be contiguous", lambda: transport.exchange(torch.zeros(size, 4)[:, ::2], good, good)),
        ("out .* must be", lambda: transport.exchange(rows, good, good, torch.zeros(size + 1, 2))),
        ("out .* must be", lambda: transport.exchange(rows, good, good, torch.zeros(size, 2, dtype=torch.int64))),
        ("out must be contiguous", lambda: transport.exchange(rows, good, good, torch.zeros(size, 4)[:, ::2])),
        ("one row per rank", lambda: transport.exchange_counts(too_many_counts)),
        ("int64", lambda: transport.exchange_counts(torch.zeros(size, 2))),
    ]
    for words, call in bad:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="integer"):
        transport.exchange(rows, [1.0] * size, good)  # type: ignore[list-item]
    check_round(transport, uneven(size))


# What only processes can show: a peer that stays away, or is gone.


def a_peer_that_never_made_one(transport: Transport, folder: Path) -> None:
    assert_survivor_raises(transport, "gave no sign", at_least_s=0.9 * TIMEOUT_S)


def a_peer_that_never_calls(transport: Transport, folder: Path) -> None:
    words = "" if isinstance(transport, MPITransport) else "gave no sign"
    assert_survivor_raises(transport, words, at_least_s=0.9 * TIMEOUT_S)
    with pytest.raises(TransportError, match=r"since its first failure|after an earlier failure"):
        transport.exchange_counts(torch.zeros(transport.size, 1, dtype=torch.int64))


def a_peer_that_died(transport: Transport, folder: Path) -> None:
    (folder / f"survivor{transport.rank}").touch()
    time.sleep(0.5)  # the last rank sees the files of all others and ends
    assert_survivor_raises(transport, "has ended: its connection is closed", at_least_s=0.0)


def assert_survivor_raises(transport: Transport, words: str, at_least_s: float) -> None:
    size = transport.size
    before = time.perf_counter()
    where = re.escape(f"rank {transport.rank} of {size}, input_splits {[2] * size}")
    who = f".*rank {size - 1} {words}" if words else rf".*has not heard from ranks \[.*{size - 1}\]"
    with pytest.raises(TransportError, match=where + who):
        transport.exchange(torch.zeros(2 * size, 2), [2] * size, [2] * size).wait()
    assert at_least_s <= time.perf_counter() - before < 5 * TIMEOUT_S


FATAL_CASES = {
    function.__name__: function for function in (a_peer_that_never_made_one, a_peer_that_never_calls, a_peer_that_died)
}


MPI_FATAL_CASES = ("a_message_too_short", "a_message_too_long", "a_peer_that_never_calls")


def a_message_too_short(transport: Transport) -> None:
    check_wrong_splits(transport, 1, 2, r"rank \d sent 8 bytes where 2 rows of 8 were expected")


def a_message_too_long(transport: Transport) -> None:
    check_wrong_splits(transport, 2, 1, "(?i)truncated")


def check_wrong_splits(transport: Transport, sent: int, expected: int, words: str) -> None:
    """All ranks send and expect different numbers of rows; MPI is of no use afterwards."""
    rank, size = transport.rank, transport.size
    input_splits, output_splits = [sent] * size, [expected] * size
    output_splits[rank] = sent
    with pytest.raises(TransportError, match=words):
        transport.exchange(torch.zeros(sent * size, 2), input_splits, output_splits).wait()
    with pytest.raises(TransportError, match="of no use after an earlier failure"):
        check_round(transport, uneven(size))
    with pytest.raises(TransportError, match="MPI has no way back"):
        transport.rebuild()


@contextmanager
def results_in(file: Path) -> Iterator[dict[str, str | None]]:
    """Write to the file what each case in the dictionary said: None where it was right."""
    torch.set_num_threads(1)
    results: dict[str, str | None] = {}
    try:
        yield results
    except BaseException:
        results[next(reversed(results), "start")] = traceback.format_exc()
    finally:
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(results))
        unfinished.rename(file)


def run_case(results: dict[str, str | None], function: Callable[..., None], *arguments: object) -> None:
    results[function.__name__] = "did not finish"
    function(*arguments)
    results[function.__name__] = None


def wait_for_files(folder: Path, pattern: str, number: int) -> None:
    while len(list(folder.glob(pattern))) < number:
        time.sleep(0.02)


def run_one_process(folder: Path, backend: str, device: str, rank: int, size: int) -> None:
    """Run every case, in one process of a group."""
    with results_in(folder / f"{rank}.json") as results:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=30)
        )
        torch.set_default_device(device)
        transport = ProcessGroupTransport(timeout_s=20.0)
        for function in CASES.values():
            run_case(results, function, transport)
        fatal_transports = [ProcessGroupTransport(timeout_s=TIMEOUT_S) for _ in FATAL_CASES]
        for transport in fatal_transports[1:]:
            transport.exchange_counts(torch.zeros(size, 1, dtype=torch.int64, device="cpu"))
        if rank == size - 1:
            wait_for_files(folder, "survivor*", size - 1)
        else:
            for fatal, transport in zip(FATAL_CASES.values(), fatal_transports, strict=True):
                run_case(results, fatal, transport, folder)


def run_one_mpi_process(folder: Path) -> None:
    """Run every case, in one process that mpiexec started; its end is MPI_Abort."""
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    with results_in(folder / f"{rank}.json") as results:
        transport = MPITransport(MPI.COMM_WORLD, timeout_s=20.0)
        for function in CASES.values():
            run_case(results, function, transport)
        for fatal in (a_message_too_short, a_message_too_long):
            run_case(results, fatal, MPITransport(MPI.COMM_WORLD, timeout_s=20.0))
        transport = MPITransport(MPI.COMM_WORLD, timeout_s=TIMEOUT_S)
        if rank < size - 1:
            run_case(results, a_peer_that_never_calls, transport, folder)
    wait_for_files(folder, "*.json", size)


if __name__ == "__main__":
    if sys.argv[2] == "mpi":
        run_one_mpi_process(Path(sys.argv[1]))
    else:
        run_one_process(Path(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:]))
