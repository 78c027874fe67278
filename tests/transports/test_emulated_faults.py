"""The same faults on emulated ranks: the others end in time, say rank, step and chunk, and the next run works."""

import re
import threading
import time
from collections.abc import Callable

import pytest
import torch
from fault_cases import EXCHANGES, SIZE, TWO_CHUNKS, VICTIM, DamagingTransport, different_layer_order, step

import tritonmoe as tm
from tritonmoe.transports import Death, Delay, Transport

QUICK_S = 5.0
"""Nothing here waits this long unless it hangs; the transports' timeout is longer."""


def heard_by(fn: Callable[[Transport], object], timeout_s: float = 30.0, **options) -> list[str]:
    """Run fn on all ranks and give what each raised, "" for nothing; all of it in time, and nothing stays behind."""
    heard = [""] * SIZE

    def on_rank(transport: Transport) -> None:
        try:
            fn(transport)
        except BaseException as error:
            heard[transport.rank] = f"{type(error).__name__}: {error}"
            raise

    before, threads = time.perf_counter(), threading.active_count()
    try:
        tm.run_on_emulated_ranks(on_rank, SIZE, timeout_s=timeout_s, **options)
    except tm.TransportError:
        assert any(heard)
    assert time.perf_counter() - before < QUICK_S
    assert threading.active_count() == threads
    return heard


@pytest.fixture(autouse=True)
def _the_next_run_works():
    yield
    values = tm.run_on_emulated_ranks(step, SIZE)
    assert all(map(torch.isfinite, map(torch.tensor, values)))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_killed_rank(exchange: str) -> None:
    heard = heard_by(step, faults=[Death(VICTIM, EXCHANGES.index(exchange))])
    kind, _, chunk = exchange.partition(" ")
    where = f"step {kind}, " + (f"chunk {chunk}" if chunk else "all chunks")
    if kind == "counts":
        where = "count exchange of layer call 0, before any chunk"
    assert heard[VICTIM].startswith("RankStopped")
    for rank in range(VICTIM):
        assert re.search(f"^TransportError: {where}: .*rank {VICTIM} failed .*rank {rank} of {SIZE}", heard[rank]), (
            heard
        )


def test_a_rank_killed_in_experts() -> None:
    class Killed(BaseException):
        pass

    def fn(transport: Transport) -> None:
        def activation(h: torch.Tensor) -> torch.Tensor:
            if h.shape[0] and transport.rank == VICTIM:
                raise Killed
            return h[:, :4].sigmoid() * h[:, 4:]

        step(transport, activation=activation)

    before = time.perf_counter()
    with pytest.raises(Killed):
        heard_by(fn)
    assert time.perf_counter() - before < QUICK_S


@pytest.mark.parametrize("exchange", ["counts", "dispatch 1", "combine 0", "combine_backward 1"])
def test_late_ranks(exchange: str) -> None:
    """Within the timeout nothing changes; later than it, the others say where they waited."""
    number = EXCHANGES.index(exchange)
    expected = tm.run_on_emulated_ranks(step, SIZE)
    assert tm.run_on_emulated_ranks(step, SIZE, timeout_s=5, faults=[Delay(VICTIM, number, 0.3)]) == expected
    heard = heard_by(step, timeout_s=0.3, faults=[Delay(VICTIM, number, 1.2)])
    kind, _, chunk = exchange.partition(" ")
    where = f"step {kind}, chunk {chunk}" if chunk else "count exchange of layer call 0"
    for rank in range(VICTIM):
        assert re.search(f"^TransportError: {where}.*has not heard from ranks \\[{VICTIM}\\]", heard[rank]), heard


def test_corrupted_counts() -> None:
    heard = heard_by(lambda t: step(DamagingTransport(t) if t.rank == VICTIM else t))
    assert heard[VICTIM].startswith(f"CountMismatch: rank {VICTIM} got counts of rank 0 that contradict each other")
    for rank in range(VICTIM):
        assert re.search(f"^TransportError: step metadata, all chunks: .*rank {VICTIM} failed with CountM", heard[rank])


def test_different_layer_order() -> None:
    for words in heard_by(different_layer_order):
        assert re.search("^CountMismatch: the ranks disagree on layer .*rank 0: 0, rank 1: 0, rank 2: 1", words)


def test_layers_called_in_one_order_may_be_called_again_and_again() -> None:
    def fn(transport: Transport) -> None:
        layers = [tm.MoELayer(tm.MoEConfig(8, 4, 6, 2), transport, TWO_CHUNKS) for _ in range(2)]
        for layer in (layers[1], layers[0], layers[0], layers[1]):
            layer(torch.ones(3, 8))

    assert heard_by(fn) == [""] * SIZE
