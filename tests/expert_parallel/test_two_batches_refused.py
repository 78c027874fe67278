"""two_batches refuses what it can't do on every rank, and leaves nothing running where a half fails."""

import contextvars
import gc
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial

import greenlet
import pytest
import torch
from test_two_batches import batch_of, loss_of, make_model, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.expert_parallel import check as check_module
from tritonmoe.runtime.halves import current_half
from tritonmoe.transports import Death, Transport

TIMEOUT_S = 60
"""Errors must come long before it."""


def running_greenlets() -> list[object]:
    gc.collect()
    kinds = (g for g in gc.get_objects() if isinstance(g, greenlet.greenlet))
    return [g for g in kinds if g.parent is not None and g and not g.dead]


def errors_of_ranks(
    fail: Callable[[Transport, nn.Sequential, Tensor], object], num_ranks: int = 2, faults: tuple = ()
) -> list[BaseException]:
    """Every rank's error of what `fail` does with a model and a batch; afterwards a step in halves works again."""
    started = time.perf_counter()

    def on_rank(transport: Transport) -> BaseException:
        model, x = make_model(transport, tm.OverlapConfig(2)), batch_of(transport.rank)
        expected = step(model, x, None)
        try:
            fail(transport, model, x)
        except BaseException as error:
            assert current_half() is None
            assert torch.is_grad_enabled()
            if faults:
                raise
            transport.rebuild()
            torch.testing.assert_close(step(model, x, [2, 4]), expected)
            return error
        pytest.fail("nothing was raised")

    try:
        found = tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=TIMEOUT_S, faults=faults)
    except tm.TransportError as error:
        found = [error]
    assert time.perf_counter() - started < TIMEOUT_S / 2
    assert not running_greenlets()
    return found


def in_halves(run: Callable[[nn.Sequential, int, Tensor], Tensor]) -> Callable[..., object]:
    """Run a function of the model, the number of the half and its rows on both halves."""

    def fail(transport: Transport, model: nn.Sequential, x: Tensor) -> object:
        return tm.two_batches(lambda half: run(model, *half), (1, x[:2]), (2, x[2:]))

    return fail


OTHER_CALLS = {
    "another-order": ((0, 1, 2), (1, 0, 2)),
    "one-less": ((0, 1, 2), (0, 1)),
    "one-more": ((0, 1), (0, 1, 2)),
    "none-in-the-first": ((), (0, 1, 2)),
    "none-in-the-second": ((0, 1, 2), ()),
}
FIRST = ("another-order", "one-less")


@pytest.mark.parametrize(
    "calls", [pytest.param(calls, marks=() if calls in FIRST else pytest.mark.thorough) for calls in OTHER_CALLS]
)
def test_halves_that_call_other_layers(calls: str) -> None:
    def run(model: nn.Sequential, number: int, x: Tensor) -> Tensor:
        for place in OTHER_CALLS[calls][number - 1]:
            x = model[place](x)
        return x

    for error in errors_of_ranks(in_halves(run)):
        assert isinstance(error, (ValueError, tm.TransportError)), error
        words = "refused" if isinstance(error, tm.TransportError) else "must call the same layers in the same order"
        assert words in str(error)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_a_half_that_raises_on_one_rank(place: str, number: int, kind: type[BaseException]) -> None:
    """The others hear of it where exchanges are under way, and else at their next exchange."""
    places = {"before": 0, "between": 2, "after": 3}

    def fail(transport: Transport, model: nn.Sequential, x: Tensor) -> None:
        def run(half: tuple[int, Tensor]) -> Tensor:
            y = half[1]
            for position in range(4):
                if transport.rank == 1 and half[0] == number and position == places[place]:
                    raise kind("on rank 1")
                if position < 3:
                    y = model[position](y)
            return y

        try:
            tm.two_batches(run, (1, x[:2]), (2, x[2:]))
        except BaseException:
            transport.give_up("left its step")  # no exchange need be under way there
            raise
        transport.barrier()  # where the failing half was the last thing to do

    first, second = errors_of_ranks(fail)
    assert isinstance(first, tm.TransportError)
    assert isinstance(second, kind)


def test_a_filler_that_raises_and_an_error_that_the_other_half_swallows() -> None:
    def fail(transport: Transport, model: nn.Sequential, x: Tensor) -> None:
        def run(half: tuple[int, Tensor]) -> Tensor:
            number, y = half
            y = model[0](y)
            if number == 2:
                model[1].moe(y, fillers=[lambda: 1 / 0])
            try:
                return model[1](y)
            except BaseException:
                return model[2](y)  # it can't be stopped from trying

        tm.two_batches(run, (1, x[:2]), (2, x[2:]))

    for error in errors_of_ranks(fail):
        assert isinstance(error, (ZeroDivisionError, tm.TransportError)), error


