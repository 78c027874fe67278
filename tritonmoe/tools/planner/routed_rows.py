"""How many rows travel: how probable it is that a token needs any of the experts that stand in one place."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb

from tritonmoe.tools.planner.transformer_model import Model

__all__ = ["Needs", "needs_of", "probability_needed"]


def probability_needed(held: Sequence[int], group_size: int, top_k_groups: int, top_k: int) -> float:
    """Return how probable it is that a token needs at least one of a place's experts.

    A token's K experts are drawn uniformly from those of top_k_groups groups, which are drawn uniformly before. For one
    group that is 1 - C(E - e, K) / C(E, K) with e experts in the place.

    Args:
        held: for every group, how many of its experts stand in the place.
    Example:
        4 experts in 2 groups, of which 1 is chosen, K = 1, the place holds one expert: 1/4.
    """
    # ways[n][e]: in how many ways n groups are chosen of those seen so far, with e experts of the place among them.
    ways: list[dict[int, int]] = [{0: 1}] + [{} for _ in range(top_k_groups)]
    for experts in held:
        for chosen in range(top_k_groups, 0, -1):
            for before, count in ways[chosen - 1].items():
                ways[chosen][before + experts] = ways[chosen].get(before + experts, 0) + count
    candidates = group_size * top_k_groups
    total = comb(candidates, top_k)
    without = sum(count * comb(candidates - experts, top_k) for experts, count in ways[top_k_groups].items())
    return 1 - without / (total * comb(len(held), top_k_groups))


@dataclass(frozen=True)
class Needs:
    """What a token needs, on average over the ranks; with recorded routing on the busiest rank."""

    of_rank: float
    """How probable it is that it needs one given rank."""
    of_node: float
    """How probable it is that it needs any rank of one given node."""
    imbalance: float = 1.0
    """The pairs of the busiest rank, over the mean."""


@cache
def needs_of(model: Model, num_ranks: int, node_size: int, load: Sequence[float] = ()) -> Needs:
    """Return what tokens need of num_ranks ranks, each with E / num_ranks experts that stand side by side.

    load: the share of all pairs that each expert gets, as recorded; () for uniform routing. A place with a share q of
        the pairs is then taken to be needed with probability 1 - (1 - q) ** K.
    Raises:
        ValueError: the ranks can't share the experts evenly.
    """
    if model.num_experts % num_ranks:
        raise ValueError(
            f"{model.num_experts} experts can't be shared evenly by {num_ranks} ranks: choose a number of ranks that "
            "divides them"
        )
    node_size = min(node_size, num_ranks)
    per_rank = model.num_experts // num_ranks

    def mean(experts: int) -> float:
        """Return the mean over the places that hold so many experts, in order."""
        group_size = model.num_experts // model.num_groups
        places: Counter[tuple[int, ...]] = Counter()
        for start in range(0, model.num_experts, experts):
            ends = ((g * group_size, (g + 1) * group_size) for g in range(model.num_groups))
            held = (max(0, min(start + experts, last) - max(start, first)) for first, last in ends)
            places[tuple(sorted(held))] += 1  # which groups they are makes no difference
        needed = {held: probability_needed(held, group_size, model.top_k_groups, model.top_k) for held in places}
        return sum(count * needed[held] for held, count in places.items()) / places.total()

    if not load:
        return Needs(mean(per_rank), mean(per_rank * node_size))
    shares = [sum(load[start : start + per_rank]) for start in range(0, model.num_experts, per_rank)]
    nodes = [sum(shares[start : start + node_size]) for start in range(0, num_ranks, node_size)]
    rank, node = (1 - (1 - max(of)) ** model.top_k for of in (shares, nodes))
    return Needs(rank, node, max(shares) * num_ranks)
