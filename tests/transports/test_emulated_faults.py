"""The same faults on emulated ranks: the others end in time, say rank, step and chunk, and the next run works."""

import re
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
from fault_cases import (
    DAMAGED,
    EXCHANGES,
    MAX_SEGMENTS,
    SIZE,
    TWO_CHUNKS,
    VICTIM,
    corrupted_counts,
    damaging,
    different_chunks,
    different_layer_order,
    failing,
    fails_in_backward_experts,
    fails_in_experts,
    full_disk,
    is_victim,
    step,
)

import tritonmoe as tm
from tritonmoe.expert_parallel.layer_pass import BackwardPass, ForwardPass
from tritonmoe.overlap.executor import Execution
from tritonmoe.transports import Death, Delay, Transport

QUICK_S = 5.0
"""Nothing here waits this long unless it hangs; the transports' timeout is longer."""


class Killed(BaseException):
    pass


def heard_by(
    fn: Callable[[Transport], object],
    timeout_s: float = 30.0,
    quick_s: float = QUICK_S,
    size: int = SIZE,
    raised: type[BaseException] = tm.TransportError,
    **options,
) -> list[str]:
    """Run fn on all ranks and give what each raised, "" for nothing; all of it in time, and nothing stays behind."""
    heard = [""] * size

    def on_rank(transport: Transport) -> None:
        try:
            fn(transport)
        except BaseException as error:
            heard[transport.rank] = f"{type(error).__name__}: {error}"
            raise

    before, threads = time.perf_counter(), threading.active_count()
    try:
        tm.run_on_emulated_ranks(on_rank, size, timeout_s=timeout_s, **options)
    except raised:
        assert any(heard)
    assert time.perf_counter() - before < quick_s
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
    if exchange == "backward counts":
        where = "before the backward of layer 0, call 0"
    assert heard[VICTIM].startswith("RankStopped")
    for rank in range(VICTIM):
        assert re.search(f"^TransportError: {where}: .*rank {VICTIM} failed .*rank {rank} of {SIZE}", heard[rank]), (
            heard
        )


@pytest.mark.parametrize(
    ("fails", "where"),
    [
        (fails_in_experts, "step combine, chunk [01]"),
        (fails_in_backward_experts, "step dispatch_backward, chunk [01]"),
    ],
)
def test_a_rank_killed_in_experts(fails: Callable, where: str) -> None:
    def die() -> None:
        raise Killed

    heard = heard_by(fails(die), raised=Killed)
    assert heard[VICTIM] == "Killed: "
    for rank in range(VICTIM):
        assert re.search(f"^TransportError: {where}: .*rank {VICTIM} failed with Killed.*rank {rank} of", heard[rank])


