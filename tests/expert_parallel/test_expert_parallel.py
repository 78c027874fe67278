"""Expert parallelism equals one device: outputs and every gradient, on emulated ranks."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from batches import (
    CALLABLES,
    HIDDEN,
    INTERMEDIATE,
    KERNEL_DEVICE,
    NAMES,
    OPTIONS,
    WEIGHTS,
    Batch,
    assert_equals_one_device,
)
from same_bits import assert_same_bits
from tolerance import error_floor
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.transports import Delay, LocalTransport, Transport

FIRST = {(1, 6), (2, 8), (3, 60), (4, 8), (4, 6)}
"""Ranks and experts of the first tier: each number once, and one that is refused."""


@pytest.mark.parametrize(
    ("num_ranks", "num_experts"),
    [
        pytest.param(*sizes, marks=() if sizes in FIRST else pytest.mark.thorough, id="W{}-E{}".format(*sizes))
        for sizes in itertools.product((1, 2, 3, 4), (6, 8, 60))
    ],
)
def test_equals_one_device(num_ranks: int, num_experts: int) -> None:
    """fp64 makes the comparison tight; the overlapped schedule has the bits of the serial one."""
    if num_experts % num_ranks:
        with pytest.raises(ValueError, match="must be divisible by the number of ranks"):
            tm.run_on_emulated_ranks(
                lambda t: tm.GroupedExperts(tm.MoEConfig(4, 4, num_experts, 1), t), num_ranks, timeout_s=20
            )
        return
    for top_k in (1, 2, 8):
        if top_k > num_experts:
            continue
        batch = Batch(num_ranks, num_experts, top_k)
        expected = batch.on_one_device()
        is_skipped = torch.cat([(ids < 0) | (ids >= num_experts) for ids in batch.ids])
        for num_chunks, local_first in itertools.product((1, 2, 3, 5), (True, False)):
            where = f"K{top_k}-C{num_chunks}-{'local_first' if local_first else 'all_travel'}"
            overlapped = batch.in_parallel(tm.OverlapConfig(num_chunks, local_first))
            assert_equals_one_device(overlapped, expected, where)
            assert (overlapped["topk_weights"][is_skipped] == 0).all(), where
            serial = batch.in_parallel(tm.OverlapConfig(num_chunks, local_first, serial=True))
            assert_same_bits(overlapped, serial, where)


PLANS = {
    "ramp": tm.OverlapPlan((1, 2, 1)),
    "growing": tm.OverlapPlan((1, 2, 5), local_start=16, window=2, backward_window=1),
    "one-token-and-the-rest": tm.OverlapPlan((1, 6), local_start=0),
    "window-of-one": tm.OverlapPlan((1, 1, 1, 1), local_start=3, window=1, backward_window=2),
    "all-travel-windowed": tm.OverlapPlan((3, 1, 2), local_first=False, window=1, backward_window=1),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4], ids="W{}".format)
def test_unequal_chunks_local_slices_and_windows(num_ranks: int, plan: str) -> None:
    batch = Batch(num_ranks, 12, 2)
    overlapped = batch.in_parallel(PLANS[plan])
    assert_equals_one_device(overlapped, batch.on_one_device())
    assert_same_bits(overlapped, batch.in_parallel(replace(PLANS[plan], serial=True)))


def test_shapes_of_the_configuration() -> None:
    batch = Batch(2, 6, 2)
    expected = batch.on_one_device()
    for config in (tm.OverlapConfig(5, shape="ramp"), tm.OverlapConfig(shape=(1, 3, 2))):
        assert_equals_one_device(batch.in_parallel(config), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_options(options: str, backend: str) -> None:
    batch = Batch(3, 6, 3, options=OPTIONS[options])
    for num_chunks, local_first in ((2, True), (3, False)):
        actual = batch.in_parallel(tm.OverlapConfig(num_chunks, local_first), backend=backend)
        assert_equals_one_device(actual, batch.on_one_device())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    """At most twice one device's error against fp64."""
    batch, exact_batch = Batch(2, 6, 2, dtype), Batch(2, 6, 2)
    for part in ("tokens", "weights"):
        for name, value in getattr(batch, part).items():
            wide = [t.double() for t in value] if isinstance(value, list) else value.double()
            getattr(exact_batch, part)[name] = wide
    exact, plain = exact_batch.on_one_device(), batch.on_one_device("torch")
    for num_chunks, local_first in ((1, True), (3, False)):
        actual = batch.in_parallel(tm.OverlapConfig(num_chunks, local_first))
        for name, value in actual.items():
            assert value.dtype == plain[name].dtype
            error, plain_error = ((v.double() - exact[name]).abs().max().item() for v in (value, plain[name]))
            assert error <= 2 * plain_error + error_floor(value.dtype, exact[name]), name