@pytest.mark.parametrize(
    "exchange", [pytest.param(n, marks=() if n % 6 == 1 else pytest.mark.thorough) for n in range(37, 108, 7)]
)
def test_a_rank_that_dies(exchange: int) -> None:
    """A step of the whole batch has 36 exchanges, and one in halves twice as many."""

    def fail(transport: Transport, model: nn.Sequential, x: Tensor) -> None:
        step(model, x, [2, 4])
        raise tm.TransportError("it was not there any more")

    (error,) = errors_of_ranks(fail, 4, faults=(Death(1, exchange),))
    assert isinstance(error, tm.TransportError)
    assert "not there" not in str(error)


def test_a_backward_that_raises_breaks_the_transport() -> None:
    """Here in a hook between the layers of the second half: the first half's exchanges are under way."""

    def fail(transport: Transport, model: nn.Sequential, x: Tensor) -> None:
        def run(half: tuple[int, Tensor]) -> Tensor:
            y = model[1](model[0](half[1]))
            if half[0] == 2 and transport.rank == 1:
                y.register_hook(lambda grad: 1 / 0)
            return model[2](y).square().sum()

        first, second = tm.two_batches(run, (1, x[:2]), (2, x[2:]))
        try:
            (first + second).backward()
        except ZeroDivisionError:
            transport.give_up("failed in a hook")
            raise

    first, second = errors_of_ranks(fail)
    assert isinstance(first, tm.TransportError)
    assert isinstance(second, ZeroDivisionError)


def test_ranks_of_which_one_has_a_whole_batch() -> None:
    def fail(transport: Transport, model: nn.Sequential, x: Tensor) -> None:
        step(model, x, [2, 4] if transport.rank else None)

    for error in errors_of_ranks(fail):
        assert isinstance(error, tm.CountMismatch)
        assert "which part of a batch this layer call is of (rank 0: all of it, rank 1: half 1)" in str(error)


REFUSED = {
    "nested": (lambda model, x: tm.two_batches(partial(loss_of, model), x, x).__getitem__(0), "inside half a batch"),
    "reentrant": (lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=True), "use_reentrant=False"),
    "compiled": (lambda model, x: torch.compile(model, backend="eager")(x), "compile the parts around them"),
    "transformed": (lambda model, x: torch.func.grad(partial(loss_of, model))(x), "torch.func's transforms"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_in_a_half(what: str) -> None:
    run, words = REFUSED[what]
    for error in errors_of_ranks(in_halves(lambda model, _, x: run(model, x)), 1):
        assert isinstance(error, RuntimeError)
        assert words in str(error)


def test_what_cannot_be_done_around_the_halves(monkeypatch) -> None:
    model, x = make_model(None), batch_of(0)
    with pytest.raises(ValueError, match="two halves of a batch, got 3"):
        tm.two_batches(model, x, x, x)
    with pytest.raises(ValueError, match="two halves of a batch, got 0"):
        tm.two_batches(model)

    def both(x: Tensor) -> Tensor:
        return sum(tm.two_batches(partial(loss_of, model), x, x))

    with pytest.raises(RuntimeError, match="transforms"):
        torch.func.grad(both)(x)
    out = checkpoint(both, x.requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="put the checkpoints inside the function"):
        out.backward()
    with pytest.raises(ZeroDivisionError):
        tm.two_batches(lambda half: 1 / half, 1, 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="two-batches"):
        tm.two_batches(model, x, x)


def test_capture_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(check_module, "is_captured", lambda device: True)

    def on_rank(transport: Transport) -> None:
        with pytest.raises(RuntimeError, match="a CUDA graph can't capture two batches"):
            step(make_model(transport, tm.OverlapConfig(2)), batch_of(transport.rank), [2, 4])

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=TIMEOUT_S)


def test_a_layer_called_in_another_thread_is_refused() -> None:
    def run(model: nn.Sequential, number: int, x: Tensor) -> Tensor:
        raised: list[BaseException] = []

        def call() -> None:
            try:
                model(x)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=contextvars.copy_context().run, args=(call,))
        thread.start()
        thread.join()
        raise raised[0]

    for error in errors_of_ranks(in_halves(run)):
        assert "in its own thread" in str(error) or "refused" in str(error)


def test_what_the_halves_computed_is_freed() -> None:
    """Nothing holds the graph when the results are gone, without a collection of garbage."""

    def on_rank(transport: Transport) -> None:
        model, x = make_model(transport, tm.OverlapConfig(2)), batch_of(transport.rank)
        seen: list[weakref.ref] = []

        def run(x: Tensor) -> Tensor:
            y = model(x)
            seen.append(weakref.ref(y))
            return y.square().sum()

        gc.collect()
        gc.disable()
        try:
            losses = tm.two_batches(run, x[:3], x[3:])
            sum(losses).backward()
            del losses
            assert [ref() for ref in seen] == [None, None]
        finally:
            gc.enable()

    tm.run_on_emulated_ranks(on_rank, 1, timeout_s=TIMEOUT_S)
