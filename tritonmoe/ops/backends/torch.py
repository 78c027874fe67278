"""The seven operations in fast PyTorch, on any device: the CPU's default. Their contract: ops.py.

Callers hand over a block of pairs at a time (Grouping.blocks with MAX_BLOCK_PAIRS): the gathered rows, the product and
the activation of a block are read back while they are warm in cache, instead of one pass over all pairs per operation.
Products are written through `out=`, since fresh memory costs a CPU more (page faults) than arithmetic on it. On a GPU
everything is done for more pairs at a time, and only group() reads the device, and products of few pairs per expert.
"""

from array import array
from collections.abc import Iterable
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonmoe.config.activations import FusedActivation, find_activation, find_pointwise
from tritonmoe.config.layer import NO_WEIGHTS, ExpertLayout, KernelOptions, PerWeight, Projection
from tritonmoe.ops.backends.fetched_matrices import fetched_matrices
from tritonmoe.ops.backends.ops import (
    GradientOperands,
    WeightGrads,
    accumulation_dtype,
    apply_activation,
    at_a_time,
    required,
    split_gate,
)
from tritonmoe.ops.backends.torch_products import Matrices, expert_slices, outer_sums, pair_products
from tritonmoe.ops.grouping import Grouping, RowSources
from tritonmoe.runtime.cpu_threads import for_each
from tritonmoe.runtime.expert_blocks import copies_late

__all__ = ["copies_rows", "down", "down_grad", "gather_sum", "group", "up", "up_grad", "weight_grad"]

MAX_BLOCK_PAIRS: int | None = 768
"""Enough for an efficient product, few enough to stay in cache."""
SUM_BLOCK_TERMS = 768
"""gather_sum widens so many rows of a narrow dtype at a time."""
FEW_PAIRS = 16
"""Up to so many pairs, which are those of one token, grouping in Python is faster than on tensors."""
ELEMENTWISE_SIZE = 2**20
"""Activations are computed for so many elements at a time, so that their temporaries stay in the innermost caches."""


def copies_rows() -> bool:
    return False  # not those of a whole chunk, only those of a block


def _in_out(projection: Projection) -> Matrices:
    """Return the experts' weights as (E, in, out) of the forward product."""
    return _matrices(projection, is_swapped=not projection.layout.transposed)


def _out_in(projection: Projection) -> Matrices:
    return _matrices(projection, is_swapped=projection.layout.transposed)


def _matrices(projection: Projection, is_swapped: bool) -> Matrices:
    fetched = fetched_matrices(projection.weight, projection.scales, is_swapped)
    if fetched is not None:
        return fetched
    return projection.weight.mT if is_swapped else projection.weight


def _gathered(grouping: Grouping) -> Tensor | None:
    """Return which row each pair takes; None where that is the one in its place."""
    return None if grouping.rows_are_pairs else grouping.row_index


def _products(
    values: Tensor, index: Tensor | None, projection: Projection, grouping: Grouping, out: Tensor | None
) -> Tensor:
    """Return pair_products() of the forward."""
    return pair_products(values, index, _in_out(projection), projection.bias, grouping, out, projection.addend)


