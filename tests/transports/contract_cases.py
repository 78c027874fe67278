"""What every transport must do, as functions that each rank runs; test_contract.py runs them on all transports.

Run as a script it is one process of a group: contract_cases.py FOLDER BACKEND DEVICE RANK SIZE, or, started by mpiexec,
contract_cases.py FOLDER mpi.
"""

import functools
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
from same_bits import assert_same_bits
from torch import Tensor

import tritonmoe as tm
from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.transports import MPITransport, ProcessGroupTransport, Transport

CASES: dict[str, Callable[[Transport], None]] = {}
LATE_S = 0.3
TIMEOUT_S = 1.0


def case(function: Callable[[Transport], None]) -> Callable[[Transport], None]:
    CASES[function.__name__] = function
    return function


def uneven(size: int, step: int = 0) -> list[list[int]]:
    """Return splits[i][k], the rows from rank i to rank k: all different, with zeros among them."""
    return [[(3 * i + 2 * k + step) % 5 for k in range(size)] for i in range(size)]


def message(sender: int, receiver: int, count: int, tail: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return `count` rows whose small integers tell sender, receiver, row and column."""
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
def arrivals_tell_which_rank_was_late(transport: Transport) -> None:
    """The last rank comes late: its rows do, and those of the others don't."""
    late, own = transport.size - 1, transport.rank
    transport.records_arrivals = True
    transport.barrier()
    if own == late:
        time.sleep(LATE_S)
    ones = [1] * transport.size
    rows, posted_at = torch.zeros(transport.size, 3), time.perf_counter()
    pending = transport.exchange(rows, ones, ones)
    pending.wait()
    arrivals = pending.arrivals()
    transport.records_arrivals = False
    if transport.size == 1 or rows.is_cuda:  # nothing travels, or only the device knows
        return
    assert arrivals is not None
    assert arrivals[own] is None
    after_s = {rank: at - posted_at for rank, at in enumerate(arrivals) if at is not None}
    assert set(after_s) == set(range(transport.size)) - {own}
    if own != late:
        assert after_s.pop(late) > 0.8 * LATE_S
    assert all(seconds < 0.5 * LATE_S for seconds in after_s.values())


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
def counts_and_rows_in_flight_waited_in_any_order(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    columns = torch.arange(5, device="cpu")
    splits = uneven(size)
    posted = []
    for number in range(3):
        counts = 1000 * number + 100 * rank + 10 * torch.arange(size, device="cpu")[:, None] + columns
        posted.append(transport.post_counts(counts))
        rows = transport.exchange(sent_rows(rank, splits, (2,)), splits[rank], column(splits, rank))
    assert_same(rows.wait(), expected_rows(rank, splits, (2,)))
    for number in (2, 0, 1):
        received = posted[number].wait()
        senders = torch.arange(size, device="cpu")[:, None]
        assert received.tolist() == (1000 * number + 100 * senders + 10 * rank + columns).tolist()
        assert posted[number].wait() is received


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


# Collectives.

ALL_DTYPES = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn),
)
SHAPES = ((), (1,), (7,), (0,), (2, 0), (3, 2, 5))


