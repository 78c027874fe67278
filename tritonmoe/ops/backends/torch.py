"""The seven operations in fast PyTorch, on any device: the CPU's default. Their contract: ops.py.

Callers hand over a block of pairs at a time (Grouping.blocks with MAX_BLOCK_PAIRS): the gathered rows, the product and
the activation of a block are read back while they are warm in cache, instead of one pass over all pairs per operation.
Products are written through `out=`, since fresh memory costs a CPU more (page faults) than arithmetic on it.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonmoe.config.activations import FusedActivation, find_activation, find_pointwise
from tritonmoe.config.layer import NO_WEIGHTS, ExpertLayout, KernelOptions, PerWeight, Projection
from tritonmoe.ops.backends.ops import (
    GradientOperands,
    WeightGrads,
    accumulation_dtype,
    apply_activation,
    required,
    split_gate,
)
from tritonmoe.ops.backends.packed_matrices import PackedMatrices
from tritonmoe.ops.backends.torch_grouping import group
from tritonmoe.ops.backends.torch_products import Matrices, expert_slices, outer_sums, pair_products
from tritonmoe.ops.grouping import Grouping

__all__ = ["copies_rows", "down", "down_grad", "gather_sum", "group", "up", "up_grad", "weight_grad"]

MAX_BLOCK_PAIRS: int | None = 768
"""Enough for an efficient product, few enough to stay in cache."""
SUM_BLOCK_TERMS = 768
"""gather_sum widens so many rows of a narrow dtype at a time."""
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
    if projection.scales is not None:
        return PackedMatrices(projection.weight, projection.scales, is_swapped)
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
    for h_of, a_of in _row_blocks(ELEMENTWISE_SIZE // width, h, a):
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
    skips = int(index.min()) < 0
    if weights is not None:
        weights = weights.to(acc)
    if y.dtype == acc:
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
    rows_per_block = max(1, SUM_BLOCK_TERMS // num_slots)
    given_weights = index if weights is None else weights  # a stand-in, never read
    for terms_of, index_of, weights_of, out_of in _row_blocks(rows_per_block, terms, index, given_weights, result):
        rows = y.index_select(0, terms_of.flatten()).view(-1, num_slots, width)
        if skips:
            rows.masked_fill_((index_of < 0).unsqueeze(2), 0)
        if weights is None:
            torch.sum(rows, 1, out=out_of)  # which adds up in fp32
        else:
            if skips:  # a skipped pair's weight may be NaN
                weights_of = weights_of.masked_fill(index_of < 0, 0)
            out_of.copy_(torch.bmm(weights_of.unsqueeze(1), rows.to(acc)).squeeze(1))
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
        ELEMENTWISE_SIZE // inner, scales, products, hidden, dh, dweights, scaled_a
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
