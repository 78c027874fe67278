"""Experts side by side on a CPU's threads."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from tolerance import assert_close_to_exact

import tritonmoe as tm
from tritonmoe.ops.backends import torch_products
from tritonmoe.runtime.cpu_threads import MOST_WORKERS, for_each, num_workers

CPU = torch.device("cpu")


@pytest.fixture(params=[2, 3], ids="threads{}".format)
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_once_and_several_at_a_time(num_threads: int) -> None:
    meet, done, states = threading.Barrier(num_threads), [], []

    def call(item: int) -> None:
        if item < num_threads:
            meet.wait(timeout=10)  # breaks where they come one after the other
        states.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()))
        done.append(item)

    for_each(call, range(20), CPU)
    assert sorted(done) == list(range(20))
    assert set(states) == {(False, False, 1)}
    with torch.inference_mode():
        for_each(call, range(20), CPU)
    assert states[-1] == (False, True, 1)


def test_threads_are_not_taken_from_others(num_threads: int) -> None:
    """Threads that are started later begin with as many as before."""
    for_each(lambda item: None, range(4), CPU)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), found) == (num_threads, [num_threads])


def test_an_error_is_raised_when_all_are_done(num_threads: int) -> None:
    done = []

    def call(item: int) -> None:
        if item == 1:
            raise ArithmeticError("item 1")
        done.append(item)

    with pytest.raises(ArithmeticError, match="item 1"):
        for_each(call, range(8), CPU)
    assert sorted(done) == [0, *range(2, 8)]
    for_each(done.append, range(8), CPU)
    assert len(done) == 15


def test_nothing_is_written_behind_an_error(num_threads: int) -> None:
    has_raised, written = threading.Event(), []

    def call(item: int) -> None:
        if item == 0:
            raise MemoryError("item 0")
        if item == 1:
            has_raised.wait(0.3)  # the caller of for_each must not get so far meanwhile
            written.append(has_raised.is_set())

    with pytest.raises(MemoryError, match="item 0"):
        for_each(call, range(num_threads), CPU)
    has_raised.set()
    assert written == [False]


def test_one_thread_and_other_devices_are_a_loop() -> None:
    before = torch.get_num_threads()
    threads = set()
    try:
        torch.set_num_threads(1)
        assert num_workers(CPU) == 1
        for_each(lambda item: threads.add(threading.get_ident()), range(4), CPU)
        torch.set_num_threads(64)
        assert num_workers(CPU) == MOST_WORKERS
        for_each(lambda item: threads.add(threading.get_ident()), range(4), torch.device("cuda"))
    finally:
        torch.set_num_threads(before)
    assert threads == {threading.get_ident()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(num_threads: int) -> None:
    for_each(lambda item: None, range(4), CPU)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        for_each(done.append, range(4), CPU)
        os._exit(0 if len(done) == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["uniform", "hot", "no tokens for most"])
def test_values_and_gradients(routing: str, dtype: torch.dtype, num_threads: int) -> None:
    """Enough pairs for several blocks; against the reference in fp64, and again to the bit."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, hidden, inner, num_experts = 700, 40, 24, 7
    x, w1, w2 = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((num_tokens, hidden), (num_experts, 2 * inner, hidden), (num_experts, hidden, inner))
    )
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    scores += {"uniform": 0, "hot": torch.tensor([1.0] + 6 * [0.0]), "no tokens for most": torch.arange(7) // 4}[
        routing
    ]
    topk_weights, topk_ids = scores.topk(3)
    dout = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)

    def run(dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, topk_weights, w1, w2)]
        given_x, given_weights, *weights = leaves
        y = tm.moe_mlp(given_x, topk_ids, given_weights, *weights, backend=backend)
        return dict(
            zip(
                ("y", "dx", "dweights", "dw1", "dw2"), (y, *torch.autograd.grad(y, leaves, dout.to(dtype))), strict=True
            )
        )

    exact, plain, actual = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, "torch")
    for name, value in actual.items():
        assert_close_to_exact(name, value, plain[name], exact[name])
    for name, value in run(dtype, "torch").items():
        assert torch.equal(value, actual[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_products_of_few_rows_side_by_side(
    has_bias: bool, dtype: torch.dtype, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens, as in decoding; forward and every gradient."""
    names, for_each_before = [], torch_products.for_each

    def for_each_noted(function, items, device) -> None:
        names.append((function.__name__, len(items)))
        for_each_before(function, items, device)

    monkeypatch.setattr(torch_products, "for_each", for_each_noted)
    monkeypatch.setattr(torch_products, "FEWEST_SHARED_BYTES", 0)
    monkeypatch.setattr(torch_products, "FEWEST_SHARED_EXPERTS", {})
    generator = torch.Generator().manual_seed(0)
    num_experts, width, inner = 16, 24, 10

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x, weights = leaf(2, width), leaf(2, 3)
    w1, w2 = leaf(num_experts, 2 * inner, width), leaf(num_experts, width, inner)
    b1, b2 = (leaf(num_experts, 2 * inner), leaf(num_experts, width)) if has_bias else (None, None)
    ids = torch.tensor([[3, 0, 7], [7, -1, 15]])
    dout = torch.randn(2, width, generator=generator).to(dtype)
    leaves = [tensor for tensor in (x, weights, w1, w2, b1, b2) if tensor is not None]

    def run(backend: str, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        x, weights, w1, w2, *biases = leaves
        b1, b2 = biases or (None, None)
        out = tm.moe_mlp(x, ids, weights, w1, w2, gate_up_bias=b1, down_bias=b2, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    ours = run("torch", leaves)
    assert names.count(("multiply", 4)) >= 2  # 0, 3, 7 and 15, up and down
    plain = run("reference", leaves)
    exact = run("reference", [tensor.detach().double().requires_grad_() for tensor in leaves])
    result_names = ["y", "dx", "dweights", "dw1", "dw2", "db1", "db2"][: len(ours)]
    for name, found, same_dtype, wanted in zip(result_names, ours, plain, exact, strict=True):
        assert_close_to_exact(name, found, same_dtype, wanted)
