"""Every score function of the router: its name, and what it makes of logits.

ops/kernels/scores.py has two kernel functions for each name, the value and its backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SCORES", "ScoreName", "check_score"]

ScoreName = Literal["softmax", "sigmoid", "sqrtsoftplus"]

LEAST_SOFTPLUS = -80.0
"""Below it fp32 rounds the softplus of a logit to its exponential, and soon to zero, at which a root has no slope."""


def _sqrtsoftplus(logits: Tensor) -> Tensor:
    least = (0.5 * logits.clamp(max=LEAST_SOFTPLUS)).exp()  # finite everywhere, for the slopes of what is not taken
    is_least = logits < LEAST_SOFTPLUS
    return torch.where(is_least, least, F.softplus(logits.masked_fill(is_least, 0.0)).sqrt())


SCORES: dict[ScoreName, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
}
"""From logits (T, E) to scores (T, E), of which none is negative."""


def check_score(name: object) -> None:
    """Raise ValueError unless `name` is one of a score function."""
    if not isinstance(name, str) or name not in SCORES:
        names = ", ".join(map(repr, get_args(ScoreName)))
        raise ValueError(f"score_function must be one of {names}, got {name!r}")
