"""Low-rank adapters under expert parallelism: outputs and every gradient equal those of one device."""

from dataclasses import dataclass

import pytest
import torch
from batches import CALLABLES, HIDDEN, INTERMEDIATE, KERNEL_DEVICE, Batch, assert_equals_one_device
from placed_batches import PERMUTED, REPLICATED, PlacedBatch, compare, run
from same_bits import assert_same_bits
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.layer import PerWeight
from tritonmoe.expert_parallel.call import CallSpec, ProposedCall
from tritonmoe.expert_parallel.expert_parallel_mlp import run_expert_parallel
from tritonmoe.experts.adapters import with_adapters
from tritonmoe.experts.moe_mlp import run_experts
from tritonmoe.experts.spec import ExpertSpec, expert_spec
from tritonmoe.experts.tensors import CallTensors
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


def on_two_levels(batch: Batch) -> dict[str, Tensor]:
    def on_rank(world: Transport) -> list[Tensor]:
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(world.rank).items()}
        out = batch.call(TwoLevelTransport(world, 2), leaves, tm.OverlapConfig(2))
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][world.rank])]

    results = tm.run_on_emulated_ranks(on_rank, 4, timeout_s=20)
    names = "out", "x", "topk_weights", *batch.weights
    return {name: torch.cat(parts) for name, parts in zip(names, zip(*results, strict=True), strict=True)}


def test_two_levels() -> None:
    batch = Batch(4, 8, 3, ranks=(2, 3))
    assert_equals_one_device(on_two_levels(batch), batch.on_one_device())


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


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_compiled_layer_has_the_bits_of_eager(dropout: float) -> None:
    batch = Batch(1, 6, 2, torch.float32, ranks=(2, 3), dropout=dropout)
    transport = tm.transports.LocalTransport()

    def run_call(call) -> list[Tensor]:
        torch.manual_seed(5)
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(0).items()}
        out = call(transport, leaves, tm.OverlapConfig(2))
        return [out, *torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][0])]

    compiled = torch.compile(batch.call, backend="aot_eager", fullgraph=True)
    for eager, traced in zip(run_call(batch.call), run_call(compiled), strict=True):
        assert torch.equal(eager, traced)


@dataclass
class DroppedBatch(Batch):
    """A batch in which every token has its seed of dropout wherever it is."""

    ranks: tuple[int, int] = (3, 2)
    dropout: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        generator = torch.Generator().manual_seed(1)
        self.seeds = [
            torch.randint(-(2**31), 2**31, (len(ids),), dtype=torch.int32, generator=generator).to(self.device)
            for ids in self.ids
        ]

    def arguments(
        self, leaves: dict[str, Tensor], ids: Tensor, seeds: Tensor, options: dict
    ) -> tuple[ExpertSpec, CallTensors]:
        factors = {name: leaf for name, leaf in leaves.items() if name[-2:] in ("_a", "_b")}
        adapters = tm.ExpertAdapters(**factors, down_scale=0.5, dropout=self.dropout)
        weights = PerWeight(*(leaves[name] for name in PerWeight._fields[:4]))
        spec = expert_spec(**self.options | options).with_dropout(adapters)
        x, topk_weights = leaves["x"], leaves["topk_weights"]
        return spec, CallTensors(x, ids, topk_weights, with_adapters(weights, adapters), seeds)

    def call(self, transport: Transport, leaves: dict[str, Tensor], overlap, placement=None, **options) -> Tensor:
        rank = transport.rank
        spec, inputs = self.arguments(leaves, self.ids[rank], self.seeds[rank], options)
        return run_expert_parallel(
            ProposedCall(CallSpec(spec, self.num_experts, overlap, placement), transport, inputs)
        )

    def on_one_device(self) -> dict[str, Tensor]:
        leaves = {name: torch.cat(self.tokens[name]).requires_grad_() for name in ("x", "topk_weights")}
        leaves |= {name: value.clone().requires_grad_() for name, value in self.weights.items()}
        out = run_experts(*self.arguments(leaves, torch.cat(self.ids), torch.cat(self.seeds), {"backend": "reference"}))
        grads = torch.autograd.grad(out, list(leaves.values()), torch.cat(self.tokens["dout"]))
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.usefixtures("nan_filled_memory")  # a row that a chunk multiplies before its columns are dropped
@pytest.mark.sweep(1)
@pytest.mark.parametrize("ranks", [(3, 2), (0, 4), (1, 0)], ids=str)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_dropout_equals_one_device(num_ranks: int, overlap: str, ranks: tuple[int, int]) -> None:
    batch = DroppedBatch(num_ranks, 6, 3, ranks=ranks)
    assert_equals_one_device(batch.in_parallel(OVERLAPS[overlap]), batch.on_one_device())


