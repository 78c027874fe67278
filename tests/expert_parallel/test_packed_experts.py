"""Packed experts spread over ranks: outputs and gradients have the bits of decoded experts over the same ranks."""

from pathlib import Path

import pytest
import torch
from held_storages import HeldStorages, LargestFloats
from packed_weights import FORMATS, PackedCase
from processes import run_processes
from same_bits import assert_same_bits
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.formats import WeightFormat
from tritonmoe.transports import Transport, TwoLevelTransport

WORKER = Path(__file__).parent / "packed_worker.py"
CALLS_WORKER = WORKER.with_name("packed_calls_worker.py")
RESHARD_WORKER = WORKER.with_name("packed_reshard_worker.py")
OVERLAPS = {
    "C1": tm.OverlapConfig(1),
    "C3": tm.OverlapConfig(3),
    "experts": tm.OverlapConfig(2, chunk_by="experts"),
    "capacity": tm.OverlapConfig(2, capacity=4.0),
    "copies": tm.OverlapConfig(2, balance="always"),
}


def part(weight: tm.QuantizedWeight, own: slice) -> tm.QuantizedWeight:
    return tm.QuantizedWeight(weight.format, weight.values[own], weight.scales[own])


def call(
    case: PackedCase, transport: Transport, overlap: tm.OverlapConfig, decoded: bool, **options: object
) -> dict[str, Tensor]:
    """Run this rank's call of expert_parallel_mlp; give its result and every gradient."""
    num_local = case.num_experts // transport.size
    own = slice(transport.rank * num_local, (transport.rank + 1) * num_local)
    up, down = (part(weight, own) for weight in case.weights())
    leaves = {
        name: leaf.detach()[own if name[-2:] in ("_a", "_b") or "bias" in name else slice(None)]
        .clone()
        .requires_grad_()
        for name, leaf in case.leaves().items()
    }
    torch.manual_seed(3)
    x = leaves["x"] * (1 + transport.rank)
    weights = (up.decode(), down.decode()) if decoded else (up, down)
    given = {**case.keywords(leaves), **options, "num_experts": case.num_experts, "transport": transport}
    y = tm.expert_parallel_mlp(x, case.topk_ids(), leaves["topk_weights"], *weights, overlap=overlap, **given)  # type: ignore[arg-type]
    y.backward(case.dout())
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("save", ["hidden", "input"])
def test_bits_are_those_of_decoded_experts(
    save: str, num_ranks: int, overlap: str, weight_format: WeightFormat
) -> None:
    case = PackedCase(weight_format, rank=3, bias=True, dropout=0.2 if num_ranks == 1 else 0)  # their seed is shared

    def on_rank(transport: Transport) -> None:
        found = [call(case, transport, OVERLAPS[overlap], decoded, save=save) for decoded in (False, True)]
        assert_same_bits(*found)

    tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=60)


@pytest.mark.parametrize(
    "weight_format",
    [pytest.param(one, marks=pytest.mark.slow if one == "mxfp4" else pytest.mark.thorough) for one in FORMATS],
)
def test_kernels_in_chunks_of_experts(weight_format: WeightFormat) -> None:
    """A part of the experts is a part of their bytes and scales."""
    case = PackedCase(weight_format, num_tokens=9, rank=2)

    def on_rank(transport: Transport) -> None:
        found = [call(case, transport, OVERLAPS["experts"], decoded, backend="triton") for decoded in (False, True)]
        assert_same_bits(*found)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=300)


def test_two_levels() -> None:
    case = PackedCase("mxfp4", rank=2)

    def on_rank(world: Transport) -> None:
        transport = TwoLevelTransport(world, 2)
        assert_same_bits(*(call(case, transport, tm.OverlapConfig(2), decoded) for decoded in (False, True)))

    tm.run_on_emulated_ranks(on_rank, 4, timeout_s=60)


def test_ranks_with_other_formats_are_told() -> None:
    def on_rank(transport: Transport) -> None:
        case = PackedCase("nf4" if transport.rank else "mxfp4")
        with pytest.raises(tm.CountMismatch, match="gate_up_format"):
            call(case, transport, tm.OverlapConfig(1), decoded=False)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=30)


def test_a_rank_with_decoded_experts_is_told() -> None:
    case = PackedCase("nf4")

    def on_rank(transport: Transport) -> None:
        with pytest.raises(tm.CountMismatch):
            call(case, transport, tm.OverlapConfig(1), decoded=transport.rank == 1)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=30)


