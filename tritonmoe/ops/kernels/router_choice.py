"""From logits to scores, and ids and weights of K experts; one warp holds a token's row of logits in its registers.

So no reduction over a row's experts waits for another warp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.config.routing import RoutingRule
from tritonmoe.ops.kernels.launch import INTERPRETED, cdiv, launch, next_power_of_2
from tritonmoe.ops.kernels.scores import score_function

__all__ = ["choose_experts", "row_block"]

_TAKEN = tl.constexpr(-(2**31))
"""Below the key of every number: of experts that were chosen already, and of columns behind the last."""
_LEAST = tl.constexpr(-(2**31) + 0x7FFFFF)
"""The key of minus infinity."""


@triton.jit
def _order_key(values):
    """Return int32 that compare as these fp32 do; the two zeros are equal."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _best_column(keys, columns, NUM_COLUMNS: tl.constexpr):
    """Return each row's column of the largest key; of equal ones the first."""
    best = tl.max(keys, 1)
    return tl.min(tl.where(keys == best[:, None], columns[None, :], NUM_COLUMNS), 1)


@triton.jit
def _is_eligible(
    ranked_by,  # (BLOCK_T, BLOCK_E) fp32
    groups,  # (BLOCK_E,): the group of each expert
    group_size,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Return which experts are in the TOP_GROUPS groups with the largest sum of their two best."""
    experts = tl.arange(0, BLOCK_E)
    group_columns = tl.arange(0, BLOCK_G)
    keys = tl.full((BLOCK_T, BLOCK_G), _TAKEN, tl.int32)
    for group in range(NUM_GROUPS):
        of_group = tl.where((groups == group)[None, :], ranked_by, float("-inf"))
        score = tl.max(of_group, 1)
        if group_size > 1:
            best = _best_column(_order_key(of_group), experts, BLOCK_E)
            score += tl.max(tl.where(experts[None, :] == best[:, None], float("-inf"), of_group), 1)
        keys = tl.where((group_columns == group)[None, :], _order_key(score)[:, None], keys)
    eligible = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for _ in range(TOP_GROUPS):
        chosen = _best_column(keys, group_columns, BLOCK_G)
        eligible = tl.where(groups[None, :] == chosen[:, None], 1, eligible)
        keys = tl.where(group_columns[None, :] == chosen[:, None], _TAKEN, keys)
    return eligible > 0


@triton.jit(do_not_specialize=["T"])
def _choose_experts_kernel(
    logits,  # (T, E) fp32
    selection_bias,  # (E,) fp32 or None
    scores,  # (T, E) fp32
    topk_ids,  # (T, K) int64
    topk_weights,  # (T, K) fp32
    scaling,
    T,
    E,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    SOFTMAX_AFTER_TOPK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    is_token, is_expert = tokens < T, (experts < E)[None, :]
    mask = is_token[:, None] & is_expert
    places = tokens[:, None] * E + experts[None, :]
    values = tl.load(logits + places, mask=mask, other=0.0)
    # abs(NaN) < inf is false
    is_finite = tl.min((tl.abs(values) < float("inf")).to(tl.int32), 1) > 0
    values = tl.where(is_finite[:, None], values, 0.0)
    score = SCORE(values, is_expert)
    tl.store(scores + places, tl.where(is_finite[:, None], score, 0.0), mask=mask)

    weighed_by = values if SOFTMAX_AFTER_TOPK else score
    ranked_by = weighed_by
    if selection_bias is not None:
        ranked_by += tl.load(selection_bias + experts, mask=experts < E, other=0.0)[None, :]
    keys = _order_key(ranked_by)
    if TOP_GROUPS < NUM_GROUPS:
        group_size = E // NUM_GROUPS
        eligible = _is_eligible(
            ranked_by, experts // group_size, group_size, NUM_GROUPS, TOP_GROUPS, BLOCK_T, BLOCK_E, BLOCK_G
        )
        keys = tl.where(eligible, keys, _LEAST)
    keys = tl.where(is_expert, keys, _TAKEN)

    slots = tl.arange(0, BLOCK_K)
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    chosen = tl.full((BLOCK_T, BLOCK_K), float("-inf") if SOFTMAX_AFTER_TOPK else 0.0, tl.float32)
    for slot in range(K):
        best = _best_column(keys, experts, BLOCK_E)
        is_best = experts[None, :] == best[:, None]
        is_slot = (slots == slot)[None, :]
        ids = tl.where(is_slot, best[:, None], ids)
        chosen = tl.where(is_slot, tl.sum(tl.where(is_best, weighed_by, 0.0), 1)[:, None], chosen)
        keys = tl.where(is_best, _TAKEN, keys)

    if SOFTMAX_AFTER_TOPK:
        powers = tl.exp(chosen - tl.max(chosen, 1)[:, None])
        chosen = powers / tl.sum(powers, 1)[:, None]
    elif RENORMALIZE:
        chosen = chosen / (tl.sum(chosen, 1) + 1e-20)[:, None]
    pairs = tokens[:, None] * K + slots[None, :]
    pair_mask = is_token[:, None] & (slots < K)[None, :]
    tl.store(topk_ids + pairs, tl.where(is_finite[:, None], ids, -1).to(tl.int64), mask=pair_mask)
    tl.store(topk_weights + pairs, tl.where(is_finite[:, None], chosen * scaling, 0.0), mask=pair_mask)


def row_block(num_experts: int) -> dict[str, int]:
    """Return how many tokens and experts the one warp of a program holds: 8 or 16 values in a thread, or one token's.

    Of the fewest experts 16 tokens: 32 would spill with Triton 3.6.
    """
    block_e = max(16, next_power_of_2(num_experts))
    return {"BLOCK_T": 32 if INTERPRETED else max(1, min(16, 512 // block_e)), "BLOCK_E": block_e, "num_warps": 1}


def choose_experts(logits: Tensor, selection_bias: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor, Tensor]:
    """Choose K experts for each row of logits.

    Args:
        logits: (T, E) fp32, contiguous. A row with a non-finite one has no experts.
        selection_bias: (E,) fp32, contiguous, added for the choice alone; or None.
    Returns:
        scores (T, E) fp32; topk_ids (T, K) int64, best first, of equal ones the smaller id, -1 in rows without experts;
        topk_weights (T, K) fp32. Scores and weights are 0 in rows without experts.
    """
    num_tokens, num_experts = logits.shape
    block = row_block(num_experts)
    scores = torch.empty_like(logits)
    topk_ids = logits.new_empty(num_tokens, rule.top_k, dtype=torch.int64)
    topk_weights = logits.new_empty(num_tokens, rule.top_k)
    launch(
        _choose_experts_kernel,
        (cdiv(num_tokens, block["BLOCK_T"]),),
        logits,
        selection_bias,
        scores,
        topk_ids,
        topk_weights,
        rule.routed_scaling_factor,
        num_tokens,
        num_experts,
        K=rule.top_k,
        SCORE=score_function(rule.score_function),
        SOFTMAX_AFTER_TOPK=rule.softmax_after_topk,
        RENORMALIZE=rule.renormalize,
        NUM_GROUPS=rule.num_expert_groups,
        TOP_GROUPS=rule.top_k_groups,
        BLOCK_K=max(2, next_power_of_2(rule.top_k)),
        BLOCK_G=max(2, next_power_of_2(rule.num_expert_groups)),
        **block,
    )
    return scores, topk_ids, topk_weights
