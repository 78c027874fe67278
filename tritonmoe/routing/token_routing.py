"""Routing: where tokens go, and the scores behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tritonmoe.routing.statistics import expert_load

__all__ = ["Routing", "check_token_mask", "join_routings"]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where T tokens go, and the scores behind it; made by TopKRouter.

    A token with a non-finite logit has ids -1, weights 0 and scores 0: its K pairs are skipped pairs.
    """

    topk_ids: Tensor
    """(T, K) int64 global expert ids, best first; -1 is a skipped pair."""
    topk_weights: Tensor
    """(T, K) fp32 weights of the chosen experts, differentiable; exactly 0 for skipped pairs."""
    logits: Tensor
    """(T, E) fp32, attached to the graph; non-finite values stay visible here and take no gradient."""
    scores: Tensor
    """(T, E) fp32: softmax or sigmoid of all logits, without the selection bias; differentiable."""
    num_nonfinite_rows: Tensor
    """() int64, on the device: how many tokens were skipped for a non-finite logit."""
    load: Tensor
    """(E,) int64: how many pairs chose each expert."""

    def of_tokens(self, is_token: Tensor) -> "Routing":
        """Return this without the rows where is_token (T,) is False: no experts, no part in a loss, load or statistics.

        They are as those without a finite score, logits -inf, but num_nonfinite_rows does not count them.
        """
        keep = is_token.unsqueeze(1)
        topk_ids = torch.where(keep, self.topk_ids, -1)
        return replace(
            self,
            topk_ids=topk_ids,
            topk_weights=torch.where(keep, self.topk_weights, 0.0),
            logits=torch.where(keep, self.logits, float("-inf")),
            scores=torch.where(keep, self.scores, 0.0),
            num_nonfinite_rows=(is_token & ~self.logits.isfinite().all(dim=1)).sum(),
            load=expert_load(topk_ids, self.load.shape[0]),
        )


def join_routings(parts: Sequence[Routing]) -> Routing:
    """Return the routing of all tokens of these parts of a batch, in their order."""
    if len(parts) == 1:
        return parts[0]
    sums = {name: torch.stack([getattr(part, name) for part in parts]).sum(dim=0) for name in _SUMMED}
    rows = [field.name for field in fields(Routing) if field.name not in _SUMMED]
    return Routing(**sums, **{name: torch.cat([getattr(part, name) for part in parts]) for name in rows})


_SUMMED = ("num_nonfinite_rows", "load")


def check_token_mask(token_mask: object, x: Tensor) -> None:
    """Raise TypeError or ValueError unless the mask says of each row of x whether it is a token."""
    if not isinstance(token_mask, Tensor) or token_mask.dtype != torch.bool:
        kind = token_mask.dtype if isinstance(token_mask, Tensor) else type(token_mask).__name__
        raise TypeError(f"token_mask must be a bool tensor, True for tokens, got {kind}: pass attention_mask != 0")
    if token_mask.shape != x.shape[:-1] or token_mask.device != x.device:
        raise ValueError(
            f"token_mask must say of each row of x whether it is a token, {tuple(x.shape[:-1])} on {x.device}, got "
            f"{tuple(token_mask.shape)} on {token_mask.device}"
        )
