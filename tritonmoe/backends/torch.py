"""The seven operations in fast PyTorch, on any device: the CPU's default. See reference.py for their contracts.

Made for callers that hand over a block of pairs at a time (Grouping.blocks with MAX_BLOCK_PAIRS): the gathered rows,
the product and the activation of a block are read back while they are warm in cache, instead of one pass over all pairs
per step. Products are written through `out=`, since fresh memory costs a CPU more (page faults) than arithmetic on it.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cpu_memory
from ..config import ClampedSwiGLU, ExpertLayout, FusedActivation, KernelOptions
from ..grouping import Grouping, RowSources
from .reference import WeightGrads, accumulation_dtype, apply_activation, split_gate

__all__ = ["combine", "down", "down_grad", "group", "up", "up_grad", "weight_grad"]

MAX_BLOCK_PAIRS: int | None = 768
"""Callers hand over so many pairs at a time: enough for an efficient product, few enough to stay in cache."""
SMALL_PAIRS_PER_EXPERT = 32
"""Up to so many pairs per expert, products go through PyTorch's grouped_mm."""
COMBINE_BLOCK_TERMS = 768
"""Rows of a narrow dtype that combine widens at a time."""
ELEMENTWISE_SIZE = 2**20
"""Elements that activations take at a time, so that their temporaries stay in the innermost caches."""


class _Matrices:
    """The experts' weights as (E, in, out)."""

    def __init__(self, stacked: Tensor) -> None:
        self.stacked = stacked

    @cached_property
    def each(self) -> tuple[Tensor, ...]:
        return self.stacked.unbind(0)


def _in_out(weight: Tensor, layout: ExpertLayout) -> _Matrices:
    return _Matrices(weight if layout.transposed else weight.mT)


def _out_in(weight: Tensor, layout: ExpertLayout) -> _Matrices:
    return _Matrices(weight.mT if layout.transposed else weight)


def _is_small(grouping: Grouping, *operands: Tensor) -> bool:
    """Say whether the experts have so few pairs each that PyTorch's grouped_mm pays, and whether it takes these.

    Its loop over the experts costs less than ours, which shows where the products are short; it allocates its result,
    which would show where they are long. It takes rows of whole 16 bytes.
    """
    num_pairs = grouping.host_expert_offsets[-1]
    if not 0 < num_pairs <= SMALL_PAIRS_PER_EXPERT * grouping.num_experts:
        return False
    for operand in operands:
        size = operand.itemsize
        if operand.device.type != "cpu" or operand.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        if operand.data_ptr() % 16 or operand.shape[-1] * size % 16:
            return False
        if any(stride != 1 and stride * size % 16 for stride in operand.stride()):
            return False
    return True


