"""layer.peak_bytes(), before any call, against what calls then hold, and what it refuses."""

from typing import Any

import pytest
import torch
from held_storages import HeldStorages, keep_what_is_sent, recycle_nothing
from torch import Tensor

import tritonmoe as tm
from tritonmoe.overlap.simulation.memory import BufferWidths
from tritonmoe.overlap.tuning.memory_estimate import expert_loads
from tritonmoe.transports import Transport

SIZE, TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 4, 1024, 128, 192, 16, 3
DTYPES = torch.float32, torch.bfloat16
BOUND, BOUND_OF_FORWARDS = 0.05, 0.13
"""Of what is held: rows are known in the mean only, and small temporaries are not counted. Where nothing is kept for a
backward, the block of pairs that is computed at a time is a good part, and it is taken to be as large as it may be."""
SKEWED = torch.tensor([24, 12, 8, 6, 5, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def no_memory_is_recycled(monkeypatch: pytest.MonkeyPatch) -> None:
    recycle_nothing(monkeypatch)


def draw(popularity: Tensor, rank: int) -> Tensor:
    """Return topk_ids (T, K): K different experts for each token, by popularity."""
    generator = torch.Generator().manual_seed(rank)
    noise = -torch.rand(TOKENS, EXPERTS, generator=generator).clamp(min=1e-9).log()
    return (popularity.clamp(min=1e-12) / noise).topk(TOP_K, dim=1)[1]


def held_and_expected(
    overlap: tm.OverlapConfig,
    routing: str,
    dtype: torch.dtype,
    *,
    num_layers: int,
    backward: bool,
    precision: tm.ExpertPrecision | None = None,
) -> tuple[int, set[int]]:
    """Return what the fullest rank held in such layers, and what the ranks expected."""
    popularity = {"uniform": torch.ones(EXPERTS), "recorded": SKEWED}.get(routing)
    if popularity is None:
        popularity = (torch.arange(EXPERTS) < EXPERTS // SIZE).float()
    ids = [draw(popularity, rank) for rank in range(SIZE)]
    recorded = torch.stack([of.flatten().bincount(minlength=EXPERTS) for of in ids]).sum(0)
    config = tm.MoEConfig(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, expert_precision=precision)

    def on_rank(transport: Transport) -> tuple[int, int]:
        keep_what_is_sent(transport)
        layers = [
            tm.GroupedExperts(config, transport, overlap, backend="torch", generator=torch.Generator(), dtype=dtype)
            for _ in range(num_layers)
        ]
        x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=backward)
        topk_weights = torch.rand(TOKENS, TOP_K, requires_grad=backward)
        with torch.set_grad_enabled(backward):
            given = recorded if routing == "recorded" else routing
            expected = layers[0].peak_bytes(TOKENS, routing=given, num_layers=num_layers)
            with HeldStorages() as forward:
                results = [layer(x, ids[transport.rank], topk_weights) for layer in layers]
            held = forward.peak(results)
            if backward:
                kept = forward.held_now(results)
                leaves = [x, topk_weights, *layers[-1].parameters()]
                with HeldStorages() as last:
                    grads = torch.autograd.grad(results[-1].sum(), leaves)
                held = max(held, kept + last.peak(grads))
        return held, expected

    found = tm.run_on_emulated_ranks(on_rank, SIZE, timeout_s=30)
    return max(of[0] for of in found), {of[1] for of in found}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["uniform", "recorded", "worst"])
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("backward", [True, False])
def test_expected_is_held(backward: bool, chunks: int, routing: str, dtype: torch.dtype) -> None:
    overlap = tm.OverlapConfig(num_chunks=chunks)
    held, expected = held_and_expected(overlap, routing, dtype, num_layers=2, backward=backward)
    assert len(expected) == 1  # the same on every rank
    assert expected.pop() == pytest.approx(held, rel=BOUND if backward else BOUND_OF_FORWARDS)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.thorough), torch.bfloat16], ids=str)
