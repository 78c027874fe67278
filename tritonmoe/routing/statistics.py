"""How the pairs of a batch are spread over the experts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["RoutingStatistics", "expert_load", "reduce_counts", "routing_statistics"]


def expert_load(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Count the pairs of each expert: topk_ids of any shape -> (E,) int64; ids outside [0, E) count nowhere."""
    return _pair_counts(topk_ids, num_experts)[:-1]


def _pair_counts(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Return (E+1,) int64: pairs per expert, then skipped pairs. Integer sums: the same on every run."""
    ids = topk_ids.flatten().long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    return ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))


def reduce_counts(counts: Tensor, reduce_load: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum counts (n,) over data-parallel ranks with a function of the user's.

    Raises:
        TypeError: reduce_load gave something else.
    """
    shape, summed = counts.shape, reduce_load(counts)
    if not isinstance(summed, Tensor) or summed.shape != shape:
        got = tuple(summed.shape) if isinstance(summed, Tensor) else type(summed).__name__
        raise TypeError(
            f"reduce_load must return the summed load {tuple(shape)}, got {got}: all_reduce() of torch.distributed "
            "sums in place and returns none, so return the tensor that it was given"
        )
    return summed


@dataclass(frozen=True)
class RoutingStatistics:
    """How evenly a batch of pairs is spread over the experts; made by routing_statistics().

    The counts stay on the device; the first number that is asked for reads them to the host, once.
    With no routed pairs every number is 0 (but num_dead_experts is E).
    """

    counts: Tensor
    """(E+1,) int64: pairs per expert, then skipped pairs."""

    @property
    def load(self) -> Tensor:
        """(E,) int64: pairs per expert, on the device."""
        return self.counts[:-1]

    @cached_property
    def host_counts(self) -> list[int]:
        """The counts as Python integers."""
        return self.counts.tolist()

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0] - 1

    @property
    def num_skipped_pairs(self) -> int:
        """Pairs with an id outside [0, E)."""
        return self.host_counts[-1]

    @property
    def num_routed_pairs(self) -> int:
        return sum(self.host_counts[:-1])

    @property
    def num_dead_experts(self) -> int:
        """Experts that no pair chose."""
        return self.host_counts[:-1].count(0)

    @property
    def mean_load(self) -> float:
        return self.num_routed_pairs / self.num_experts

    @property
    def coefficient_of_variation(self) -> float:
        """Standard deviation of the load (over all E experts) divided by its mean."""
        mean = self.mean_load
        if mean == 0:
            return 0.0
        variance = sum((load - mean) ** 2 for load in self.host_counts[:-1]) / self.num_experts
        return math.sqrt(variance) / mean

    @property
    def max_violation(self) -> float:
        """MaxVio: (largest load - mean load) / mean load; 0 is perfect balance, E - 1 is one expert for all."""
        mean = self.mean_load
        return (max(self.host_counts[:-1]) - mean) / mean if mean else 0.0

    @property
    def entropy(self) -> float:
        """Entropy of the load's distribution over experts, in nats; log E is perfect balance."""
        total = self.num_routed_pairs
        return sum(load / total * math.log(total / load) for load in self.host_counts[:-1] if load)

    @property
    def normalized_entropy(self) -> float:
        """entropy / log E, from 0 to 1; 1 for a single expert that has pairs."""
        if self.num_experts == 1:
            return float(self.num_routed_pairs > 0)
        return self.entropy / math.log(self.num_experts)


def routing_statistics(topk_ids: Tensor, num_experts: int) -> RoutingStatistics:
    """Count how the pairs topk_ids (T, K) are spread over the experts, without a host read.

    Example:
        E=4, topk_ids=[[0, 1], [0, 2], [0, -1]] gives load [3, 1, 1, 0], mean load 1.25, MaxVio
        (3 - 1.25) / 1.25 = 1.4, one dead expert and one skipped pair.
    """
    return RoutingStatistics(_pair_counts(topk_ids, num_experts))
