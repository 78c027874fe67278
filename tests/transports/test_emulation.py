"""run_on_emulated_ranks and what only emulated ranks have: faults, checks between ranks, the caller's state."""

import functools
import re
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tritonmoe as tm
from tritonmoe.errors import TransportError
from tritonmoe.transports import Death, Delay, EmulatedTransport, EmulatedWorld, LinkModel, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks

QUICK_S = 10.0
"""A rank that nobody wakes waits for 30 s, the default of timeout_s; a test here computes for less than one."""


def within(limit_s: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Fail a test that took longer than limit_s."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def timed(*args: object, **kwargs: object) -> None:
            before = time.perf_counter()
            function(*args, **kwargs)
            elapsed = time.perf_counter() - before
            assert elapsed < limit_s, f"took {elapsed:.2f} s"

        return timed

    return decorate


def exchange_ones(transport: Transport, num_rows: int = 2, width: int = 4) -> torch.Tensor:
    splits = [num_rows] * transport.size
    return transport.exchange(torch.ones(num_rows * transport.size, width), splits, splits).wait()


# Results and errors


def test_results_come_in_rank_order() -> None:
    def fn(transport: Transport) -> tuple[int, int]:
        time.sleep(0.02 * (3 - transport.rank))
        return transport.rank, transport.size

    assert run_on_emulated_ranks(fn, 3) == [(0, 3), (1, 3), (2, 3)]


@within(QUICK_S)
def test_an_exception_comes_with_its_rank_and_is_the_same_object() -> None:
    failure = KeyError("no such expert")

    def fn(transport: Transport) -> None:
        exchange_ones(transport)
        if transport.rank == 2:
            raise failure
        exchange_ones(transport)

    with pytest.raises(KeyError, match="no such expert") as raised:
        run_on_emulated_ranks(fn, 4)
    assert raised.value is failure
    assert failure.emulated_rank == 2  # type: ignore[attr-defined]
    assert failure.__notes__ == ["on emulated rank 2 of 4"]  # type: ignore[attr-defined]


@within(QUICK_S)
def test_peers_of_a_failed_rank_hear_of_its_error_at_once() -> None:
    heard: dict[int, str] = {}

    def fn(transport: Transport) -> None:
        if transport.rank == 1:
            time.sleep(0.1)
            raise ValueError("bad router")
        try:
            exchange_ones(transport)
        except TransportError as error:
            heard[transport.rank] = str(error)
            raise RuntimeError("a wrapper of the consequence") from error

    with pytest.raises(ValueError, match="bad router"):
        run_on_emulated_ranks(fn, 3)
    assert sorted(heard) == [0, 2]
    for words in heard.values():
        assert "exchange 0: rank 1 failed with ValueError: bad router" in words


@pytest.mark.parametrize("call", ["layer", "collective", "rebalance"])
@within(QUICK_S)
def test_arguments_refused_on_one_rank_are_the_first_cause(call: str) -> None:
    """The ranks that hear of the refusal raise too, and earlier than the rank that refuses."""

    def fn(transport: Transport) -> None:
        is_bad = transport.rank == 2
        layer = tm.MoELayer(tm.MoEConfig(8, 8, num_experts=4, top_k=2), transport, generator=torch.Generator())
        try:
            if call == "layer":
                layer(torch.ones(3, 7 if is_bad else 8))
            elif call == "collective":
                transport.all_reduce(torch.ones(2), "no such" if is_bad else "sum")  # type: ignore[arg-type]  # bad input
            else:
                layer.experts.expert_shards.calls.takes_adapters = is_bad  # type: ignore[union-attr]  # over ranks it has calls
                tm.rebalance(layer)
        finally:
            time.sleep(0.05 * is_bad)  # the others raise first

    cause = {
        "layer": r"x must be \(..., D\) with D = 8, got \(3, 7\)",
        "collective": "got 'no such'",
        "rebalance": "were called with adapters=",
    }
    with pytest.raises(ValueError, match=cause[call]):
        run_on_emulated_ranks(fn, 4)


@within(QUICK_S)
def test_an_exchange_posted_after_a_peer_failed_fails_too() -> None:
    def fn(transport: Transport) -> None:
        if transport.rank == 1:
            raise ValueError("at the start")
        time.sleep(0.1)
        pending = transport.exchange(torch.ones(2, 1), [1, 1], [1, 1])
        with pytest.raises(TransportError, match="rank 1 failed"):
            pending.wait()
        with pytest.raises(TransportError, match="rank 1 failed"):
            pending.wait()

    with pytest.raises(ValueError, match="at the start"):
        run_on_emulated_ranks(fn, 2)


@within(QUICK_S)
def test_a_rank_that_returns_early() -> None:
    def fn(transport: Transport) -> None:
        exchange_ones(transport)
        if transport.rank != 1:
            exchange_ones(transport)

    with pytest.raises(TransportError, match="exchange 1: rank 1 returned or closed after 1 exchanges") as raised:
        run_on_emulated_ranks(fn, 3)
    assert raised.value.emulated_rank in (0, 2)  # type: ignore[attr-defined]


@within(QUICK_S)
def test_a_rank_may_return_before_its_last_rows_have_arrived() -> None:
    def fn(transport: Transport) -> list[float] | None:
        pending = transport.exchange(torch.full((2, 1), transport.rank + 1.0), [1, 1], [1, 1])
        return None if transport.rank == 0 else pending.wait()[:, 0].tolist()

    assert run_on_emulated_ranks(fn, 2, link=LinkModel(None, 50_000)) == [None, [1.0, 2.0]]


@within(QUICK_S)
def test_timeout_names_the_absent_ranks() -> None:
    def fn(transport: Transport) -> None:
        exchange_ones(transport)
        if transport.rank == 1:
            time.sleep(0.6)
        exchange_ones(transport)

    words = re.escape(
        "exchange 1 took longer than timeout_s = 0.2: rank 0 has not heard from ranks [1] "
        "(rank 0 of 2, input_splits [2, 2], output_splits [2, 2])"
    )
    with pytest.raises(TransportError, match=words) as raised:
        run_on_emulated_ranks(fn, 2, timeout_s=0.2)
    assert raised.value.emulated_rank == 0  # type: ignore[attr-defined]


@within(QUICK_S)
def test_timeout_on_a_slow_link() -> None:
    with pytest.raises(TransportError, match="still has rows under way from or to ranks"):
        run_on_emulated_ranks(exchange_ones, 2, link=LinkModel(None, 5e6), timeout_s=0.1)


@within(QUICK_S)
def test_wait_may_be_tried_again_after_a_timeout() -> None:
    has_posted = threading.Event()

    def fn(transport: Transport) -> list[float]:
        if transport.rank == 1:
            time.sleep(0.3)
        pending = transport.exchange(torch.ones(2, 1), [1, 1], [1, 1])
        if transport.rank == 1:
            has_posted.set()
        else:
            with pytest.raises(TransportError, match="took longer"):
                pending.wait()
            has_posted.wait()
        return pending.wait()[:, 0].tolist()

    assert run_on_emulated_ranks(fn, 2, timeout_s=0.1) == [[1.0, 1.0]] * 2


@within(QUICK_S)
def test_interrupting_the_caller_stops_the_ranks() -> None:
    stopped: dict[int, str] = {}
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def fn(transport: Transport) -> None:
        if transport.rank == 0:
            time.sleep(0.1)
            signal.pthread_kill(main_thread, signal.SIGINT)
            time.sleep(0.3)
            return
        try:
            exchange_ones(transport)
        except TransportError as error:
            stopped[transport.rank] = str(error)

    with pytest.raises(KeyboardInterrupt):
        run_on_emulated_ranks(fn, 3)
    assert sorted(stopped) == [1, 2]
    assert all("interrupted by KeyboardInterrupt" in words for words in stopped.values())


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    run_on_emulated_ranks(exchange_ones, 4)
    with pytest.raises(TransportError):
        run_on_emulated_ranks(exchange_ones, 4, faults=[Death(0, 0)])
    assert threading.active_count() == before


def test_bad_arguments() -> None:
    def run(**arguments: object) -> Callable[[], object]:
        return lambda: run_on_emulated_ranks(exchange_ones, **{"num_ranks": 2, **arguments})  # type: ignore[arg-type]

    for words, call in (
        ("num_ranks must be at least 1", run(num_ranks=0)),
        ("timeout_s must be positive", run(timeout_s=0)),
        ('emulated on "cpu" or "cuda"', run(device="meta")),
        ("must name a rank from 0 to 1", run(faults=[Death(2, 0)])),
        ("an exchange from 0 on", run(faults=[Delay(0, -1, 1.0)])),
        ("seconds must be a finite number", lambda: Delay(0, 0, -1.0)),
        ("seconds must be a finite number .* got '1'", lambda: Delay(0, 0, "1")),  # type: ignore[arg-type]
        ("bandwidth_gb_per_s must be a positive number", lambda: LinkModel(0)),
        ("bandwidth_gb_per_s must be .* got '50'", lambda: LinkModel("50")),  # type: ignore[arg-type]
        ("latency_us must be a finite number", lambda: LinkModel(None, float("nan"))),
        ("late_links_us must say how many microseconds", lambda: LinkModel(None, late_links_us={(0, 1): -1.0})),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="a fault is a Delay or a Death"):
        run(faults=["slow"])()


# Checks between ranks


@within(QUICK_S)
def test_splits_that_disagree_fail_on_both_ranks() -> None:
    heard: dict[int, str] = {}

    def fn(transport: Transport) -> None:
        sent = [[1, 3, 1], [1, 1, 1], [1, 1, 1]][transport.rank]
        received = [[1, 1, 1], [2, 1, 1], [1, 1, 1]][transport.rank]
        try:
            transport.exchange(torch.ones(sum(sent), 1), sent, received).wait()
        except TransportError as error:
            heard[transport.rank] = str(error)

    run_on_emulated_ranks(fn, 3)
    assert sorted(heard) == [0, 1]
    for words in heard.values():
        assert "exchange 0: rank 0 sends 3 rows to rank 1, which expects 2" in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.exchange(torch.ones(2, 5), [1, 1], [1, 1]).wait(), r"rows \(5,\) torch.float32 on cpu"),
        (lambda t: t.exchange(torch.ones(2, 4).half(), [1, 1], [1, 1]).wait(), r"rows \(4,\) torch.float16 on cpu"),
        (lambda t: t.exchange_counts(torch.ones(2, 4, dtype=torch.int64)), "made exchange_counts of rows"),
    ],
    ids=["width", "dtype", "call"],
)
@within(QUICK_S)
def test_ranks_that_make_different_exchanges(change: Callable[[Transport], None], words: str) -> None:
    def fn(transport: Transport) -> None:
        with pytest.raises(TransportError, match=words) as raised:
            change(transport) if transport.rank else exchange_ones(transport, num_rows=1)
        assert "rank 0" in str(raised.value)
        assert "rank 1" in str(raised.value)
        with pytest.raises(TransportError, match="is broken since its first failure"):
            exchange_ones(transport)
        transport.rebuild()
        exchange_ones(transport)

    run_on_emulated_ranks(fn, 2)


