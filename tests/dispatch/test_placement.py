"""Expert placement: permutations and replicas give what one device gives, and replicas stay equal."""

import pytest
import torch
from batches import NAMES, WEIGHTS
from hypothesis import given, settings
from hypothesis import strategies as st
from placed_batches import PERMUTED, REPLICATED, PlacedBatch, compare, run

import tritonmoe as tm


@pytest.mark.parametrize("placed", [PERMUTED, REPLICATED], ids=["permuted", "replicated"])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("local_first", [True, False])
def test_any_placement_equals_one_device(placed, num_ranks, num_chunks, local_first):
    batch = PlacedBatch(num_ranks, 6, 2, placement=tm.ExpertPlacement(placed[num_ranks]))
    compare(batch, run(batch, tm.OverlapConfig(num_chunks=num_chunks, local_first=local_first)))


def test_replicas_get_the_same_bits_and_the_overlap_changes_none():
    batch = PlacedBatch(3, 6, 2, torch.float32, placement=tm.ExpertPlacement(REPLICATED[3]))
    overlapped = run(batch, tm.OverlapConfig(num_chunks=3), "torch")
    serial = run(batch, tm.OverlapConfig(num_chunks=3, serial=True), "torch")
    for one, other in zip(overlapped, serial, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("out", *NAMES))
    for expert in range(6):
        owners = batch.placement.owners(expert)
        slots = [batch.placement.experts_of_rank[rank].index(expert) for rank in owners]
        for name in WEIGHTS:
            first, *others = [overlapped[rank][name][slot] for rank, slot in zip(owners, slots, strict=True)]
            assert all(torch.equal(first, other) for other in others), (expert, name)


def test_frozen_weights_are_left_out_of_the_sum():
    batch = PlacedBatch(2, 6, 2, placement=tm.ExpertPlacement(REPLICATED[2]))
    expected = batch.on_one_device()
    for rank, result in enumerate(run(batch, tm.OverlapConfig(num_chunks=2), frozen=("gate_up_proj", "down_bias"))):
        assert "gate_up_proj" not in result
        held = list(batch.placement.experts_of_rank[rank])
        torch.testing.assert_close(result["down_proj"], expected["down_proj"][held], rtol=1e-9, atol=1e-9)


def test_owners_that_freeze_different_weights_are_told():
    batch = PlacedBatch(2, 6, 2, placement=tm.ExpertPlacement(REPLICATED[2]))

    def rank_call(transport):
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        leaves["down_proj"].requires_grad_(transport.rank == 0)
        with pytest.raises(tm.CountMismatch, match="which replicated weights need gradients"):
            batch.call(transport, leaves, tm.OverlapConfig(num_chunks=1), placement=batch.placement)

    tm.run_on_emulated_ranks(rank_call, num_ranks=2)


def test_main_grad_and_replicas_are_refused_on_every_rank():
    batch = PlacedBatch(2, 6, 2, placement=tm.ExpertPlacement(REPLICATED[2]))

    def rank_call(transport):
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        leaves["down_proj"].main_grad = torch.zeros_like(leaves["down_proj"])
        with pytest.raises(ValueError, match="can't have replicas"):
            batch.call(transport, leaves, tm.OverlapConfig(num_chunks=1), placement=batch.placement)

    tm.run_on_emulated_ranks(rank_call, num_ranks=2)


def test_ranks_with_different_placements_are_told():
    batch = PlacedBatch(2, 6, 2, placement=tm.ExpertPlacement(PERMUTED[2]))

    def rank_call(transport):
        placed = PERMUTED[2] if transport.rank == 0 else PERMUTED[2][::-1]
        with pytest.raises(tm.CountMismatch, match="placement"):
            batch.call(
                transport,
                batch.of_rank(transport.rank),
                tm.OverlapConfig(num_chunks=1),
                placement=tm.ExpertPlacement(placed),
            )

    tm.run_on_emulated_ranks(rank_call, num_ranks=2)


