"""CopyWork: what copies of experts make all ranks of a call send and compute."""

from dataclasses import dataclass

from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import Schedule, build_backward, build_forward
from tritonmoe.overlap.steps import Step

__all__ = ["CopyWork", "backward_with", "forward_with", "gradient_parts", "part_share"]


@dataclass(frozen=True, eq=False)
class CopyWork:
    """What copies of experts make all ranks of a call send and compute."""

    copied: Tensor
    """(W, W) float64: how many experts of rank i (row) have a copy on rank k."""
    pairs: Tensor
    """(W,) float64: how many pairs each rank's copies compute."""
    expert_bytes: int
    """Of one expert's weights."""
    gradient_bytes: tuple[int, int]
    """Of what comes home of their gradients: first of gate_up_proj, then of down_proj; 0 where nothing does."""
    are_sent_again: bool = False
    """Whether the weights travel once more in the backward."""
    relayed: tuple[Tensor, Tensor] | None = None
    """Where ranks pass pieces of copies on: (W, W) float64, how many experts' weights go from rank i to rank k from
    owners, and then among the ranks that have copies."""

    @property
    def returned(self) -> tuple[int, ...]:
        """Which parts of the gradients come home."""
        return tuple(part for part, num_bytes in enumerate(self.gradient_bytes) if num_bytes)


def forward_with(copies: CopyWork | None, plan: OverlapPlan, num_fillers: int = 0) -> Schedule:
    """Return the schedule of a forward with copies, or without."""
    relays = copies is not None and copies.relayed is not None
    return build_forward(plan, num_fillers, has_copies=copies is not None, relays_copies=relays)


def backward_with(copies: CopyWork | None, plan: OverlapPlan, needs_x: bool, needs_topk_weights: bool) -> Schedule:
    """Return the schedule of the backward of such a forward."""
    needs = {"needs_x": needs_x, "needs_topk_weights": needs_topk_weights}
    if copies is None:
        return build_backward(plan, **needs)
    of_copies = {"has_copies": True, "sends_copies": copies.are_sent_again, "relays_copies": copies.relayed is not None}
    return build_backward(plan, **needs, **of_copies, returned_copies=copies.returned)


def part_share(step: Step, gradient_bytes: tuple[int, int]) -> float:
    """Return the share of copies' gradients that a step of one part computes, sends or adds; 1 for other steps."""
    if not step.kind.is_of_gradient_part:
        return 1.0
    return gradient_bytes[step.chunk or 0] / max(1, sum(gradient_bytes))


def gradient_parts(num_bytes: int) -> tuple[int, int]:
    """Return the parts of the gradients of a gated expert: gate_up_proj has twice the bytes of down_proj."""
    return num_bytes - num_bytes // 3, num_bytes // 3