def _products(
    values: Tensor, matrices: _Matrices, bias: Tensor | None, grouping: Grouping, out: Tensor | None
) -> Tensor:
    """Multiply all pairs' values (N, in) by their experts' matrices, and add the experts' bias: (N, out)."""
    if bias is None and _is_small(grouping, values, matrices.stacked):
        product = F.grouped_mm(values, matrices.stacked, offs=grouping.expert_offsets[1:])
        return product if out is None else out.copy_(product)
    if out is None:
        out = values.new_empty(values.shape[0], matrices.stacked.shape[2])
    counts = [last - first for first, last in pairwise(grouping.host_expert_offsets)]
    for e, (part, target) in enumerate(zip(values.split(counts), out.split(counts), strict=True)):
        if counts[e] == 0:
            continue
        if bias is None:
            torch.mm(part, matrices.each[e], out=target)
        else:
            torch.addmm(bias[e], part, matrices.each[e], out=target)
    return out


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
        # Storage already has ascending tokens within a source, so a stable sort by (expert, source) is enough.
        num_sources = max(row_sources.ranks) + 1
        row_source = row_sources.of_rows(device)
        by_source = sorted_keys[:num_pairs] % num_experts * num_sources + row_source[stored // top_k]
        source_order = torch.sort(by_source, stable=True)[1].to(torch.int32)
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


def up(
    x: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    grouping: Grouping,
    layout: ExpertLayout,
    activation: FusedActivation | None,
    *,
    needs_h: bool = True,
    out_h: Tensor | None = None,
    out_a: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> tuple[Tensor | None, Tensor | None]:
    width = gate_up_proj.shape[2 if layout.transposed else 1]
    a = out_a
    if a is None and activation is not None:
        a = x.new_empty(grouping.num_pairs, layout.intermediate_size(width))
    acc = accumulation_dtype(x.dtype)
    rows = x.index_select(0, grouping.row_index)
    h = _products(rows, _in_out(gate_up_proj, layout), gate_up_bias, grouping, out_h)
    if a is not None and activation is not None:
        for part in _row_slices(h.shape[0], width):
            _activate(h[part].to(acc), layout, activation, a[part])
    return (h if needs_h or out_h is not None or activation is None else None), a


def _row_slices(num_rows: int, width: int) -> Iterator[slice]:
    """Cut rows into slices of about ELEMENTWISE_SIZE elements."""
    step = max(1, ELEMENTWISE_SIZE // width)
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


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
    down_proj: Tensor,
    down_bias: Tensor | None,
    grouping: Grouping,
    layout: ExpertLayout,
    *,
    out: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> Tensor:
    return _products(a, _in_out(down_proj, layout), down_bias, grouping, out)


def combine(
    y: Tensor, index: Tensor, weights: Tensor | None = None, add: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    num_rows, num_slots = index.shape
    result = y.new_empty(num_rows, y.shape[1]) if out is None else out
    if index.numel() == 0:
        return result.zero_() if add is None else result.copy_(add)
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
                return result.zero_() if add is None else result.copy_(add)
        scales = None if weights is None else weights.flatten()
        sums = F.embedding_bag(terms.long(), y, starts, mode="sum", per_sample_weights=scales)
        return result.copy_(sums if add is None else sums.add_(add))
    if y.shape[0] == 0:
        return result.zero_() if add is None else result.copy_(add)
    # It would round the weights and the sum to a narrow dtype: widen the rows of a block instead.
    rows_per_block = max(1, COMBINE_BLOCK_TERMS // num_slots)
    for first in range(0, num_rows, rows_per_block):
        block = index[first : first + rows_per_block]
        rows = y.index_select(0, (block.clamp(min=0) if skips else block).flatten()).to(acc).view(*block.shape, -1)
        if skips:
            rows.masked_fill_((block < 0).unsqueeze(2), 0)
        if weights is None:
            total = rows.sum(1)
        else:
            total = torch.bmm(weights[first : first + rows_per_block].unsqueeze(1), rows).squeeze(1)
        if add is not None:
            total.add_(add[first : first + rows_per_block])
        result[first : first + rows_per_block] = total
    return result


def down_grad(
    dout: Tensor,
    down_proj: Tensor,
    down_bias: Tensor | None,
    hidden: Tensor,
    topk_weights: Tensor,
    grouping: Grouping,
    layout: ExpertLayout,
    activation: FusedActivation | None,
    *,
    out_dh: Tensor | None = None,
    out_scaled_a: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(dout.dtype)
    inner = down_proj.shape[1 if layout.transposed else 2]
    dh = torch.empty_like(hidden) if out_dh is None else out_dh
    scaled_a = dout.new_empty(grouping.num_pairs, inner) if out_scaled_a is None else out_scaled_a
    dweights = torch.empty(grouping.num_pairs, dtype=acc, device=dout.device)
    scales = topk_weights.flatten().index_select(0, grouping.pair_index).to(acc).unsqueeze(1)
    rows = dout.index_select(0, grouping.row_index)
    products = _products(rows, _out_in(down_proj, layout), None, grouping, None)
    for part in _row_slices(grouping.num_pairs, inner):
        scale, g = scales[part], products[part].to(acc)
        da = g * scale
        if activation is None:
            a = hidden[part].to(acc)
            dh[part] = da
        else:
            a = _activation_backward(hidden[part].to(acc), da, layout, activation, dh[part])
        torch.sum(g.mul_(a), 1, out=dweights[part])
        if a.dtype == dout.dtype:
            torch.mul(a, scale, out=scaled_a[part])
        else:
            scaled_a[part] = a * scale
    if down_bias is not None:
        for e, positions in _expert_slices(grouping):
            # not @, which autocast would narrow
            dweights[positions] += (rows[positions].to(acc) * down_bias[e].to(acc)).sum(1)
    return dh, scaled_a, dweights


def _activation_backward(
    h: Tensor, da: Tensor, layout: ExpertLayout, activation: FusedActivation, out: Tensor
) -> Tensor:
    """Write dh for da into `out` and give a = act(h), both from h (n, 2F) in the accumulation dtype."""
    if isinstance(activation, ClampedSwiGLU):
        raw_gate, raw_up = split_gate(h, layout)
        out_gate, out_up = split_gate(out, layout)
        gate = raw_gate.clamp(max=activation.limit)
        up_half = raw_up.clamp(-activation.limit, activation.limit)
        sigmoid = torch.sigmoid(activation.alpha * gate)
        act = gate * sigmoid
        shifted = up_half + activation.up_offset
        out_up.copy_((da * act).masked_fill_(raw_up.abs() > activation.limit, 0))
        slope = sigmoid + activation.alpha * act * (1 - sigmoid)
        out_gate.copy_((da * shifted).mul_(slope).masked_fill_(raw_gate > activation.limit, 0))
        return act * shifted
    if not layout.gated:
        out.copy_(_gate_backward(da, h, activation))
        return apply_activation(h, layout, activation)
    gate, up_half = split_gate(h, layout)
    out_gate, out_up = split_gate(out, layout)
    act = apply_activation(gate, ExpertLayout(gated=False), activation)
    if out.dtype == h.dtype:
        torch.mul(da, act, out=out_up)
    else:
        out_up.copy_(da * act)
    out_gate.copy_(_gate_backward(da.mul_(up_half), gate, activation))
    return act.mul_(up_half)


def _gate_backward(grad: Tensor, gate: Tensor, activation: FusedActivation) -> Tensor:
    """Give grad * act'(gate)."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward(grad, gate, approximate=approximate)
    if activation == "relu":
        return grad * (gate > 0)
    assert activation == "relu2"
    return grad * (2 * F.relu(gate))


def up_grad(
    dh: Tensor,
    gate_up_proj: Tensor,
    grouping: Grouping,
    layout: ExpertLayout,
    *,
    out: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> Tensor:
    return _products(dh, _out_in(gate_up_proj, layout), None, grouping, out)


def weight_grad(
    grouping: Grouping,
    layout: ExpertLayout,
    *,
    x: Tensor | None = None,
    dh: Tensor | None = None,
    dout: Tensor | None = None,
    scaled_a: Tensor | None = None,
    topk_weights: Tensor | None = None,
    gate_up_bias: bool = False,
    down_bias: bool = False,
    accumulate_gate_up: Tensor | None = None,
    accumulate_down: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> WeightGrads:
    order = grouping.source_order
    dw1 = db1 = dw2 = db2 = None
    if x is not None and dh is not None:
        dw1 = _outer_sums(dh, x, grouping, not layout.transposed, accumulate_gate_up)
    if dout is not None and scaled_a is not None:
        dw2 = _outer_sums(scaled_a, dout, grouping, layout.transposed, accumulate_down)
    if dh is not None and gate_up_bias:
        db1 = dh.new_zeros(grouping.num_experts, dh.shape[1])
        for e, positions in _expert_slices(grouping):
            values = dh[positions] if order is None else dh.index_select(0, order[positions])
            db1[e] = values.sum(0, dtype=accumulation_dtype(dh.dtype))
    if dout is not None and topk_weights is not None and down_bias:
        acc = accumulation_dtype(dout.dtype)
        db2 = dout.new_zeros(grouping.num_experts, dout.shape[1])
        pair_index = grouping.pair_index if order is None else grouping.pair_index.index_select(0, order)
        scales = topk_weights.flatten().index_select(0, pair_index).to(acc).unsqueeze(1)
        rows = torch.div(pair_index, grouping.top_k, rounding_mode="floor")
        for e, positions in _expert_slices(grouping):
            db2[e] = (dout.index_select(0, rows[positions]).to(acc) * scales[positions]).sum(0)
    return WeightGrads(dw1, db1, dw2, db2)


def _expert_slices(grouping: Grouping) -> Iterator[tuple[int, slice]]:
    """Give (expert, its positions in source order) for the experts that have pairs."""
    for e, (first, last) in enumerate(pairwise(grouping.host_expert_offsets)):
        if first < last:
            yield e, slice(first, last)


def _outer_sums(
    pair_values: Tensor, row_values: Tensor, grouping: Grouping, pairs_first: bool, accumulate: Tensor | None
) -> Tensor | None:
    """Sum outer(pair_values[n], row_values[row of n]) over each expert's pairs, or with the factors swapped.

    Into `accumulate` where it is given.
    """
    order, row_index = grouping.source_order, grouping.row_index

    def factors(positions: slice) -> tuple[Tensor, Tensor]:
        if order is None:
            pairs, rows = pair_values[positions], row_index[positions]
        else:
            stored = order[positions]
            pairs, rows = pair_values.index_select(0, stored), row_index.index_select(0, stored)
        return pairs, row_values.index_select(0, rows)

    shape = (pair_values.shape[1], row_values.shape[1])
    out = accumulate
    if out is None:
        out = cpu_memory.empty(grouping.num_experts, *(shape if pairs_first else shape[::-1]), like=pair_values)
    offsets = grouping.host_expert_offsets
    counts = [last - first for first, last in pairwise(offsets)]
    if offsets[-1] <= SMALL_PAIRS_PER_EXPERT * grouping.num_experts:
        pairs, rows = factors(slice(offsets[-1]))
        parts: Iterable[tuple[Tensor, Tensor]] = zip(pairs.split(counts), rows.split(counts), strict=True)
    else:
        parts = (factors(slice(first, last)) for first, last in pairwise(offsets))
    for target, count, (pairs, rows) in zip(out.unbind(0), counts, parts, strict=True):
        left, right = (pairs, rows) if pairs_first else (rows, pairs)
        if accumulate is not None:
            if count:
                _accumulate_product(target, left.mT, right)
        elif count == 0:
            target.zero_()
        else:
            torch.mm(left.mT, right, out=target)
    return out if accumulate is None else None


def _accumulate_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right into `target` in fp32 or wider, rounding once."""
    acc = accumulation_dtype(left.dtype)
    if target.dtype == acc:
        target.addmm_(left.to(acc), right.to(acc))
    else:
        product = torch.mm(left.to(acc), right.to(acc))
        target.copy_(target.to(torch.promote_types(acc, target.dtype)).add_(product))