@pytest.mark.parametrize("save", ["hidden", "input"])
def test_recompute_and_late_ranks_keep_the_bits(save: str) -> None:
    """Three steps with buffers used again, each rank late at other exchanges, on a link with latency."""
    batch = Batch(3, 6, 2, torch.float32)
    overlap = tm.OverlapConfig(3)
    faults = [
        Delay(rank, exchange, 0.01 * (1 + (rank + exchange) % 3))
        for rank in range(3)
        for exchange in range(rank, 48, 5)
    ]
    expected = batch.in_parallel(overlap)
    actual = batch.in_parallel(
        overlap, faults=tuple(faults), link=tm.LinkModel(0.0001, latency_us=500), num_calls=3, save=save
    )
    if save == "hidden":
        assert_same_bits(actual, expected)
    else:
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


CHUNKS = [tm.OverlapConfig(c, local_first) for c, local_first in itertools.product((1, 2, 5), (True, False))]


@pytest.mark.parametrize(
    ("num_ranks", "configs"),
    [
        pytest.param(2, [CHUNKS[0], CHUNKS[5]], id="W2-some"),
        *(pytest.param(num_ranks, CHUNKS, marks=pytest.mark.thorough, id=f"W{num_ranks}") for num_ranks in (1, 2, 3)),
    ],
)
def test_bits_of_the_kernels_do_not_depend_on_the_chunks(num_ranks: int, configs: list[tm.OverlapConfig]) -> None:
    batch = Batch(num_ranks, 6, 2, torch.float32, device=KERNEL_DEVICE)
    expected = None
    for overlap in (*configs, tm.OverlapPlan((1, 3, 2), local_start=5)):
        actual = batch.in_parallel(overlap, backend="triton")
        expected = expected or actual
        assert_same_bits(actual, expected, str(overlap))
    one_device = batch.on_one_device()
    for name, value in expected.items():
        torch.testing.assert_close(value, one_device[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_one_rank_has_the_bits_of_one_device(backend: str) -> None:
    batch = Batch(1, 6, 2, torch.float32, device=KERNEL_DEVICE if backend == "triton" else "cpu")
    leaves = {name: value.requires_grad_() for name, value in batch.of_rank(0).items()}
    out = batch.call(LocalTransport(), leaves, tm.OverlapConfig(1), backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][0])
    assert_same_bits({"out": out, **dict(zip(leaves, grads, strict=True))}, batch.on_one_device(backend))


@pytest.mark.parametrize("activation", CALLABLES)
@pytest.mark.parametrize("save", ["hidden", "input"])
def test_callables(activation: str, save: str) -> None:
    batch = Batch(2, 6, 3, options={"activation": CALLABLES[activation], "save": save})
    for num_chunks, local_first in ((1, False), (2, True), (3, False)):
        overlap = tm.OverlapConfig(num_chunks, local_first)
        assert_equals_one_device(batch.in_parallel(overlap), batch.on_one_device())


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, INTERMEDIATE, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor(0.25, dtype=torch.float64), requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        gate, up_half = h.chunk(2, dim=1)
        return F.silu(gate * self.scale) * (up_half + self.frozen)


@pytest.mark.parametrize("num_chunks", [1, 3], ids="C{}".format)
@pytest.mark.parametrize("local_first", [True, False], ids=["local_first", "all_travel"])
def test_callable_with_parameters(local_first: bool, num_chunks: int) -> None:
    """The activation's gradients are sums over the ranks, as the experts' are."""
    batch = Batch(2, 6, 3)
    gate = Gate()
    expected = batch.on_one_device(activation=gate)
    leaves = [torch.cat(batch.tokens["x"]), torch.cat(batch.ids), torch.cat(batch.tokens["topk_weights"])]
    out = tm.moe_mlp(*leaves, **batch.weights, activation=gate)
    (expected_scale,) = torch.autograd.grad(out, [gate.scale], torch.cat(batch.tokens["dout"]))
    gates = [Gate(), Gate()]

    def on_rank(transport: Transport) -> list[Tensor]:
        own = gates[transport.rank]
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        out = batch.call(transport, leaves, tm.OverlapConfig(num_chunks, local_first), activation=own)
        inputs = [*leaves.values(), own.scale]
        first = torch.autograd.grad(out, inputs, batch.tokens["dout"][transport.rank], retain_graph=True)
        second = torch.autograd.grad(out, inputs, batch.tokens["dout"][transport.rank])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return [out.detach(), *second]

    results = list(zip(*tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20), strict=True))
    scale_grads = results.pop()
    assert_equals_one_device(dict(zip(("out", *NAMES), map(torch.cat, results), strict=True)), expected)
    torch.testing.assert_close(sum(scale_grads), expected_scale)


