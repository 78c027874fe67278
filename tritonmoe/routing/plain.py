"""The router in PyTorch's operations, which define what is right: logits, scores, and the choice of K experts."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.scores import SCORES
from tritonmoe.routing.statistics import expert_load
from tritonmoe.routing.token_routing import Routing
from tritonmoe.runtime.autograd import Context, without_autocast
from tritonmoe.runtime.transforms import is_transformed, refuse_jvp, refuse_vmap

__all__ = ["route_by_torch"]


class _RouterLogits(torch.autograd.Function):
    """(x (T, D), weight (E, D)) -> (logits (T, E), is_finite (T, 1)), in fp32 (fp64 for fp64 inputs).

    Rows with a non-finite logit give zeros to both gradients: plain autograd would give 0 * NaN. That is also why
    x is masked in backward only: masking before the product would need a second pass over x to find the rows.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
        with without_autocast(x.device):
            logits = F.linear(x.to(dtype), weight.to(dtype))
        return logits, logits.isfinite().all(dim=1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        is_finite = output[1]
        ctx.mark_non_differentiable(is_finite)
        ctx.save_for_backward(*inputs, is_finite)

    @staticmethod
    def backward(ctx: Context, dlogits: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, is_finite = ctx.saved_tensors
        dlogits = torch.where(is_finite, dlogits, 0.0)
        dx = dweight = None
        with without_autocast(x.device):
            if ctx.needs_input_grad[0]:
                dx = torch.where(is_finite, dlogits @ weight.to(dlogits.dtype), 0.0).to(x.dtype)
            if ctx.needs_input_grad[1]:
                finite_x = torch.where(is_finite, x.to(dlogits.dtype), 0.0)
                dweight = (dlogits.T @ finite_x).to(weight.dtype)
        return dx, dweight

    vmap = staticmethod(refuse_vmap)


class _TransformedRouterLogits(_RouterLogits):
    """The same under a transform of torch.func, which asks for a jvp; torch.compile takes no Function that has one."""

    jvp = staticmethod(refuse_jvp)


def route_by_torch(x: Tensor, weight: Tensor, selection_bias: Tensor | None, config: MoEConfig) -> Routing:
    """Return the routing of x (T, D) by weight (E, D) and selection_bias (E,), differentiable in x and weight."""
    is_eager = not torch.compiler.is_compiling()
    product = _TransformedRouterLogits if is_eager and is_transformed() else _RouterLogits
    logits, is_finite = product.apply(x, weight)
    finite_logits = torch.where(is_finite, logits, 0.0)
    scores = SCORES[config.score_function](finite_logits)

    ranked_by = finite_logits if config.softmax_after_topk else scores
    topk_ids = _select(ranked_by.detach(), selection_bias, config)
    topk_weights = ranked_by.gather(1, topk_ids)
    if config.softmax_after_topk:
        topk_weights = topk_weights.softmax(dim=1)
    elif config.renormalize:
        # as in DeepSeek-V3; it changes no bit of any sum above 1e-13, so softmax routers keep theirs
        topk_weights = topk_weights / (topk_weights.sum(dim=1, keepdim=True) + 1e-20)
    if config.routed_scaling_factor != 1.0:
        topk_weights = topk_weights * config.routed_scaling_factor

    topk_ids = torch.where(is_finite, topk_ids, -1)
    return Routing(
        topk_ids=topk_ids,
        topk_weights=torch.where(is_finite, topk_weights, 0.0),
        logits=logits,
        scores=torch.where(is_finite, scores, 0.0),
        num_nonfinite_rows=is_finite.logical_not().sum(),
        load=expert_load(topk_ids, config.num_experts),
    )


def _select(ranked_by: Tensor, selection_bias: Tensor | None, config: MoEConfig) -> Tensor:
    """Return the ids (T, K) of the best experts by `ranked_by` (T, E) plus the selection bias, best first."""
    if selection_bias is not None:
        ranked_by = ranked_by + selection_bias
    if config.top_k_groups < config.num_expert_groups:
        grouped = rearrange(ranked_by, "token (group expert) -> token group expert", group=config.num_expert_groups)
        group_scores = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
        group_ids = group_scores.topk(config.top_k_groups, dim=1).indices
        is_eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, group_ids, True)
        eligible = grouped.masked_fill(~is_eligible.unsqueeze(2), float("-inf"))
        ranked_by = rearrange(eligible, "token group expert -> token (group expert)")
    return ranked_by.topk(config.top_k, dim=1).indices
