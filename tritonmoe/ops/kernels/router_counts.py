"""How many tokens chose each expert, counted tile by tile; the tiles' counts are then added."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.ops.kernels.launch import cdiv, launch, next_power_of_2

__all__ = ["count_pairs"]

PAIRS_PER_TILE = 1024


@triton.jit(do_not_specialize=["T"])
def _count_pairs_kernel(
    topk_ids,  # (T, K) int64, contiguous
    counts,  # (tiles, E+1) int32
    T,
    E,
    K: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, BLOCK_K)
    is_token = (tokens < T)[:, None]
    is_pair = is_token & (slots < K)[None, :]
    ids = tl.load(topk_ids + tokens[:, None] * K + slots[None, :], mask=is_pair, other=-1).to(tl.int32)
    # A row without experts counts once, with its first slot; its others, and what is past the end, nowhere.
    bins = tl.where(ids >= 0, ids, tl.where(is_token & (slots == 0)[None, :], E, E + 1))
    bin_counts = tl.histogram(tl.reshape(bins, (BLOCK_T * BLOCK_K,)), NUM_BINS)
    places = tl.arange(0, NUM_BINS)
    tl.store(counts + tl.program_id(0).to(tl.int64) * (E + 1) + places, bin_counts, mask=places <= E)


def count_pairs(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Return (E+1,) int64: each expert's pairs, then rows without experts.

    topk_ids: (T, K) int64, contiguous; in [0, E), or -1 in a whole row.
    """
    num_tokens, top_k = topk_ids.shape
    block_k = next_power_of_2(top_k)
    block_t = PAIRS_PER_TILE // block_k
    num_tiles = cdiv(num_tokens, block_t)
    counts = topk_ids.new_empty(num_tiles, num_experts + 1, dtype=torch.int32)
    launch(
        _count_pairs_kernel,
        (num_tiles,),
        topk_ids,
        counts,
        num_tokens,
        num_experts,
        K=top_k,
        NUM_BINS=max(256, next_power_of_2(num_experts + 2)),  # tl.histogram wants one for each thread
        BLOCK_T=block_t,
        BLOCK_K=block_k,
    )
    return counts.sum(dim=0)
