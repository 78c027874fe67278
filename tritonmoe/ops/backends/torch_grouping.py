"""The grouping of the torch backend: one stable sort on tensors, or for a few pairs a sort in Python."""

from array import array
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tritonmoe.ops.grouping import Grouping, RowSources

__all__ = ["group"]

FEW_PAIRS = 16
"""Up to so many pairs, which are those of one token, grouping in Python is faster than on tensors."""


def group(
    topk_ids: Tensor,
    num_experts: int,
    *,
    chunk_row_offsets: tuple[int, ...] | None = None,
    chunk_pair_offsets: tuple[int, ...] | None = None,
    row_sources: RowSources | None = None,
) -> Grouping:
    num_rows, top_k = topk_ids.shape
    device = topk_ids.device
    row_offsets = (0, num_rows) if chunk_row_offsets is None else tuple(chunk_row_offsets)
    num_chunks = len(row_offsets) - 1
    if num_chunks == 1 and topk_ids.numel() <= FEW_PAIRS and device.type == "cpu":
        return _group_few(topk_ids, num_experts)
    num_keys = num_chunks * num_experts
    keys = topk_ids
    if num_chunks > 1:  # a pair's key is chunk * E + expert; skipped pairs come last
        row_starts = torch.tensor(row_offsets[1:-1], device=device)
        chunk_of_row = torch.bucketize(torch.arange(num_rows, device=device), row_starts, right=True)
        skipped = (topk_ids < 0) | (topk_ids >= num_experts)
        keys = (keys + (chunk_of_row * num_experts)[:, None]).masked_fill_(skipped, num_keys)
    sorted_keys, order = torch.sort(keys.flatten(), stable=True)
    bounds = torch.arange(num_keys + 1, dtype=keys.dtype, device=device)
    starts = torch.searchsorted(sorted_keys, bounds, out_int32=True)
    host_starts = starts.tolist()
    # In one chunk, skipped pairs stand where their ids sort: before the first expert's and after the last one's.
    num_before = host_starts[0]
    if num_before:
        starts -= num_before
        host_starts = [start - num_before for start in host_starts]
    num_pairs = host_starts[-1]
    stored = order[num_before : num_before + num_pairs]
    positions = torch.arange(num_pairs, dtype=torch.int32, device=device)
    source_order = None
    expert_offsets, chunk_expert_offsets = starts, starts.unsqueeze(0)
    pair_offsets = host_starts[::num_experts]
    if num_chunks > 1:
        assert row_sources is not None
        # (C, E+1) windows of starts that share their borders, each from its own zero.
        chunk_expert_offsets = starts.unfold(0, num_experts + 1, num_experts) - starts[:-1:num_experts, None]
        for first, last in pairwise(pair_offsets):
            positions[first:last] -= first
        source_order = _order_by_source(sorted_keys[:num_pairs] % num_experts, stored // top_k, row_sources)
        expert_offsets = chunk_expert_offsets.sum(0, dtype=torch.int32)
    inverse = positions.new_empty(num_rows * top_k)
    if num_pairs < inverse.shape[0]:
        inverse.fill_(-1)
    inverse.scatter_(0, stored, positions)
    grouping = Grouping(
        pair_index=stored.to(torch.int32),
        expert_offsets=expert_offsets,
        inverse=inverse.view(num_rows, top_k),
        source_order=source_order,
        chunk_expert_offsets=chunk_expert_offsets,
        chunk_row_offsets=row_offsets,
        chunk_pair_offsets=tuple(pair_offsets),
    )
    if num_chunks == 1:
        grouping.__dict__["host_expert_offsets"] = host_starts  # read above; the property would read them once more
    return grouping


def _order_by_source(experts: Tensor, rows: Tensor, row_sources: RowSources) -> Tensor:
    """Return the pairs in storage order, whose experts and rows are given, in the order of (expert, source, token)."""
    # Storage already has ascending tokens within a source, so a stable sort by (expert, source) is enough.
    num_sources = max(row_sources.ranks) + 1
    by_source = experts * num_sources + row_sources.of_rows(rows.device)[rows]
    return torch.sort(by_source, stable=True)[1].to(torch.int32)


def _group_few(topk_ids: Tensor, num_experts: int) -> Grouping:
    """Group one chunk of few pairs in Python, which for those is faster than a dozen operations on tensors."""
    ids, top_k = topk_ids.flatten().tolist(), topk_ids.shape[1]
    order = sorted((pair for pair, expert in enumerate(ids) if 0 <= expert < num_experts), key=ids.__getitem__)
    counts, inverse = [0] * num_experts, [-1] * len(ids)
    for position, pair in enumerate(order):
        counts[ids[pair]] += 1
        inverse[pair] = position
    host_expert_offsets = [0, *accumulate(counts)]
    rows = [pair // top_k for pair in order]
    numbers = torch.frombuffer(array("i", host_expert_offsets + order + rows + inverse), dtype=torch.int32)
    expert_offsets, pair_index, row_index, inverse_index = numbers.split_with_sizes(
        [num_experts + 1, len(order), len(order), len(ids)]
    )
    grouping = Grouping(
        pair_index=pair_index,
        expert_offsets=expert_offsets,
        inverse=inverse_index.view(topk_ids.shape),
        source_order=None,
        chunk_expert_offsets=expert_offsets.unsqueeze(0),
        chunk_row_offsets=(0, topk_ids.shape[0]),
        chunk_pair_offsets=(0, len(order)),
    )
    experts = list(dict.fromkeys(ids[pair] for pair in order))
    host_counts = experts, [counts[e] for e in experts]
    grouping.__dict__.update(host_expert_offsets=host_expert_offsets, host_counts=host_counts, row_index=row_index)
    return grouping