def test_wide_experts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are computed in a few rows at a time, where these are long."""
    for name in ("tritonmoe.ops.backends.torch", "tritonmoe.overlap.simulation.memory"):
        monkeypatch.setattr(f"{name}.ELEMENTWISE_SIZE", 100 * INTERMEDIATE)
    held, expected = held_and_expected(tm.OverlapConfig(1), "uniform", dtype, num_layers=1, backward=True)
    assert expected.pop() == pytest.approx(held, rel=BOUND)


@pytest.mark.parametrize(
    ("form", "gradients", "chunks", "routing"),
    [("fp8_block", "bf16", 1, "uniform"), ("mxfp8", "bf16", 4, "worst"), ("fp8_block", "fp8", 4, "worst")],
)
def test_expected_in_a_precision(form: Any, gradients: Any, chunks: int, routing: str) -> None:
    """Codes, rounded weights and operands of weight gradients are counted; rows are kept as codes."""
    overlap, precision = tm.OverlapConfig(num_chunks=chunks), tm.ExpertPrecision(form, gradients)
    held, expected = held_and_expected(
        overlap, routing, torch.bfloat16, num_layers=2, backward=True, precision=precision
    )
    assert len(expected) == 1
    assert expected.pop() == pytest.approx(held, rel=0.1)


def test_kept_rows_are_codes() -> None:
    widths = BufferWidths(4096, 1024, 8, 2, precision=tm.ExpertPrecision("mxfp8"))
    assert widths.kept_row_bytes == 4096 + 128
    assert widths.kept_row_bytes <= 0.53 * widths.row_bytes


@pytest.mark.parametrize("routing", ["uniform", "worst"])
def test_expected_with_a_budget(routing: str) -> None:
    """A budget that can be kept is kept by any number of layers; without it more would be held."""
    config = tm.MoEConfig(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)

    def on_rank(transport: Transport) -> list[int]:
        layer = tm.GroupedExperts(config, transport, tm.OverlapConfig(num_chunks=4), backend="torch")
        expected = [layer.peak_bytes(TOKENS, routing=routing, num_layers=3)]
        for budget in (expected[0], 2 * expected[0] // 3, 1):
            layer.overlap = tm.OverlapConfig(memory_budget_bytes=budget)
            expected.append(layer.peak_bytes(TOKENS, routing=routing, num_layers=3))
        return expected

    (free, ample, tight, none), *others = tm.run_on_emulated_ranks(on_rank, SIZE, timeout_s=30)
    assert others == [[free, ample, tight, none]] * (SIZE - 1)
    assert tight <= 2 * free // 3 < ample <= free
    assert 1 < none < tight


def test_loads() -> None:
    placement = tm.ExpertPlacement(((0, 3), (1, 2)))
    assert expert_loads([30, 10, 10, 10], placement, 2).tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert expert_loads("uniform", placement, 3).tolist() == [0.75] * 4
    assert expert_loads("worst", placement, 3).tolist() == pytest.approx([1, 0.5, 0.5, 1], abs=1e-5)
    assert expert_loads("worst", placement, 1).tolist() == pytest.approx([0.5, 0, 0, 0.5], abs=1e-5)


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        ("even", '"uniform", "worst"'),
        ([1.0] * 3, r"shape \(3,\)"),
        ([0.0] * 4, "sum 0.0"),
        ([1, 1, 1, -1], "negative"),
        ([9, 0, 0, 0], "chooses 2"),
    ],
)
def test_routings_that_are_none(routing: str | list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        expert_loads(routing, tm.ExpertPlacement.contiguous(4, 2), 2)


def test_what_is_not_known_before_a_call() -> None:
    config = tm.MoEConfig(8, 8, 4, 2)
    with pytest.raises(ValueError, match="on one device"):
        tm.MoELayer(config).peak_bytes(10)

    def on_rank(transport: Transport) -> None:
        for overlap in (tm.OverlapConfig(balance="auto"), tm.OverlapConfig(2, capacity=1.5)):
            with pytest.raises(ValueError, match=r"before a call: leave (balance|a capacity) out"):
                tm.GroupedExperts(config, transport, overlap).peak_bytes(10)
        replicas = tm.ExpertPlacement(((0, 1, 2), (3, 2, 0)))
        with pytest.raises(ValueError, match="replicas"):
            tm.GroupedExperts(config, transport, placement=replicas).peak_bytes(10)
        precise = tm.MoEConfig(128, 128, 4, 2, expert_precision=tm.ExpertPrecision("fp8_block"))
        budget = tm.OverlapConfig(memory_budget_bytes=10**9)
        with pytest.raises(ValueError, match=r"memory_budget_bytes doesn't count .* leave the precision out"):
            tm.GroupedExperts(precise, transport, budget, dtype=torch.bfloat16).peak_bytes(10)
        assert tm.GroupedExperts(precise, transport).peak_bytes(10) > 0  # fp32 parameters, under torch.autocast

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=30)