def up(
    x: Tensor,
    projection: Projection,
    grouping: Grouping,
    activation: FusedActivation | None,
    *,
    needs_h: bool = True,
    out_h: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> tuple[Tensor | None, Tensor | None]:
    layout = projection.layout
    width = projection.shape[2 if layout.transposed else 1]
    acc = accumulation_dtype(x.dtype)
    h = _products(x, _gathered(grouping), projection, grouping, out_h)
    if activation is None:
        return h, None
    a = x.new_empty(grouping.num_pairs, layout.intermediate_size(width))
    for h_of, a_of in _row_blocks(at_a_time(ELEMENTWISE_SIZE, x.device) // width, h, a):
        _activate(h_of.to(acc), layout, activation, a_of)
    return (h if needs_h or out_h is not None else None), a


def _row_blocks(num_rows: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cut tensors along their rows, at most num_rows (at least one) to a block.

    One block is the tensors themselves: views are a good part of what a small call costs.
    """
    if tensors[0].shape[0] <= num_rows:
        return [tensors]
    return zip(*(tensor.split(max(1, num_rows)) for tensor in tensors), strict=True)


def _activate(h: Tensor, layout: ExpertLayout, activation: FusedActivation, out: Tensor) -> None:
    if activation == "silu" and layout.gated:
        gate, up_half = split_gate(h, layout)
        if out.dtype == h.dtype:
            torch.mul(F.silu(gate), up_half, out=out)
        else:
            out.copy_(F.silu(gate, inplace=True).mul_(up_half))  # h is a widened copy of what the caller has
    else:
        out.copy_(apply_activation(h, layout, activation))


def down(
    a: Tensor,
    projection: Projection,
    grouping: Grouping,
    *,
    out: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> Tensor:
    return _products(a, None, projection, grouping, out)


def gather_sum(y: Tensor, index: Tensor, weights: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    num_rows, num_slots = index.shape
    width = y.shape[1]
    result = y.new_empty(num_rows, width) if out is None else out
    if index.numel() == 0:
        return result.zero_()
    acc = accumulation_dtype(y.dtype)
    is_late = copies_late(y.device)
    skips = is_late or int(index.min()) < 0  # a GPU would have to be waited for
    if weights is not None:
        weights = weights.to(acc)
    if y.dtype == acc and not is_late:
        # embedding_bag is PyTorch's fused gather-sum, in slot order.
        terms, starts = index.flatten(), torch.arange(0, index.numel(), num_slots, device=y.device)
        if skips:
            present = index >= 0
            terms = index[present]
            weights = None if weights is None else weights[present]
            ends = torch.cumsum(present.sum(1), 0)
            starts = torch.cat([ends.new_zeros(1), ends[:-1]])
            if terms.shape[0] == 0:
                return result.zero_()
        scales = None if weights is None else weights.flatten()
        sums = torch.embedding_bag(y, terms.long(), starts, False, 0, False, scales)[0]  # 0: sum
        return result.copy_(sums)
    if y.shape[0] == 0:
        return result.zero_()
    # It would round the weights and the sum to a narrow dtype: widen the rows of a block instead.
    terms = index.clamp(min=0) if skips else index
    rows_per_block = max(1, at_a_time(SUM_BLOCK_TERMS, y.device) // num_slots)
    given_weights = index if weights is None else weights  # a stand-in, never read

    def sum_block(block: tuple[Tensor, ...]) -> None:
        terms_of, index_of, weights_of, out_of = block
        rows = y.index_select(0, terms_of.flatten()).view(-1, num_slots, width)
        if skips:
            rows.masked_fill_((index_of < 0).unsqueeze(2), 0)
        if weights is None:
            torch.sum(rows, 1, out=out_of)  # which adds up in fp32
        else:
            if skips:  # a skipped pair's weight may be NaN
                weights_of = weights_of.masked_fill(index_of < 0, 0)
            out_of.copy_(torch.bmm(weights_of.unsqueeze(1), rows.to(acc)).squeeze(1))

    for_each(sum_block, list(_row_blocks(rows_per_block, terms, index, given_weights, result)), y.device)
    return result


def down_grad(
    dout: Tensor,
    projection: Projection,
    hidden: Tensor,
    topk_weights: Tensor,
    grouping: Grouping,
    activation: FusedActivation | None,
    *,
    out: tuple[Tensor | None, Tensor | None] = (None, None),
    options: KernelOptions = KernelOptions(),
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(dout.dtype)
    _, down_bias, layout, addend, *_ = projection
    out_dh, out_scaled_a = out
    inner = projection.shape[1 if layout.transposed else 2]
    dh = torch.empty_like(hidden) if out_dh is None else out_dh
    scaled_a = dout.new_empty(grouping.num_pairs, inner) if out_scaled_a is None else out_scaled_a
    dweights = torch.empty(grouping.num_pairs, dtype=acc, device=dout.device)
    scales = topk_weights.flatten().index_select(0, grouping.pair_index).to(acc).unsqueeze(1)
    in_place = addend if addend is out_scaled_a else None  # whose memory is written once more when all is read
    products = pair_products(dout, _gathered(grouping), _out_in(projection), None, grouping, in_place, addend)
    for scale, product, hidden_of, dh_of, dweights_of, scaled_a_of in _row_blocks(
        at_a_time(ELEMENTWISE_SIZE, dout.device) // inner, scales, products, hidden, dh, dweights, scaled_a
    ):
        g = product.to(acc)
        da = g * scale
        if activation is None:
            a = hidden_of.to(acc)
            dh_of.copy_(da)
        else:
            a = _activation_backward(hidden_of.to(acc), da, layout, activation, dh_of)
        torch.sum(g.mul_(a), 1, out=dweights_of)
        if a.dtype == dout.dtype:
            torch.mul(a, scale, out=scaled_a_of)
        else:
            scaled_a_of.copy_(a * scale)
    if down_bias is not None:
        rows = dout.index_select(0, grouping.row_index)
        for e, positions in expert_slices(grouping):
            # not @, which autocast would narrow
            dweights[positions] += (rows[positions].to(acc) * down_bias[e].to(acc)).sum(1)
    return dh, scaled_a, dweights


def _activation_backward(
    h: Tensor, da: Tensor, layout: ExpertLayout, activation: FusedActivation, out: Tensor
) -> Tensor:
    """Write dh for da into `out` and give a = act(h), both from h (n, 2F) in the accumulation dtype."""
    if not layout.gated:
        pointwise = find_pointwise(activation)
        out.copy_(pointwise.backward(da, h))
        return pointwise.value(h)
    return find_activation(activation).gated_backward(da, *split_gate(h, layout), *split_gate(out, layout))


def up_grad(
    dh: Tensor,
    projection: Projection,
    grouping: Grouping,
    *,
    out: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> Tensor:
    return pair_products(dh, None, _out_in(projection), None, grouping, out, projection.addend)


def weight_grad(
    grouping: Grouping,
    layout: ExpertLayout,
    operands: GradientOperands,
    needs: PerWeight[bool],
    *,
    accumulate: PerWeight[Tensor | None] = NO_WEIGHTS,
    options: KernelOptions = KernelOptions(),
) -> WeightGrads:
    order = grouping.source_order
    dw1 = db1 = dw2 = db2 = None
    if needs.gate_up_proj:
        dh, x = required(operands.dh), required(operands.x)
        dw1 = outer_sums(dh, x, grouping, not layout.transposed, accumulate.gate_up_proj)
    if needs.down_proj:
        scaled_a, dout = required(operands.scaled_a), required(operands.dout)
        dw2 = outer_sums(scaled_a, dout, grouping, layout.transposed, accumulate.down_proj)
    if needs.gate_up_bias:
        dh = required(operands.dh)
        db1 = dh.new_zeros(grouping.num_experts, dh.shape[1])
        for e, positions in expert_slices(grouping):
            values = dh[positions] if order is None else dh.index_select(0, order[positions])
            db1[e] = values.sum(0, dtype=accumulation_dtype(dh.dtype))
    if needs.down_bias:
        dout, topk_weights = required(operands.dout), required(operands.topk_weights)
        acc = accumulation_dtype(dout.dtype)
        db2 = dout.new_zeros(grouping.num_experts, dout.shape[1])
        pair_index = grouping.pair_index if order is None else grouping.pair_index.index_select(0, order)
        scales = topk_weights.flatten().index_select(0, pair_index).to(acc).unsqueeze(1)
        rows = torch.div(pair_index, grouping.top_k, rounding_mode="floor")
        for e, positions in expert_slices(grouping):
            db2[e] = (dout.index_select(0, rows[positions]).to(acc) * scales[positions]).sum(0)
    return WeightGrads(dw1, db1, dw2, db2)


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
    # Read above; the properties would read them once more.
    if num_chunks == 1:
        vars(grouping)["host_expert_offsets"] = host_starts
    else:
        starts_of_chunks = (host_starts[first : first + num_experts + 1] for first in range(0, num_keys, num_experts))
        host_offsets = [[start - of[0] for start in of] for of in starts_of_chunks]
        vars(grouping)["host_chunk_offsets"] = host_offsets
        vars(grouping)["host_expert_offsets"] = [sum(of_expert) for of_expert in zip(*host_offsets, strict=True)]
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