# Faults


@within(QUICK_S)
def test_death() -> None:
    outlived: list[int] = []

    def fn(transport: Transport) -> None:
        for _ in range(3):
            try:
                exchange_ones(transport)
            except Exception:
                if transport.rank == 1:
                    outlived.append(1)
                raise

    with pytest.raises(TransportError, match=r"^rank 1 was stopped by its fault at exchange 2") as raised:
        run_on_emulated_ranks(fn, 3, faults=[Death(1, 2)])
    assert raised.value.emulated_rank == 1  # type: ignore[attr-defined]
    assert not outlived


@within(QUICK_S)
def test_delay_makes_one_rank_late() -> None:
    def fn(transport: Transport) -> tuple[float, float]:
        exchange_ones(transport)
        before = time.perf_counter()
        pending = transport.exchange(torch.ones(2, 1), [1, 1], [1, 1])
        posted = time.perf_counter()
        pending.wait()
        return posted - before, time.perf_counter() - before

    (posted_s, waited_s), (late_posted_s, _) = run_on_emulated_ranks(fn, 2, faults=[Delay(1, 1, 0.3)])
    assert posted_s < 0.1
    assert 0.25 < waited_s < 0.6
    assert 0.3 <= late_posted_s < 0.6


# State of the caller


def test_grad_and_inference_mode_are_carried() -> None:
    def fn(transport: Transport) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert run_on_emulated_ranks(fn, 2) == [(True, False)] * 2
    with torch.no_grad():
        assert run_on_emulated_ranks(fn, 2) == [(False, False)] * 2
    with torch.inference_mode():
        assert run_on_emulated_ranks(fn, 2) == [(False, True)] * 2
        assert exchange_ones(EmulatedWorld(1).transports[0]).tolist() == [[1.0] * 4] * 2


