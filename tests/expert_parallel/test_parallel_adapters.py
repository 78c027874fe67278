"""Low-rank adapters under expert parallelism: outputs and every gradient equal those of one device."""

import pytest
import torch
from batches import CALLABLES, HIDDEN, INTERMEDIATE, Batch, assert_equals_one_device
from placed_batches import PERMUTED, REPLICATED, PlacedBatch, compare, run
from same_bits import assert_same_bits
from torch import Tensor

import tritonmoe as tm
from tritonmoe.transports import Transport, TwoLevelTransport

OVERLAPS = {
    "C1": tm.OverlapConfig(1),
    "C3": tm.OverlapConfig(3),
    "all travel": tm.OverlapConfig(2, local_first=False),
    "experts": tm.OverlapConfig(2, chunk_by="experts"),
    "capacity": tm.OverlapConfig(2, capacity=4.0),
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("ranks", [(3, 2), (0, 4), (1, 0)], ids=str)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_equal_one_device(num_ranks: int, overlap: str, ranks: tuple[int, int]) -> None:
    batch = Batch(num_ranks, 6, 3, ranks=ranks)
    assert_equals_one_device(batch.in_parallel(OVERLAPS[overlap]), batch.on_one_device())


SETTINGS = {
    "save": {"save": "input"},
    "callable": {"activation": CALLABLES["chunk"]},
    "transposed": {"transposed": True},
}


@pytest.mark.parametrize("changes", SETTINGS)
def test_settings(changes: str) -> None:
    batch = Batch(2, 6, 2, options=SETTINGS[changes], ranks=(2, 3))
    assert_equals_one_device(batch.in_parallel(tm.OverlapConfig(2)), batch.on_one_device())


def test_two_levels() -> None:
    batch = Batch(4, 8, 3, ranks=(2, 3))

    def on_rank(world: Transport) -> list[Tensor]:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(world.rank).items()}
        out = batch.call(TwoLevelTransport(world, 2), leaves, tm.OverlapConfig(2))
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][world.rank])]

    results = tm.run_on_emulated_ranks(on_rank, 4, timeout_s=20)
    names = "out", "x", "topk_weights", *batch.weights
    joined = {name: torch.cat(parts) for name, parts in zip(names, zip(*results, strict=True), strict=True)}
    assert_equals_one_device(joined, batch.on_one_device())


@pytest.mark.parametrize("held", [PERMUTED, REPLICATED], ids=["permuted", "replicated"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_placements(num_ranks: int, held: dict) -> None:
    """Gradients of replicas' factors are summed over their owners, as those of the weights are."""
    batch = PlacedBatch(num_ranks, 6, 2, ranks=(2, 3), placement=tm.ExpertPlacement(held[num_ranks]))
    compare(batch, run(batch, tm.OverlapConfig(2)))


def test_the_serial_schedule_has_the_same_bits() -> None:
    batch = Batch(3, 6, 2, torch.float32, ranks=(2, 3))
    overlapped, serial = (batch.in_parallel(tm.OverlapConfig(3, serial=serial)) for serial in (False, True))
    assert_same_bits(overlapped, serial)


def test_ranks_with_other_adapters_are_told() -> None:
    batch = Batch(2, 6, 2, ranks=(2, 3))

    def on_rank(transport: Transport) -> None:
        leaves = batch.of_rank(transport.rank)
        if transport.rank == 1:
            leaves["down_a"], leaves["down_b"] = torch.ones(3, 4, INTERMEDIATE), torch.ones(3, HIDDEN, 4)
            leaves = {name: leaf.double() for name, leaf in leaves.items()}
        with pytest.raises(tm.CountMismatch, match="the rank of the adapter on down_proj in this layer call"):
            batch.call(transport, leaves, tm.OverlapConfig(2))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_a_compiled_layer_has_the_bits_of_eager() -> None:
    batch = Batch(1, 6, 2, torch.float32, ranks=(2, 3))
    transport = tm.transports.LocalTransport()

    def run_call(call) -> list[Tensor]:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(0).items()}
        out = call(transport, leaves, tm.OverlapConfig(2))
        return [out, *torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][0])]

    compiled = torch.compile(batch.call, backend="aot_eager", fullgraph=True)
    for eager, traced in zip(run_call(batch.call), run_call(compiled), strict=True):
        assert torch.equal(eager, traced)
