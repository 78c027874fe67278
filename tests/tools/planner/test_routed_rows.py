"""How many rows travel, against enumeration of every routing."""

from dataclasses import replace
from itertools import combinations

import pytest

from tritonmoe.tools.planner.layer_exchange import needs_of, probability_needed
from tritonmoe.tools.planner.model_config import MODELS

MODEL = replace(MODELS["DeepSeek-V3"], num_groups=1, top_k_groups=1)


def enumerated(place: set[int], num_experts: int, top_k: int, num_groups: int, top_k_groups: int) -> float:
    """Return the share of all routings in which a token needs the place, each choice of groups and experts once."""
    size = num_experts // num_groups
    needed = total = 0
    for groups in combinations(range(num_groups), top_k_groups):
        candidates = [e for e in range(num_experts) if e // size in groups]
        for chosen in combinations(candidates, top_k):
            total += 1
            needed += bool(place & set(chosen))
    return needed / total


@pytest.mark.parametrize(
    ("num_experts", "top_k", "groups", "ranks"),
    [
        (8, 3, (1, 1), 4),
        (8, 2, (4, 2), 4),
        (8, 2, (4, 2), 2),
        (12, 3, (3, 2), 4),
        (12, 4, (4, 2), 6),
        (6, 1, (3, 1), 2),
    ],
)
def test_needs_are_those_of_all_routings(num_experts, top_k, groups, ranks):
    model = replace(MODEL, num_experts=num_experts, top_k=top_k, num_groups=groups[0], top_k_groups=groups[1])
    per_rank = num_experts // ranks
    places = [set(range(r * per_rank, (r + 1) * per_rank)) for r in range(ranks)]
    expected = sum(enumerated(place, num_experts, top_k, *groups) for place in places) / ranks
    assert needs_of(model, ranks, 1).of_rank == pytest.approx(expected, abs=1e-12)
    nodes = [places[n] | places[n + 1] for n in range(0, ranks, 2)]
    expected = sum(enumerated(node, num_experts, top_k, *groups) for node in nodes) / len(nodes)
    assert needs_of(model, ranks, 2).of_node == pytest.approx(expected, abs=1e-12)


def test_by_hand():
    assert probability_needed([1, 0], group_size=2, top_k_groups=1, top_k=1) == 0.25
    # E = 4, K = 2, one expert: of 6 pairs 3 contain it.
    assert probability_needed([1], group_size=4, top_k_groups=1, top_k=2) == 0.5
    assert probability_needed([4], group_size=4, top_k_groups=1, top_k=2) == 1.0


def test_published_counts():
    """4096 tokens, E = 256, K = 8, 16 ranks of 2 nodes: 26757 rows received, 8166 rows to nodes."""
    needs = needs_of(MODEL, 16, 8)
    assert 16 * 4096 * needs.of_rank == pytest.approx(26757, rel=0.0015)
    assert 2 * 4096 * needs.of_node == pytest.approx(8166, rel=0.0015)


def test_recorded_routing():
    model = replace(MODEL, num_experts=4, top_k=1)
    needs = needs_of(model, 2, 1, load=(0.5, 0.25, 0.125, 0.125))
    assert needs.of_rank == pytest.approx(0.75)
    assert needs.imbalance == pytest.approx(1.5)
    uniform = needs_of(model, 2, 1, load=(0.25,) * 4)
    assert uniform == needs_of(model, 2, 1)


def test_ranks_share_experts_evenly():
    with pytest.raises(ValueError, match="256 experts can't be shared evenly by 3 ranks"):
        needs_of(MODEL, 3, 1)
