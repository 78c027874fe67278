"""The router's kernels put together: logits, the choice of experts and their counts; and the gradients.

The product stands in a kernel of its own: the choice needs a token's whole row of logits, which for many experts no
tile of a product holds, and logits are stored in any case, for the losses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.routing import RoutingRule
from tritonmoe.ops.kernels.router_choice import choose_experts
from tritonmoe.ops.kernels.router_choice_grad import choice_grad
from tritonmoe.ops.kernels.router_counts import count_pairs
from tritonmoe.ops.kernels.router_products import router_logits, tokens_grad, weight_grad

__all__ = ["Routed", "route", "route_grad"]


class Routed(NamedTuple):
    """What route() gives; tokens with a non-finite logit have ids -1, weights 0 and scores 0."""

    logits: Tensor
    """(T, E) fp32."""
    scores: Tensor
    """(T, E) fp32."""
    topk_ids: Tensor
    """(T, K) int64, best first."""
    topk_weights: Tensor
    """(T, K) fp32."""
    counts: Tensor
    """(E+1,) int64: each expert's pairs, then tokens with a non-finite logit."""


def route(x: Tensor, weight: Tensor, selection_bias: Tensor | None, rule: RoutingRule) -> Routed:
    """Choose K experts for each token: x (T, D) and weight (E, D) in fp32, bf16 or fp16, selection_bias (E,) fp32."""
    logits = router_logits(x, weight)
    scores, topk_ids, topk_weights = choose_experts(logits, selection_bias, rule)
    return Routed(logits, scores, topk_ids, topk_weights, count_pairs(topk_ids, weight.shape[0]))


def route_grad(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    rule: RoutingRule,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and weight, in their dtypes; None for one that isn't needed.

    Args:
        x, weight: of the forward. scores, topk_ids, topk_weights: as it gave them.
        grads: of the logits (T, E), the scores (T, E) and the weights (T, K); None for one that there is not.
    """
    # In one bf16 the logits' gradient would lose bits that plain PyTorch keeps. As two it doesn't, and matrix units
    # multiply them. Two in fp16 would: small gradients vanish there.
    in_bf16 = x.dtype == weight.dtype == torch.bfloat16
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    dlogits = choice_grad(scores, topk_ids, topk_weights, grads, rule, dtype)
    dx = tokens_grad(dlogits, weight, topk_ids, x.dtype) if needs[0] else None
    dweight = weight_grad(dlogits, x, topk_ids, weight) if needs[1] else None
    return dx, dweight
