"""Auxiliary losses: they keep the load balanced and the logits small."""

import torch
from torch import Tensor

from .router import Routing
from .statistics import expert_load

__all__ = ["load_balance_loss", "z_loss"]


def load_balance_loss(routing: Routing, num_experts: int) -> Tensor:
    """Give E * sum over e of f_e * P_e, a scalar that is 1.0 under uniform routing for any K.

    f_e is the fraction of the routed (not skipped) pairs that chose expert e, a constant to autograd; P_e is the
    mean over tokens of the score of e, normalised over experts. Switch Transformers' loss, divided by K.
    Tokens with a non-finite logit are left out. T = 0 gives 0, attached to the graph.
    """
    scores = routing.scores  # (T, E)
    if scores.shape[1] != num_experts:
        raise ValueError(f"num_experts is {num_experts}, and the routing has scores of {scores.shape[1]} experts")
    total = scores.sum(dim=1, keepdim=True)
    is_counted = total > 0  # False for NaN as well
    probabilities = torch.where(is_counted, scores, 0.0) / torch.where(is_counted, total, 1.0)
    mean_probability = probabilities.sum(dim=0) / is_counted.sum().clamp(min=1)
    load = expert_load(routing.topk_ids, num_experts).to(scores.dtype)
    fraction = load / load.sum().clamp(min=1)
    return num_experts * (fraction * mean_probability).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Give the mean over tokens of logsumexp(logits)**2, a scalar that keeps logits (T, E) small (ST-MoE).

    Rows with a non-finite logit are left out and get zero gradient. T = 0 gives 0, attached to the graph.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    is_finite = logits.isfinite().all(dim=1)
    log_z = torch.where(is_finite.unsqueeze(1), logits, 0.0).logsumexp(dim=1)
    return torch.where(is_finite, log_z.square(), 0.0).sum() / is_finite.sum().clamp(min=1)
