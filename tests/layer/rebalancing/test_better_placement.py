"""Better placements: each relieves the busiest rank, and the best is near what a long search finds."""

import itertools

import pytest
import torch

from tritonmoe import ExpertPlacement
from tritonmoe.layer.rebalancing.better_placement import best_placement, better_placements, busiest, moved_experts


def test_the_example_of_its_docstring():
    first = next(iter(better_placements([9, 8, 1, 2], ExpertPlacement(((0, 1), (2, 3))))))
    assert first.experts_of_rank == ((3, 1), (2, 0))
    assert busiest([9, 8, 1, 2], first) == 10


@pytest.mark.parametrize("seed", range(6))
def test_near_the_best_of_all(seed):
    """E=9 on three ranks: all 280 divisions are compared."""
    load = torch.randint(1, 1000, (9,), generator=torch.Generator().manual_seed(seed)).pow(2).tolist()
    groups = [set(group) for group in itertools.combinations(range(9), 3)]
    optimum = min(
        max(sum(load[e] for e in group) for group in (one, other, set(range(9)) - one - other))
        for one in groups
        for other in groups
        if not one & other
    )
    found = list(better_placements(load, ExpertPlacement.contiguous(9, 3)))
    assert min(busiest(load, placement) for placement in found) <= 1.1 * optimum


@pytest.mark.parametrize("num_slots", [2, 3, 4])
def test_each_exchange_relieves_and_keeps_the_slots(num_slots):
    load = [90, 80, 70, 1, 2, 3, 4, 5]
    before = ExpertPlacement.balanced(torch.ones(8), 4, num_slots)
    was = busiest(load, before)
    for placement in list(better_placements(load, before))[:-1]:
        assert (placement.size, placement.num_slots, placement.num_experts) == (4, num_slots, 8)
        assert busiest(load, placement) <= was
        was = busiest(load, placement)


def test_hot_experts_get_the_replicas():
    load = [100, 1, 1, 1]
    before = ExpertPlacement(((0, 1, 2), (3, 1, 2)))
    *_, last = better_placements(load, before)
    assert len(last.owners(0)) == 2
    assert busiest(load, last) < 60


def test_the_same_ranks_keep_what_they_can():
    before = ExpertPlacement(((3, 1), (2, 0)))
    sent, received = moved_experts(before, ExpertPlacement(((3, 0), (2, 1))))
    assert (sent, received) == ([1, 1], [1, 1])
    for placement in better_placements([5, 5, 5, 5], before):
        assert placement == before


def test_a_replica_comes_from_whoever_has_it():
    before, after = ExpertPlacement(((0, 1), (2, 0))), ExpertPlacement(((0, 2), (2, 1)))
    assert moved_experts(before, after) == ([1, 1], [1, 1])


def test_nothing_moves_that_never_pays():
    """The best exchange saves 7 pairs of the busiest rank's 17: at 10 ns each, 70 ns a step, 700 in ten."""
    load, before = [9, 8, 1, 2], ExpertPlacement(((0, 1), (2, 3)))
    assert best_placement(load, before, ns_of_pair=10.0, ns_of_expert=100.0, num_steps=1) is None
    assert best_placement(load, before, ns_of_pair=10.0, ns_of_expert=701.0, num_steps=10) is None
    found = best_placement(load, before, ns_of_pair=10.0, ns_of_expert=699.0, num_steps=10)
    assert found is not None
    assert busiest(load, found) == 10
    assert best_placement(load, before, ns_of_pair=0.0, ns_of_expert=0.0, num_steps=10) is None
    assert best_placement([0, 0, 0, 0], before, 10.0, 0.0, 10) is None


def test_a_gain_within_what_loads_differ_by_moves_nothing():
    load, before = [100, 103, 100, 99], ExpertPlacement(((0, 1), (2, 3)))
    assert best_placement(load, before, ns_of_pair=1e6, ns_of_expert=0.0, num_steps=10**6) is None