def of_rank(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return numbers whose sum in a narrow dtype, or in another order than by rank, has other bits; integers wrap."""
    drawn = torch.randn(
        *shape, 2, generator=torch.Generator("cpu").manual_seed(rank), dtype=torch.float64, device="cpu"
    )
    drawn = drawn * 10.0 ** (3 * (rank % 2))
    if dtype.is_complex:
        values = torch.view_as_complex(drawn).to(dtype)
    elif dtype.is_floating_point:
        values = drawn[..., 0].to(torch.float32 if dtype.itemsize < 8 else dtype).to(dtype)
    else:
        values = (drawn[..., 0] * 50).long().to(dtype)
    return values.to(torch.get_default_device())


def reduced(parts: list[Tensor], op: str) -> Tensor:
    """Reduce in rank order, one part after the other, in fp32 or wider."""
    dtype = parts[0].dtype
    wide = dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
    total, *others = (part.to(wide if dtype.is_floating_point or dtype.is_complex else torch.int64) for part in parts)
    for other in others:
        total = {"max": torch.maximum, "min": torch.minimum}.get(op, torch.add)(total, other)
    return (total / len(parts) if op == "mean" else total).to(dtype)


def ops_of(dtype: torch.dtype) -> tuple[str, ...]:
    if dtype.is_complex:
        return "sum", "mean"
    if dtype == torch.bool:
        return "max", "min"
    return ("sum", "mean", "max", "min") if dtype.is_floating_point else ("sum", "max", "min")


@case
def all_reduce_of_every_dtype_and_shape(transport: Transport) -> None:
    for dtype in ALL_DTYPES:
        for shape in SHAPES if dtype in (torch.float32, torch.uint8) else SHAPES[2:3]:
            for op in ops_of(dtype):
                parts = [of_rank(rank, shape, dtype) for rank in range(transport.size)]
                own = parts[transport.rank].clone()
                assert transport.all_reduce(own, op) is own
                assert_same_bits(own, reduced(parts, op))


@case
def all_reduce_of_a_strided_tensor(transport: Transport) -> None:
    parts = [of_rank(rank, (6, 4), torch.float32) for rank in range(transport.size)]
    buffer = parts[transport.rank].clone()
    own = buffer[1:5:2].T
    transport.all_reduce(own)
    expected = parts[transport.rank].clone()
    expected[1:5:2] = reduced(parts, "sum")[1:5:2]
    assert_same_bits(buffer, expected)


@case
def collectives_of_parameters_and_in_inference_mode(transport: Transport) -> None:
    size = transport.size
    parameter = torch.nn.Parameter(torch.full((3,), float(transport.rank)))
    version = parameter._version
    transport.all_reduce(parameter, "mean")
    assert parameter.tolist() == [(size - 1) / 2] * 3
    assert parameter.is_leaf
    assert size == 1 or parameter._version > version  # a graph that needs the old value would say so
    with torch.inference_mode():
        assert transport.all_reduce(torch.ones(2)).tolist() == [size] * 2
        assert transport.broadcast(torch.full((2,), transport.rank), size - 1).tolist() == [size - 1] * 2


@case
def all_reduce_gives_a_nan_of_any_rank(transport: Transport) -> None:
    for op in ("sum", "mean", "max", "min"):
        own = torch.ones(3)
        own[1] = math.nan if transport.rank == transport.size - 1 else 1.0
        assert transport.all_reduce(own, op).isnan().tolist() == [False, True, False]


@case
def broadcast_from_every_rank(transport: Transport) -> None:
    for source in range(transport.size):
        for dtype in ALL_DTYPES:
            for shape in SHAPES if dtype in (torch.float32, torch.uint8) else SHAPES[2:3]:
                expected = of_rank(source, shape, dtype)
                own = of_rank(transport.rank, shape, dtype)
                assert transport.broadcast(own, source) is own
                assert_same_bits(own, expected)
    odd = torch.tensor([0x7FC00001, -(2**31)], dtype=torch.int32).view(torch.float32)  # a NaN of its own, and -0.0
    own = odd.clone() if transport.rank == 0 else torch.zeros(2)
    assert_same_bits(transport.broadcast(own), odd)


@case
def a_barrier_waits_for_all(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    transport.barrier()
    if size > 1 and rank == size - 1:
        time.sleep(LATE_S)
    before = time.perf_counter()
    transport.barrier()
    assert size == 1 or rank == size - 1 or time.perf_counter() - before > 0.5 * LATE_S


@case
def every_rank_hears_the_numbers_of_all(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    for factor in (1, -3, 2**40):
        assert transport.share_number(rank * factor) == [other * factor for other in range(size)]


@case
def collectives_that_differ_are_refused_on_every_rank(transport: Transport) -> None:
    """In shape, dtype, op, source, call, or a layer call: the same error everywhere, and the next call works."""
    rank, size = transport.rank, transport.size
    if size == 1:
        return
    is_odd = rank == size - 1

    def layer_call() -> object:
        weights = torch.zeros(1, 2, 4), torch.zeros(1, 4, 1)
        ids = torch.zeros(3, 1, dtype=torch.int64)
        return tm.expert_parallel_mlp(
            torch.zeros(3, 4), ids, torch.ones(3, 1), *weights, num_experts=size, transport=transport
        )

    calls: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        (
            r"of \(2,\).*of \(3,\)",
            lambda: transport.all_reduce(torch.ones(2)),
            lambda: transport.all_reduce(torch.ones(3)),
        ),
        (
            r"of \(2, 3\).*of \(6,\)",
            lambda: transport.broadcast(torch.ones(2, 3)),
            lambda: transport.broadcast(torch.ones(6)),
        ),
        (
            "float32.*bfloat16",
            lambda: transport.all_reduce(torch.ones(2)),
            lambda: transport.all_reduce(torch.ones(2, dtype=torch.bfloat16)),
        ),
        (
            r"\(sum\).*\(max\)",
            lambda: transport.all_reduce(torch.ones(2)),
            lambda: transport.all_reduce(torch.ones(2), "max"),
        ),
        (
            "from rank 0.*from rank 1",
            lambda: transport.broadcast(torch.ones(2), 0),
            lambda: transport.broadcast(torch.ones(2), 1),
        ),
        ("barrier.*share_number", transport.barrier, lambda: transport.share_number(3)),
        ("make another call|sent something", lambda: transport.share_number(3), layer_call),
        ("barrier.*all_reduce", transport.barrier, lambda: transport.all_reduce(torch.ones(2))),
        ("make another call|sent something", lambda: transport.all_reduce(torch.ones(2)), layer_call),
        ("make another call|sent something", layer_call, lambda: transport.broadcast(torch.ones(2))),
    ]
    for words, ours, odd in calls:
        own = torch.ones(2)
        with pytest.raises(CountMismatch, match=words):
            odd() if is_odd else ours()
        assert transport.all_reduce(own).tolist() == [size] * 2


@case
def a_collective_refused_on_one_rank_is_refused_on_all(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    good = torch.ones(2)
    bad: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (TypeError, "must be a tensor, got list", lambda: transport.all_reduce([1.0])),  # type: ignore[arg-type]
        (TypeError, "must be dense", lambda: transport.all_reduce(torch.eye(2).to_sparse())),
        (TypeError, "must be dense", lambda: transport.broadcast(torch.ones(2, device="meta"))),
        (ValueError, "part of an autograd graph", lambda: transport.all_reduce(torch.ones(2, requires_grad=True) * 2)),
        (ValueError, "repeats its elements", lambda: transport.broadcast(torch.ones(1).expand(2))),
        (ValueError, "op must be one of sum, mean, max, min, got 'avg'", lambda: transport.all_reduce(good, "avg")),
        (ValueError, "a mean of torch.int64", lambda: transport.all_reduce(good.long(), "mean")),
        (ValueError, "a sum of torch.bool", lambda: transport.all_reduce(good.bool())),
        (ValueError, "complex numbers have no max", lambda: transport.all_reduce(good + 1j, "max")),
        (ValueError, f"one of the ranks 0..{size - 1}, got {size}", lambda: transport.broadcast(good, size)),
        (ValueError, "got -1", lambda: transport.broadcast(good, -1)),
        (ValueError, "got True", lambda: transport.broadcast(good, True)),
    ]
    for kind, words, call in bad:
        if rank == size - 1:
            with pytest.raises(kind, match=words):
                call()
        else:
            with pytest.raises(TransportError, match=rf"ranks \[{size - 1}\] refused the arguments of their part"):
                transport.all_reduce(torch.ones(2))
    assert good.tolist() == [1, 1]
    assert transport.all_reduce(good).tolist() == [size] * 2


@case
def load_balance_over_all_ranks(transport: Transport) -> None:
    """The mean of the ranks' losses and gradients is that of one device with all tokens, whatever each rank has."""
    rank, size = transport.rank, transport.size
    config = tm.MoEConfig(8, 4, 2 * size, 2, load_balance_loss_weight=0.3, load_balance_over="global")
    generator = torch.Generator("cpu").manual_seed(5)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
    xs = [draw((4, 7, 0, 3)[r], 8).to(torch.get_default_device()) for r in range(size)]
    layer, whole = (
        tm.MoELayer(config, where, generator=generator.manual_seed(0), dtype=torch.float64)
        for where in (transport, None)
    )
    layer(xs[rank])
    whole(torch.cat(xs))
    assert layer.aux_loss is not None
    assert whole.aux_loss is not None
    (grad,) = torch.autograd.grad(layer.aux_loss, layer.router.weight)
    (expected,) = torch.autograd.grad(whole.aux_loss, whole.router.weight)
    torch.testing.assert_close(transport.all_reduce(layer.aux_loss.detach(), "mean"), whole.aux_loss.detach())
    torch.testing.assert_close(transport.all_reduce(grad, "mean"), expected)
    assert size == 1 or expected.abs().max() > 1e-3


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
    with pytest.raises(TransportError, match="MPI can't be used after a failed exchange"):
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
