"""Rebalanced: what a look at the load has decided, with what the move costs and gains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.layer.rebalancing.better_placement import busiest, moved_experts

__all__ = ["Look", "Rebalanced"]


@dataclass(frozen=True)
class Rebalanced:
    """What Rebalancer.step() has decided: the same on every rank, apart from took_s."""

    step: int
    """The number of the call of step(), from 1."""
    moved: tuple[str, ...]
    """The layers whose experts have moved; none where that would not have paid."""
    imbalance_before: float
    """The pairs of the busiest rank over the mean of all, over all layers, in the steps of the history."""
    imbalance_after: float
    """The same of the same steps with the new placements."""
    moved_bytes: int
    """What the ranks sent in all."""
    expected_move_s: float
    expected_gain_s: float
    """How much shorter the experts of one step compute on the busiest ranks."""
    took_s: float = 0.0
    """How long the move took on this rank."""

    @property
    def paid_after_steps(self) -> int | None:
        """After how many steps the move has paid; None where nothing moved."""
        return math.ceil(self.expected_move_s / self.expected_gain_s) if self.moved else None

    def __str__(self) -> str:
        if not self.moved:
            return (
                f"step {self.step}: the busiest rank has {self.imbalance_before:.2f} times the mean, and no move of "
                "experts would pay before the next look"
            )
        return (
            f"step {self.step}: the busiest rank had {self.imbalance_before:.2f} times the mean and has "
            f"{self.imbalance_after:.2f}; experts of {len(self.moved)} layers moved, {self.moved_bytes / 1e6:.1f} MB "
            f"in all, expected to take {self.expected_move_s * 1e3:.1f} ms (took {self.took_s * 1e3:.1f} ms) and to be "
            f"paid after {self.paid_after_steps} steps"
        )


@dataclass(frozen=True)
class Look:
    """What is known and wanted of one layer in one look, the same on every rank."""

    name: str
    load: Sequence[int]
    """The pairs of each expert, of all ranks."""
    ns_of_pair: float
    """What one of them adds to the average step of its rank."""
    expert_bytes: int
    before: ExpertPlacement
    after: ExpertPlacement

    @staticmethod
    def decided(step: int, looks: Sequence["Look"], ns_of_byte: float) -> Rebalanced:
        """Return what is decided of all layers."""
        size = looks[0].before.size
        mean = sum(sum(look.load) for look in looks) / size
        before = [busiest(look.load, look.before) for look in looks]
        after = [busiest(look.load, look.after) for look in looks]
        moved_bytes, ports = 0, [0] * size
        for look in looks:
            sent, received = moved_experts(look.before, look.after)
            moved_bytes += sum(sent) * look.expert_bytes
            for rank in range(size):
                ports[rank] += max(sent[rank], received[rank]) * look.expert_bytes
        gains = [(was - now) * look.ns_of_pair for was, now, look in zip(before, after, looks, strict=True)]
        return Rebalanced(
            step=step,
            moved=tuple(look.name for look in looks if look.before != look.after),
            imbalance_before=sum(before) / mean if mean else 1.0,
            imbalance_after=sum(after) / mean if mean else 1.0,
            moved_bytes=moved_bytes,
            expected_move_s=max(ports) * ns_of_byte / 1e9,
            expected_gain_s=sum(gains) / 1e9,
        )