@pytest.mark.parametrize(
    ("kind", "where"), [(ForwardPass, "step metadata, all chunks"), (BackwardPass, "step combine_backward, chunk 0")]
)
def test_a_rank_without_memory_for_the_buffers(kind: type, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others hear of it there, though its process goes on."""
    start, all_heard = kind._start, threading.Barrier(SIZE)

    def without_memory(self: ForwardPass | BackwardPass) -> Execution:
        if is_victim(self.exchanges.transport):
            raise torch.OutOfMemoryError("as if")
        return start(self)

    def on_rank(transport: Transport) -> None:
        try:
            step(transport)
        finally:
            all_heard.wait(QUICK_S / 2)

    monkeypatch.setattr(kind, "_start", without_memory)
    heard = heard_by(on_rank, raised=torch.OutOfMemoryError)
    assert heard[VICTIM] == "OutOfMemoryError: as if"
    for rank in range(VICTIM):
        assert re.search(f"^TransportError: {where}: .*rank {VICTIM} failed with OutOfMemoryError: as if", heard[rank])


LATE = [
    *((exchange, 0.6) for exchange in ("counts", "dispatch 1", "combine 0", "combine_backward 1")),
    *(pytest.param("dispatch 1", seconds, marks=pytest.mark.slow) for seconds in (1.0, 5.0, 30.0)),
]


@pytest.mark.parametrize(("exchange", "late_s"), LATE)
def test_late_ranks(exchange: str, late_s: float) -> None:
    """Within the timeout nothing changes; later than it, all say where they waited."""
    number = EXCHANGES.index(exchange)
    expected = tm.run_on_emulated_ranks(step, SIZE)
    delay = Delay(VICTIM, number, late_s)
    assert tm.run_on_emulated_ranks(step, SIZE, timeout_s=late_s + QUICK_S, faults=[delay]) == expected
    heard = heard_by(step, timeout_s=late_s / 3, quick_s=late_s + QUICK_S, faults=[delay])
    kind, _, chunk = exchange.partition(" ")
    where = f"step {kind}, chunk {chunk}" if chunk else "count exchange of layer call 0"
    for rank in range(VICTIM):
        assert re.search(f"^TransportError: {where}.*has not heard from ranks \\[{VICTIM}\\]", heard[rank]), heard
    # All others had posted what the late one posted then; what comes next fails.
    assert re.search(f"^TransportError: (step|before the backward) .*rank {VICTIM} of {SIZE}", heard[VICTIM]), heard


def test_corrupted_counts() -> None:
    heard = heard_by(corrupted_counts)
    assert heard[VICTIM].startswith(
        f"CountMismatch: rank {VICTIM} got counts of rank {DAMAGED} that contradict each other"
    )
    for rank in range(VICTIM):
        assert re.search(f"^TransportError: step metadata, all chunks: .*rank {VICTIM} failed with CountM", heard[rank])


DESCRIBED_COUNTS = [
    *(kind * MAX_SEGMENTS + segment - 3 * MAX_SEGMENTS for kind in range(3) for segment in range(4)),
    *(VICTIM - 3 * MAX_SEGMENTS - 2 * SIZE, VICTIM - 3 * MAX_SEGMENTS - SIZE),
]
"""Places of rows, pairs and returning rows of all segments, and of the rows and pairs in all."""


@pytest.mark.parametrize("place", DESCRIBED_COUNTS)
def test_every_damaged_count_is_noticed(place: int) -> None:
    for bit in (1, 4):
        heard = heard_by(lambda t, bit=bit: step(damaging(t, place, bit) if t.rank == VICTIM else t))
        assert heard[VICTIM].startswith("CountMismatch"), (bit, heard)


def test_different_chunks() -> None:
    for words in heard_by(different_chunks):
        assert re.search("^CountMismatch: the ranks disagree on num_chunks .*rank 0: 2, rank 1: 2, rank 2: 3", words)


def test_different_layer_order() -> None:
    places = "rank 1: forward of layer 0, .*rank 2: forward of layer 1,"
    for words in heard_by(different_layer_order):
        assert re.search(f"^CountMismatch: the ranks disagree on which call this is .*{places}", words)


def test_a_full_disk_under_the_trace_of_one_rank() -> None:
    heard = heard_by(full_disk, raised=OSError)
    assert heard[VICTIM].startswith("OSError: [Errno 28] the trace could not be written: No space left on device")
    for words in heard[:VICTIM]:
        assert re.search(f"^TransportError: count exchange of layer call 1, .*rank {VICTIM} failed with OSError", words)


def interrupts_in(exchange: str) -> Callable[[Transport], object]:
    """Let the last rank press Ctrl-C, which the main thread gets, before an exchange."""
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupt() -> None:
        time.sleep(0.3)  # what was posted before has arrived
        signal.pthread_kill(main_thread, signal.SIGINT)
        time.sleep(0.3)

    return lambda transport: step(failing(transport, exchange, interrupt) if is_victim(transport) else transport)


def test_control_c() -> None:
    heard = heard_by(interrupts_in("dispatch 1"), raised=KeyboardInterrupt)
    for rank in range(VICTIM):
        words = f"step dispatch, chunk 1: .* was cut off: .* interrupted by KeyboardInterrupt .rank {rank} of {SIZE}"
        assert re.search(f"^TransportError: {words}", heard[rank]), heard


def test_layers_called_in_one_order_may_be_called_again_and_again() -> None:
    def fn(transport: Transport) -> None:
        layers = [tm.MoELayer(tm.MoEConfig(8, 4, 6, 2), transport, TWO_CHUNKS) for _ in range(2)]
        for layer in (layers[1], layers[0], layers[0], layers[1]):
            layer(torch.ones(3, 8))

    assert heard_by(fn) == [""] * SIZE


@pytest.mark.parametrize("kind", [lambda *place: Delay(*place, 0.0), Death])
def test_a_fault_that_never_happens_is_a_warning(kind):
    counts = torch.zeros(2, 1, dtype=torch.int64)

    def three_exchanges(transport: Transport) -> int:
        for _ in range(3):
            transport.exchange_counts(counts)
        return transport.rank

    words = r"{}\(rank=1, exchange=3.*\) never happened: rank 1 made 3 exchanges, numbers 0 to 2; give a fault"
    with pytest.warns(UserWarning, match=words.format("(Delay|Death)")) as caught:
        assert tm.run_on_emulated_ranks(three_exchanges, 2, faults=[kind(1, 3), Delay(0, 2, 0.0)]) == [0, 1]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="rank 1 made no exchange"):
        tm.run_on_emulated_ranks(lambda transport: transport.rank, 2, faults=[kind(1, 0)])

    def rebuilt(transport: Transport) -> None:
        if transport.rank == 0:
            transport.exchange(torch.zeros(0), [0, 0], [0, 0])
            transport.exchange(torch.zeros(0), [0, 0], [0, 0])
        transport.rebuild()
        transport.exchange_counts(counts)

    with pytest.warns(UserWarning, match=r"exchange=1.* never happened: rebuild\(\) passed over this number on rank 1"):
        tm.run_on_emulated_ranks(rebuilt, 2, faults=[kind(1, 1)])


@pytest.mark.filterwarnings("error")
def test_a_fault_that_never_happens_hides_no_error():
    def fails(transport: Transport) -> None:
        raise ValueError(f"of rank {transport.rank} itself")

    with pytest.raises(ValueError, match="of rank 0 itself"):
        tm.run_on_emulated_ranks(fails, 1, faults=[Delay(0, 9, 0.0)])


@pytest.mark.filterwarnings("error")
def test_faults_behind_a_death_are_no_warning():
    with pytest.raises(tm.TransportError, match="rank 1 was stopped by its fault at exchange 0"):
        tm.run_on_emulated_ranks(step, SIZE, faults=[Death(1, 0), Delay(0, 99, 0.0), Death(1, 99)])


@pytest.mark.parametrize(
    ("faults", "error", "words"),
    [
        ([Death(2, 0)], ValueError, "must name a rank from 0 to 1"),
        ([Death(-1, 0)], ValueError, "must name a rank from 0 to 1"),
        ([Delay(0, -1, 0.0)], ValueError, "an exchange from 0 on"),
        ([Delay(0, 1.5, 0.0)], TypeError, "by whole numbers"),
        ([Death("1", 0)], TypeError, "by whole numbers"),
        ([Delay(0, 1, 0.0), Delay(0, 1, 2.0)], ValueError, "are of one exchange of one rank: leave one out"),
        ([(0, 1)], TypeError, "a fault is a Delay or a Death"),
    ],
)
def test_faults_that_cannot_happen_are_errors(faults, error, words):
    with pytest.raises(error, match=words):
        tm.run_on_emulated_ranks(step, 2, faults=faults)
