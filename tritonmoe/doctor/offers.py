"""What would help a run of any trainer: changes that a walk of its graph says would make its steps shorter."""

from dataclasses import dataclass

from tritonmoe.doctor.attribution import Cost

__all__ = ["Offer"]


@dataclass(frozen=True)
class Offer:
    """Something to change, and what it would gain."""

    words: str
    price: str
    """What it costs, or what is not in the gain; empty where nothing is known."""
    gain: Cost
