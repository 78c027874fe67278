"""What published steps took over what is predicted for them: the error of the model itself, beside that of its numbers.

Fitted by `python -m bench.plan_steps` to every published step that it has; there each family of rows is predicted with
the error that the other families say.
"""

from dataclasses import dataclass

__all__ = ["MODEL_ERROR", "ModelError"]


@dataclass(frozen=True)
class ModelError:
    """The logarithm of measured over predicted, beyond what the estimates' own spreads explain."""

    bias: float
    """Its middle."""
    faster: float
    slower: float
    """The standard deviations, below the middle and above it, of what all runs of one publication share: its code, its
    cluster, its care. What goes wrong makes a run slower."""
    own: float
    """The standard deviation of one run about that."""

    def log_factor(self, common: float, own: float) -> float:
        """Return the logarithm of a draw, from two standard normal numbers."""
        return self.bias + (self.slower if common > 0 else self.faster) * common + self.own * own


MODEL_ERROR = ModelError(bias=0.01, faster=0.09, slower=0.5, own=0.17)
