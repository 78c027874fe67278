"""Auxiliary losses: they keep the load balanced and the logits small."""

from collections.abc import Callable

import torch
from torch import Tensor

from tritonmoe.config.layer import MoEConfig
from tritonmoe.routing.statistics import reduce_counts
from tritonmoe.routing.token_routing import Routing

__all__ = ["auxiliary_loss", "load_balance_loss", "z_loss"]


def auxiliary_loss(
    routing: Routing, config: MoEConfig, reduce_load: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the weighted sum of the losses that a layer's config asks for, a scalar; zero where it asks for none.

    reduce_load: as in load_balance_loss; None balances this rank's tokens alone.
    """
    loss = routing.topk_weights.new_zeros(())
    if config.load_balance_loss_weight:
        balance = load_balance_loss(routing, config.num_experts, reduce_load=reduce_load)
        loss = loss + config.load_balance_loss_weight * balance
    if config.z_loss_weight:
        loss = loss + config.z_loss_weight * z_loss(routing.logits)
    return loss


def load_balance_loss(
    routing: Routing, num_experts: int, *, reduce_load: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return E * sum over e of f_e * P_e, a scalar that is 1.0 under uniform routing for any K.

    f_e is the fraction of the routed (not skipped) pairs that chose expert e, a constant to autograd; P_e is the
    mean over tokens of the score of e, normalised over experts. Switch Transformers' loss, divided by K.
    Tokens with a non-finite logit are left out. T = 0 gives 0, attached to the graph.

    With reduce_load, f_e is the fraction of all ranks' pairs, and P_e is the sum over this rank's tokens divided by
    their mean number N / W on the W ranks. The mean of the W losses is then E * sum over e of f_e * (the mean over all
    N tokens of the score of e): the loss of one device that has all tokens. The mean of the ranks' gradients is its
    gradient, since f_e is a constant, whatever the number of tokens of each rank. (A mean of the ranks' own losses is
    another one, because a loss is a product of two of its batch's means: it keeps every rank's batch balanced.)
    Where ranks have different numbers of tokens, one rank's loss means nothing by itself.

    Args:
        reduce_load: sums an (E + 2,) int64 tensor over data-parallel ranks and returns it (in place is fine), as
            Transport.all_reduce does; every rank calls it. None: this rank's pairs alone.
    Raises:
        ValueError: num_experts is not the router's. TypeError: reduce_load gave no counts.
    Example:
        E=2, K=1, scores (.75, .25) of rank 0's token and (.25, .75) of rank 1's: alone each has 2 * .75 = 1.5; with
        reduce_load f is (1/2, 1/2) and each has 1, as one device with both tokens.
    """
    scores = routing.scores  # (T, E)
    if scores.shape[1] != num_experts:
        raise ValueError(f"num_experts is {num_experts}, and the routing has scores of {scores.shape[1]} experts")
    total = scores.sum(dim=1, keepdim=True)
    is_counted = total > 0  # False for NaN as well
    probabilities = torch.where(is_counted, scores, 0.0) / torch.where(is_counted, total, 1.0)
    load, num_tokens, num_ranks = routing.load, is_counted.sum(), 1
    if reduce_load is not None:
        counts = torch.cat([load, num_tokens.view(1), torch.ones_like(load[:1])])
        load, num_tokens, num_ranks = reduce_counts(counts, reduce_load).split([num_experts, 1, 1])
    mean_probability = probabilities.sum(dim=0) / (num_tokens.clamp(min=1).to(scores.dtype) / num_ranks)
    load = load.to(scores.dtype)
    fraction = load / load.sum().clamp(min=1)
    return num_experts * (fraction * mean_probability).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)**2, a scalar that keeps logits (T, E) small (ST-MoE).

    Rows with a non-finite logit are left out and get zero gradient. T = 0 gives 0, attached to the graph.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    is_finite = logits.isfinite().all(dim=1)
    log_z = torch.where(is_finite.unsqueeze(1), logits, 0.0).logsumexp(dim=1)
    return torch.where(is_finite, log_z.square(), 0.0).sum() / is_finite.sum().clamp(min=1)