NEEDS = {
    "rank-1-nothing": lambda rank, name: rank == 0,
    "rank-0-nothing": lambda rank, name: rank == 1,
    "only-x": lambda rank, name: name == "x",
    "only-x-of-rank-0": lambda rank, name: (rank, name) == (0, "x"),
    "only-topk-weights-of-rank-1": lambda rank, name: (rank, name) == (1, "topk_weights"),
    "frozen-experts": lambda rank, name: name not in WEIGHTS,
    "only-experts": lambda rank, name: name in WEIGHTS,
    "only-down-bias-of-rank-0": lambda rank, name: (rank, name) == (0, "down_bias"),
    "x-here-weights-there": lambda rank, name: (name == "x") == (rank == 0),
}


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("activation", ["silu", "callable"])
def test_some_ranks_need_no_gradient(activation: str, needs: str) -> None:
    """Every rank runs its backward, whatever it needs itself; what is asked for is right, nothing else is given."""
    activation = Gate() if activation == "callable" else activation
    if isinstance(activation, Gate):
        activation.requires_grad_(False)
    batch = Batch(2, 6, 3, options={"activation": activation})
    batch.ids = [torch.randint(0, 6, (4, 3), generator=torch.Generator().manual_seed(r)) for r in range(2)]
    for name in batch.tokens:
        shape = (4, 3) if name == "topk_weights" else (4, HIDDEN)
        batch.tokens[name] = [
            torch.rand(shape, dtype=batch.tokens[name][0].dtype, generator=torch.Generator().manual_seed(r))
            for r in range(2)
        ]
    expected = batch.on_one_device()

    def on_rank(transport: Transport) -> dict[str, Tensor]:
        rank = transport.rank
        leaves = {n: value.requires_grad_(NEEDS[needs](rank, n)) for n, value in batch.of_rank(rank).items()}
        out = batch.call(transport, leaves, tm.OverlapConfig(2))
        assert out.requires_grad
        out.backward(batch.tokens["dout"][rank])
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == leaf.requires_grad, name
        return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}}

    for rank, actual in enumerate(tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)):
        for name, value in actual.items():
            share = len(expected[name]) // 2
            torch.testing.assert_close(value, expected[name][rank * share : (rank + 1) * share])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("activation", ["silu", "callable"])
def test_inference(activation: str, mode) -> None:
    batch = Batch(2, 6, 2, options={"activation": Gate() if activation == "callable" else activation})

    def on_rank(transport: Transport) -> Tensor:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        with mode():
            out = batch.call(transport, leaves, tm.OverlapConfig(2))
        assert not out.requires_grad
        return out.clone()

    out = torch.cat(tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20))
    torch.testing.assert_close(out, batch.on_one_device()["out"])


def test_backward_twice_second_derivative_and_strides() -> None:
    batch = Batch(2, 6, 2)

    def on_rank(transport: Transport) -> None:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        versions = {name: leaf._version for name, leaf in leaves.items()}
        strided = {**leaves, "x": leaves["x"].T.contiguous().T}
        plain, out = (batch.call(transport, given, tm.OverlapConfig(2)) for given in (leaves, strided))
        assert torch.equal(plain, out)
        inputs = list(leaves.values())
        expanded = torch.ones(1, 1, dtype=out.dtype).expand(out.shape)
        first = torch.autograd.grad(out, inputs, expanded, retain_graph=True)
        second = torch.autograd.grad(out, inputs, expanded.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        dout = expanded.clone().requires_grad_()
        (dx,) = torch.autograd.grad(out, leaves["x"], dout, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            dx.sum().backward()
        assert {name: leaf._version for name, leaf in leaves.items()} == versions

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_several_layers_on_one_transport() -> None:
    """Two forwards before two backwards, in the order that autograd takes them."""
    batch = Batch(2, 6, 2)

    def one_device() -> Tensor:
        x = torch.cat(batch.tokens["x"]).requires_grad_()
        arguments = {
            **batch.weights,
            "topk_ids": torch.cat(batch.ids),
            "topk_weights": torch.cat(batch.tokens["topk_weights"]),
        }
        out = tm.moe_mlp(x + tm.moe_mlp(x, **arguments), **arguments)
        return torch.autograd.grad(out, x, torch.cat(batch.tokens["dout"]))[0]

    def on_rank(transport: Transport) -> Tensor:
        leaves = batch.of_rank(transport.rank)
        x = leaves["x"].requires_grad_()
        inner = batch.call(transport, leaves, tm.OverlapConfig(2))
        out = batch.call(transport, {**leaves, "x": x + inner}, tm.OverlapConfig(3, local_first=False))
        return torch.autograd.grad(out, x, batch.tokens["dout"][transport.rank])[0]

    actual = torch.cat(tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20))
    torch.testing.assert_close(actual, one_device())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.usefixtures("nan_filled_memory")
def test_memory_is_never_read_before_it_is_written(backend: str) -> None:
    """torch.empty gives NaN; all pairs of some chunks are skipped."""
    batch = Batch(3, 6, 2)
    batch.ids[0][2:5] = -1
    expected = batch.on_one_device()
    for local_first in (True, False):
        assert_equals_one_device(batch.in_parallel(tm.OverlapConfig(5, local_first), backend=backend), expected)


def test_ids_far_out_of_range_are_skipped() -> None:
    """2**32 + 4 is not expert 4, though its low 32 bits are; the token still travels for its other expert."""
    batch = Batch(2, 6, 2)
    far = torch.tensor([2**32 + 4, 2**40, -(2**33) + 1, 2**63 - 1, 2**32, 2**32 + 5, -(2**31) - 1])
    batch.ids[0] = torch.stack([torch.full((7,), 4), far], dim=1)
    for num_chunks, local_first in ((1, True), (2, False)):
        assert_equals_one_device(batch.in_parallel(tm.OverlapConfig(num_chunks, local_first)), batch.on_one_device())