@pytest.mark.thorough
def test_bits_of_the_kernels_with_dropout_do_not_depend_on_the_chunks() -> None:
    batch = DroppedBatch(2, 6, 2, torch.float32, device=KERNEL_DEVICE)
    one, three = (batch.in_parallel(tm.OverlapConfig(chunks), backend="triton") for chunks in (1, 3))
    assert_same_bits(one, three)


@pytest.mark.parametrize("changes", SETTINGS)
def test_dropout_in_settings(changes: str) -> None:
    batch = DroppedBatch(2, 6, 2, options=SETTINGS[changes])
    assert_equals_one_device(batch.in_parallel(tm.OverlapConfig(2)), batch.on_one_device())


def test_dropout_on_two_levels() -> None:
    batch = DroppedBatch(4, 8, 3)
    assert_equals_one_device(on_two_levels(batch), batch.on_one_device())


def test_dropout_of_replicas() -> None:
    @dataclass
    class Placed(DroppedBatch, PlacedBatch):
        pass

    batch = Placed(2, 6, 2, placement=tm.ExpertPlacement(REPLICATED[2]))
    compare(batch, run(batch, tm.OverlapConfig(2)))


def test_dropout_is_drawn_as_on_one_device() -> None:
    batch = Batch(1, 6, 2, ranks=(2, 3), dropout=0.4)
    torch.manual_seed(5)
    expected = batch.on_one_device()
    for overlap in (tm.OverlapConfig(1), tm.OverlapConfig(3)):
        torch.manual_seed(5)
        assert_equals_one_device(batch.in_parallel(overlap), expected)


def test_ranks_with_other_dropout_are_told() -> None:
    def on_rank(transport: Transport) -> None:
        batch = DroppedBatch(2, 6, 2, dropout=0.4 * transport.rank)
        with pytest.raises(tm.CountMismatch, match=r"dropout of the adapters in this layer call.*0\.0.*0\.4"):
            batch.call(transport, batch.of_rank(transport.rank), tm.OverlapConfig(2))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


@pytest.mark.parametrize("expert_gradients", ["mean", "sum"])
def test_a_spread_layer_takes_the_adapters_of_its_experts(expert_gradients: str) -> None:
    """With gradients that are averaged, or not, as those of the experts are."""
    config, num_ranks = tm.MoEConfig(HIDDEN, INTERMEDIATE, 4, 2), 2
    factors = {name: w for name, w in Batch(1, 4, 2, ranks=(2, 3)).weights.items() if name[-2:] in ("_a", "_b")}
    x = torch.randn(num_ranks, 7, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run_layer(transport: Transport | None, own: slice, rows: Tensor) -> dict[str, Tensor]:
        leaves = {name: factor[own].clone().requires_grad_() for name, factor in factors.items()}
        seeded = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
        layer = tm.MoELayer(config, transport, expert_gradients=expert_gradients, **seeded)
        layer(rows, adapters=tm.ExpertAdapters(**leaves)).square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    expected = run_layer(None, slice(None), x)
    results = tm.run_on_emulated_ranks(
        lambda transport: run_layer(transport, slice(2 * transport.rank, 2 * transport.rank + 2), x[transport.rank]),
        num_ranks,
        timeout_s=20,
    )
    for name, grad in expected.items():
        found = torch.cat([result[name] for result in results])
        wanted = grad / num_ranks if expert_gradients == "mean" else grad
        assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max(), name  # gate weights travel in fp32
