"""TRAINERS: what the code that trains does with a layer's rows, weights and launches, as far as a step shows it."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from tritonmoe.tools.planner.job import Job

__all__ = ["TRAINERS", "UNKNOWN_IMBALANCE", "Sends", "Trainer", "trained_by"]

UNKNOWN_IMBALANCE = 1.2
"""Job.imbalance of routing that nobody recorded or forced to be balanced; of fine-tuning 2.6 to 5.1 was published."""

Sends = Literal["rows", "pairs"]
"""Whether a token travels once to each rank that needs it, or once for each of its experts."""


@dataclass(frozen=True)
class Trainer:
    """A library that trains models with experts, as it is used by default."""

    sends: Sends
    overlaps_exchange: bool
    """Whether exchanges run under the experts of other chunks."""
    zero: int
    """1: the optimizer's state is spread over data-parallel ranks; 3: weights and gradients too, and every micro-batch
    gathers a layer's weights before its forward and before its backward."""
    pair_passes: float
    """Job.pair_passes where pairs travel; where rows do, the library that sends them permutes too, in half as many."""
    us_per_expert: float
    """Job.us_per_expert."""


TRAINERS = {
    "ours": Trainer("rows", True, 1, 0.0, 0.0),
    "megatron": Trainer("pairs", False, 1, 24.0, 0.0),
    "torchtitan": Trainer("pairs", False, 3, 24.0, 0.0),
    "deepspeed": Trainer("pairs", False, 3, 24.0, 2500.0),
}
"""Passes: permute, pad, scale and cast, and back, forward and backward, are 12 where kernels are fused to 48 where none
is. Microseconds an expert: DeepSpeed gathers the weights of a model's experts one by one where it doesn't
spread the experts; published steps say 2 to 5 ms for each."""


def trained_by(job: Job, name: str, sends: Sends | None = None, zero: int | None = None) -> Job:
    """Return the job as a trainer runs it.

    sends, zero: instead of what the trainer does by default, such as "rows" for Megatron with DeepEP.
    Raises:
        ValueError: there is no such trainer, or it doesn't do that.
    """
    if name not in TRAINERS:
        raise ValueError(f"trainer must be one of {', '.join(TRAINERS)}, got {name!r}")
    of = TRAINERS[name]
    sends = of.sends if sends is None else sends
    if sends not in get_args(Sends):
        raise ValueError(f"sends must be one of {', '.join(get_args(Sends))}, got {sends!r}")
    if name == "ours" and sends != "rows":
        raise ValueError(
            "this package sends every row once to each rank that needs it: leave sends='pairs' out, or name another "
            "trainer"
        )
    return replace(
        job,
        trainer=name,
        sends_pairs=sends == "pairs",
        overlaps_exchange=of.overlaps_exchange,
        zero=of.zero if zero is None else zero,
        pair_passes=of.pair_passes / (1 if sends == "pairs" else 2),
        us_per_expert=of.us_per_expert,
    )