def test_autocast_is_carried() -> None:
    def fn(transport: Transport) -> torch.dtype:
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    assert run_on_emulated_ranks(fn, 2) == [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert run_on_emulated_ranks(fn, 2) == [torch.bfloat16] * 2
        with torch.autocast("cpu", enabled=False):
            assert run_on_emulated_ranks(fn, 2) == [torch.float32] * 2


def test_default_dtype_is_the_callers() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert run_on_emulated_ranks(lambda transport: torch.ones(1).dtype, 2) == [torch.float64] * 2
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("fails", [False, True])
def test_threads_are_shared_out_and_restored(fails: bool) -> None:
    def fn(transport: Transport) -> int:
        exchange_ones(transport)
        if fails:
            raise ValueError("on purpose")
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for num_ranks, share in ((2, 2), (3, 1), (8, 1)):
            if fails:
                with pytest.raises(ValueError, match="on purpose"):
                    run_on_emulated_ranks(fn, num_ranks)
            else:
                assert run_on_emulated_ranks(fn, num_ranks) == [share] * num_ranks
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@within(QUICK_S)
def test_backward_that_exchanges() -> None:
    class SendHome(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows: torch.Tensor, transport: Transport) -> torch.Tensor:
            ctx.transport = transport
            return transport.exchange(rows, [1] * transport.size, [1] * transport.size).wait()

        @staticmethod
        def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            ones = [1] * ctx.transport.size
            return ctx.transport.exchange(grad.contiguous(), ones, ones).wait(), None

    def fn(transport: Transport) -> list[float]:
        rows = torch.ones(transport.size, 1, requires_grad=True)
        (SendHome.apply(rows, transport).sum() * (transport.rank + 1)).backward()
        assert rows.grad is not None
        return rows.grad[:, 0].tolist()

    assert run_on_emulated_ranks(fn, 3) == [[1.0, 2.0, 3.0]] * 3


# Values


@settings(max_examples=40, deadline=None)
@given(
    splits=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=3, max_size=3),
    has_link=st.booleans(),
)
def test_random_splits(splits: list[list[int]], has_link: bool) -> None:
    def fn(transport: Transport) -> None:
        rank = transport.rank
        output_splits = [row[rank] for row in splits]
        codes = [100 * rank + 10 * peer + index for peer, count in enumerate(splits[rank]) for index in range(count)]
        rows = torch.tensor(codes, dtype=torch.int64)[:, None].repeat(1, 2)
        away = transport.exchange(rows, splits[rank], output_splits)
        received = away.wait()
        expected = [
            100 * peer + 10 * rank + index for peer, count in enumerate(output_splits) for index in range(count)
        ]
        assert received[:, 1].tolist() == expected
        home = transport.exchange(received, output_splits, splits[rank]).wait()
        assert home.equal(rows)

    run_on_emulated_ranks(fn, 3, link=LinkModel(0.001, 10) if has_link else None)


def test_transports_without_the_runner() -> None:
    world = EmulatedWorld(2)
    one, other = world.transports
    assert isinstance(one, EmulatedTransport)
    rows = torch.arange(4.0)[:, None]
    pending = [transport.exchange(rows, [2, 2], [2, 2]) for transport in (one, other)]
    assert [p.wait()[:, 0].tolist() for p in pending] == [[0.0, 1.0, 0.0, 1.0], [2.0, 3.0, 2.0, 3.0]]
    unmatched = one.exchange(rows, [2, 2], [2, 2])
    other.close()
    with pytest.raises(TransportError, match="rank 1 returned or closed after 1 exchanges"):
        unmatched.wait()
    one.close()
    with pytest.raises(TransportError, match="closed"):
        one.exchange(rows, [2, 2], [2, 2])
