"""all_reduce, broadcast and barrier beyond the contract (contract_cases.py): faults, timeouts, torch.compile."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from compiled_threads import compiles_in_threads
from fault_cases import WatchedTransport
from torch import Tensor

import tritonmoe as tm
from tritonmoe.transports import Death, LocalTransport, Transport

SIZE = 3
CALLS: dict[str, tuple[int, Callable[[Transport, Tensor], object]]] = {
    # how many exchanges each makes
    "all_reduce": (3, lambda transport, tensor: transport.all_reduce(tensor)),
    "broadcast": (3, lambda transport, tensor: transport.broadcast(tensor, 1)),
    "barrier": (1, lambda transport, tensor: transport.barrier()),
}
EXCHANGES = [(name, exchange) for name, (count, _) in CALLS.items() for exchange in range(count)]


@pytest.mark.parametrize(("name", "exchange"), EXCHANGES)
def test_a_rank_that_dies_on_the_way(name: str, exchange: int) -> None:
    """Every survivor raises, and has the tensor that it had."""
    survivors = {}

    def on_rank(transport: Transport) -> None:
        tensor = torch.arange(7.0) + transport.rank
        with pytest.raises(tm.TransportError, match="rank 2 failed with RankStopped"):
            CALLS[name][1](transport, tensor)
        survivors[transport.rank] = tensor.tolist()

    with pytest.raises(tm.TransportError, match=f"rank 2 was stopped by its fault at exchange {exchange}"):
        tm.run_on_emulated_ranks(on_rank, SIZE, faults=[Death(rank=2, exchange=exchange)], timeout_s=10)
    assert survivors == {rank: (torch.arange(7.0) + rank).tolist() for rank in (0, 1)}


@pytest.mark.parametrize(("name", "exchange"), [of_call for of_call in EXCHANGES if of_call[1] > 0])
def test_a_rank_without_memory_leaves_nobody_waiting(name: str, exchange: int) -> None:
    """It fails behind the counts in which all agreed, and its process goes on."""
    all_have_raised = threading.Barrier(SIZE)

    def on_rank(transport: Transport) -> None:
        left = [exchange]

        def before() -> None:
            left[0] -= 1
            if left[0] < 0 and transport.rank == 2:
                raise MemoryError("no room for the rows")

        expected = MemoryError if transport.rank == 2 else tm.TransportError
        with pytest.raises(expected, match="no room for the rows"):  # not: has not heard from ranks [2]
            CALLS[name][1](WatchedTransport(transport, before), torch.arange(7.0))
        all_have_raised.wait(20)

    tm.run_on_emulated_ranks(on_rank, SIZE, timeout_s=2)


@pytest.mark.parametrize("name", CALLS)
def test_a_rank_that_never_comes(name: str) -> None:
    def on_rank(transport: Transport) -> None:
        if transport.rank == SIZE - 1:
            time.sleep(1.0)
            return
        before = time.perf_counter()
        with pytest.raises(
            tm.TransportError, match=f"could not agree on this {name}.*has not heard from ranks \\[2\\]"
        ):
            CALLS[name][1](transport, torch.ones(4))
        assert 0.2 < time.perf_counter() - before < 0.9

    tm.run_on_emulated_ranks(on_rank, SIZE, timeout_s=0.3)


def test_one_rank_communicates_with_nobody() -> None:
    transport = LocalTransport()
    transport.close()  # any exchange would raise
    tensor = torch.tensor([1.5, -0.0])
    assert transport.all_reduce(tensor, "mean") is tensor
    assert transport.broadcast(tensor) is tensor
    transport.barrier()
    with pytest.raises(ValueError, match="op must be one of"):
        transport.all_reduce(tensor, "product")


def test_the_sum_is_the_same_on_every_rank_and_in_rank_order() -> None:
    """1e8 + 1 - 1e8 is 0 in fp32 from the left, 1 in another order."""
    numbers = [1e8, 1.0, -1e8]
    for count in (1, 2, 5):
        sums = tm.run_on_emulated_ranks(
            lambda t, count=count: t.all_reduce(torch.full((count,), numbers[t.rank])), SIZE
        )
        assert [s.tolist() for s in sums] == [[0.0] * count] * SIZE


@pytest.mark.thorough
@compiles_in_threads
def test_compiled_code_leaves_its_graph() -> None:
    torch._dynamo.reset()

    def on_rank(transport: Transport) -> list[list[float]]:
        def function(x: Tensor) -> Tensor:
            return transport.broadcast(transport.all_reduce(x * 2) + transport.rank, 1) - 1

        compiled = torch.compile(function, backend="eager")
        return [compiled(torch.full((3,), float(step + transport.rank))).tolist() for step in range(3)]

    expected = [[2.0 * (3 * step + 3) + 1 - 1] * 3 for step in range(3)]
    assert tm.run_on_emulated_ranks(on_rank, SIZE, timeout_s=60) == [expected] * SIZE
