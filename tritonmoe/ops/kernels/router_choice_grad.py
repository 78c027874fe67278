"""Backward through the choice of experts: the gradient of the logits, of those of weights, scores and logits."""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.config.routing import RoutingRule
from tritonmoe.ops.kernels.arithmetic import round_to
from tritonmoe.ops.kernels.launch import cdiv, launch, next_power_of_2
from tritonmoe.ops.kernels.router_choice import row_block
from tritonmoe.ops.kernels.scores import score_gradient

__all__ = ["choice_grad"]


@triton.jit(do_not_specialize=["T"])
def _choice_grad_kernel(
    scores,  # (T, E) fp32
    topk_ids,  # (T, K) int64
    topk_weights,  # (T, K) fp32
    dweights,  # (T, K) or None
    dscores,  # (T, E) or None
    dlogits,  # (T, E) or None
    out,  # (T, PARTS * E): the sum; two parts are what it is rounded to, and what that leaves
    scaling,
    T,
    E,
    stride_dweights_row,
    stride_dweights_slot,
    stride_dscores_row,
    stride_dscores_expert,
    stride_dlogits_row,
    stride_dlogits_expert,
    K: tl.constexpr,
    SCORE_GRAD: tl.constexpr,
    SOFTMAX_AFTER_TOPK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    is_token = tokens < T
    mask = is_token[:, None] & (experts < E)[None, :]
    is_routed = tl.load(topk_ids + tokens * K, mask=is_token, other=-1) >= 0
    routed_mask = mask & is_routed[:, None]
    score = tl.load(scores + tokens[:, None] * E + experts[None, :], mask=mask, other=0.0)
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)  # of the scores
    direct = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)  # of the logits
    if dscores is not None:
        pointers = dscores + tokens[:, None] * stride_dscores_row + experts[None, :] * stride_dscores_expert
        grad += tl.load(pointers, mask=routed_mask, other=0.0).to(tl.float32)
    if dlogits is not None:
        pointers = dlogits + tokens[:, None] * stride_dlogits_row + experts[None, :] * stride_dlogits_expert
        direct += tl.load(pointers, mask=routed_mask, other=0.0).to(tl.float32)
    if dweights is not None:
        slots = tl.arange(0, BLOCK_K)
        pair_mask = is_routed[:, None] & (slots < K)[None, :]
        pairs = tokens[:, None] * K + slots[None, :]
        ids = tl.load(topk_ids + pairs, mask=pair_mask, other=-1)
        pointers = dweights + tokens[:, None] * stride_dweights_row + slots[None, :] * stride_dweights_slot
        dchosen = tl.load(pointers, mask=pair_mask, other=0.0).to(tl.float32)
        if SOFTMAX_AFTER_TOPK:  # weights are `scaling` times a softmax of the chosen logits
            weights = tl.load(topk_weights + pairs, mask=pair_mask, other=0.0)
            dchosen = weights * (dchosen - tl.sum(weights * dchosen, 1)[:, None] / scaling)
        elif RENORMALIZE:
            chosen = tl.load(scores + tokens[:, None] * E + ids, mask=pair_mask, other=0.0)
            total = tl.sum(chosen, 1)[:, None] + 1e-20
            dchosen = scaling * (dchosen - tl.sum(chosen * dchosen, 1)[:, None] / total) / total
        else:
            dchosen *= scaling
        for slot in range(K):
            is_slot = (slots == slot)[None, :]
            expert = tl.sum(tl.where(is_slot, ids, 0), 1)
            dslot = tl.sum(tl.where(is_slot, dchosen, 0.0), 1)
            term = tl.where(experts[None, :] == expert[:, None], dslot[:, None], 0.0)
            if SOFTMAX_AFTER_TOPK:
                direct += term
            else:
                grad += term
    grad = tl.where(is_routed[:, None], SCORE_GRAD(grad, score) + direct, 0.0)
    dtype: tl.constexpr = out.dtype.element_ty
    places = tokens[:, None] * (PARTS * E) + experts[None, :]
    rounded = round_to(grad, dtype)
    tl.store(out + places, rounded, mask=mask)
    if PARTS == 2:
        tl.store(out + places + E, round_to(grad - rounded.to(tl.float32), dtype), mask=mask)


def choice_grad(
    scores: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    rule: RoutingRule,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of the logits, zero in rows without experts.

    Args:
        scores, topk_ids, topk_weights: of choose_experts, contiguous.
        grads: of the logits (T, E), the scores (T, E) and the weights (T, K); None for one that there is not.
        dtype: fp32, or bf16, of which two numbers stand for each: what it is rounded to, and what that leaves.
    Returns:
        (T, E) fp32, or (T, 2E) bf16: in the first E columns what was rounded, in the others what was left.
    """
    num_tokens, num_experts = scores.shape
    parts = 1 if dtype == torch.float32 else 2
    out = scores.new_empty(num_tokens, parts * num_experts, dtype=dtype)
    block = row_block(num_experts)
    dlogits, dscores, dweights = grads
    strides = [(0, 0) if grad is None else grad.stride() for grad in (dweights, dscores, dlogits)]
    launch(
        _choice_grad_kernel,
        (cdiv(num_tokens, block["BLOCK_T"]),),
        scores,
        topk_ids,
        topk_weights,
        dweights,
        dscores,
        dlogits,
        out,
        rule.routed_scaling_factor,
        num_tokens,
        num_experts,
        *itertools.chain(*strides),
        K=rule.top_k,
        SCORE_GRAD=score_gradient(rule.score_function),
        SOFTMAX_AFTER_TOPK=rule.softmax_after_topk,
        RENORMALIZE=rule.renormalize,
        PARTS=parts,
        BLOCK_K=max(2, next_power_of_2(rule.top_k)),
        **block,
    )
    return out