def test_a_layer_draws_the_same_experts_wherever_they_are():
    config = tm.MoEConfig(hidden_size=6, intermediate_size=4, num_experts=6, top_k=2)

    def make(transport=None, placement=None):
        generator = torch.Generator().manual_seed(3)
        return tm.MoELayer(config, transport, placement=placement, generator=generator)

    whole = make()
    placement = tm.ExpertPlacement(REPLICATED[2])
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))

    def rank_call(transport):
        layer = make(transport, placement)
        return layer.experts.gate_up_proj.detach(), layer(x).detach()

    for rank, (weight, y) in enumerate(tm.run_on_emulated_ranks(rank_call, num_ranks=2)):
        assert torch.equal(weight, whole.experts.gate_up_proj[list(placement.experts_of_rank[rank])])
        torch.testing.assert_close(y, whole(x).detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs ranks: give a transport"):
        make(placement=placement)


def test_tokens_of_a_replicated_expert_are_split():
    placement = tm.ExpertPlacement(((0, 1), (0, 1)))
    ids = torch.tensor([[0, 1], [0, -1], [1, 7], [0, 0]])
    # Slots: rank 0 has 0 and 1, rank 1 has 2 and 3; token t of rank r takes replica (t + r) mod 2.
    assert placement.slots(ids, 0).tolist() == [[0, 1], [2, -1], [1, -1], [2, 2]]
    assert placement.slots(ids, 1).tolist() == [[2, 3], [0, -1], [3, -1], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_slots_of_ids_in_a_narrow_dtype(dtype):
    """The number of experts, which doesn't fit into the ids' dtype, must not wrap."""
    num_experts = torch.iinfo(dtype).max + 1
    placement = tm.ExpertPlacement((tuple(range(num_experts)),))
    assert placement.slots(torch.tensor([[0, num_experts - 1]], dtype=dtype), 0).tolist() == [[0, num_experts - 1]]


def test_who_counts():
    placement = tm.ExpertPlacement(((0, 1, 2), (3, 2, 0)))
    assert placement.owners(2) == (0, 1)
    assert [placement.first_owner(e) for e in range(4)] == [0, 0, 0, 1]
    assert placement.has_replicas
    assert not tm.ExpertPlacement.contiguous(6, 3).has_replicas


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_balanced_placements_are_whole_and_no_worse_than_one_hot_expert(data):
    num_experts, size = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 8))
    slots = data.draw(st.integers(-(-num_experts // size), num_experts))
    load = torch.tensor(data.draw(st.lists(st.integers(0, 100), min_size=num_experts, max_size=num_experts)))
    placement = tm.ExpertPlacement.balanced(load, size, slots)  # its own checks: whole, no expert twice on a rank
    assert (placement.size, placement.num_slots, placement.num_experts) == (size, slots, num_experts)


def test_balanced_spreads_a_hot_expert():
    load = torch.tensor([80, 10, 10, 10, 10, 10, 10, 20])
    contiguous, balanced = tm.ExpertPlacement.contiguous(8, 4), tm.ExpertPlacement.balanced(load, 4, 3)

    def heaviest(placement):
        shares = [load[e].item() / len(placement.owners(e)) for e in range(8)]
        return max(sum(shares[e] for e in held) for held in placement.experts_of_rank)

    assert heaviest(contiguous) == 90
    assert heaviest(balanced) <= 45  # 40 is an even split


@pytest.mark.parametrize(
    ("ranks", "match"),
    [
        ((), "same number of slots"),
        (((0, 1), (2,)), "same number of slots"),
        (((0, 0), (1, 2)), "twice"),
        (((0, 1), (3, 1)), "every expert"),
    ],
)
def test_placements_that_make_no_sense_are_refused(ranks, match):
    with pytest.raises(ValueError, match=match):
        tm.ExpertPlacement(ranks)


def test_placements_that_do_not_fit_the_layer_are_refused():
    batch = PlacedBatch(2, 6, 2, placement=tm.ExpertPlacement(PERMUTED[2]))

    def rank_call(transport):
        for placed, match in ((PERMUTED[3], "on 3 ranks"), (REPLICATED[2], "4 slots")):
            with pytest.raises(ValueError, match=match):
                batch.call(
                    transport,
                    batch.of_rank(transport.rank),
                    tm.OverlapConfig(num_chunks=1),
                    placement=tm.ExpertPlacement(placed),
                )

    tm.run_on_emulated_ranks(rank_call, num_ranks=2)
    with pytest.raises(ValueError, match="can't hold"):
        tm.ExpertPlacement.balanced(torch.ones(8), 2, 3)