def test_what_one_rank_refuses_no_rank_waits_for() -> None:
    case = PackedCase("mxfp4")

    def on_rank(transport: Transport) -> None:
        if transport.rank == 0:
            with pytest.raises(tm.TransportError):
                call(case, transport, tm.OverlapConfig(1), decoded=False)
        else:
            with pytest.raises(ValueError, match="batch_invariant=True needs backend='triton'"):
                call(case, transport, tm.OverlapConfig(1), decoded=False, batch_invariant=True)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=30)


def test_no_whole_decoded_weight_is_ever_made() -> None:
    case = PackedCase("mxfp4", 8, 32, 2, hidden=128, intermediate=128, rank=2)
    up, down = case.weights()
    leaves = case.leaves()
    with HeldStorages() as held:
        transport = tm.transports.LocalTransport()
        given = {**case.keywords(leaves), "num_experts": case.num_experts, "transport": transport, "backend": "torch"}
        y = tm.expert_parallel_mlp(leaves["x"], case.topk_ids(), leaves["topk_weights"], up, down, **given)  # type: ignore[arg-type]
        y.backward(case.dout())
    tables = 2**16 * 8
    assert max(held.num_bytes) <= tables < min(up.decode().nbytes, down.decode().nbytes)


@pytest.mark.thorough
@pytest.mark.parametrize("overlap", ["C3", "copies"])
def test_kernels_make_no_decoded_expert(overlap: str) -> None:
    """Not even one: a tile is decoded where it is loaded, of experts that other ranks have sent too."""
    case = PackedCase("mxfp4", 3, 6, 2, hidden=64, intermediate=128, rank=2, hot=True)
    down = case.weights()[1]

    def on_rank(transport: Transport) -> None:
        with LargestFloats() as largest:
            call(case, transport, OVERLAPS[overlap], decoded=False, backend="triton")
        most = max(largest.num_values.items(), key=lambda made: made[1])
        assert most[1] < down.shape[1] * down.shape[2], most

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=300)


def processes(on_four: WeightFormat) -> list:
    """Return every format on two ranks, and one on four: the others do the same there, and are slow."""
    return [
        *(pytest.param(one, 2, marks=pytest.mark.thorough) for one in FORMATS),
        *(pytest.param(one, 4, marks=pytest.mark.thorough if one == on_four else pytest.mark.slow) for one in FORMATS),
    ]


@pytest.mark.parametrize(("weight_format", "num_ranks"), processes(on_four="nf4"))
def test_layers_on_processes(weight_format: WeightFormat, num_ranks: int, tmp_path: Path) -> None:
    """Layers, parallelize, casts, DTensors, checkpoints, DDP and FSDP2: each right, or refused."""
    ended = run_processes(num_ranks, "gloo", str(WORKER), str(tmp_path), weight_format, timeout_s=170.0)
    assert ended.statuses == [0] * num_ranks, ended.output[-6000:]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("weight_format", "num_ranks"), processes(on_four="mxfp4"))
def test_calls_on_processes(weight_format: WeightFormat, backend: str, num_ranks: int, tmp_path: Path) -> None:
    """Adapters with dropout, recomputes of the call and of activation checkpointing, ranks without tokens."""
    script = str(CALLS_WORKER), str(tmp_path), weight_format, backend
    ended = run_processes(num_ranks, "gloo", *script, timeout_s=170.0 if backend == "torch" else 3000.0)
    assert ended.statuses == [0] * num_ranks, ended.output[-6000:]


@pytest.mark.parametrize(
    ("weight_format", "backend", "ranks"),
    [
        pytest.param("fp8", "torch", (4, 2, 1, 2, 4), marks=pytest.mark.thorough),
        pytest.param("nf4", "torch", (4, 2, 1, 2, 4), marks=pytest.mark.slow),
        pytest.param("mxfp4", "torch", (4, 2, 1), marks=pytest.mark.thorough),
        pytest.param("nf4", "triton", (2, 1, 2), marks=pytest.mark.slow),
        pytest.param("mxfp4", "triton", (2, 1, 2), marks=pytest.mark.slow),
        pytest.param("fp8", "triton", (2, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_resharding(weight_format: WeightFormat, backend: str, ranks: tuple[int, ...], tmp_path: Path) -> None:
    """Saved and loaded over other numbers of ranks and back: bytes stay, and no rank decodes more than two experts.

    By the kernels no rank makes as much as one matrix of an expert.
    """
    for stage, num_ranks in enumerate(ranks):
        script = str(RESHARD_WORKER), str(tmp_path), weight_format, backend, str(stage)
        ended = run_processes(num_ranks, "gloo", *script, timeout_s=170.0 if backend == "torch" else 3000.0)
        assert ended.statuses == [0] * num_ranks, (stage, ended.output[-6000:])
