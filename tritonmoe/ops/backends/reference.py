"""The seven operations in the plainest PyTorch, any dtype up to fp64: what "correct" means. Their contract: ops.py."""

from itertools import pairwise

import torch
from torch import Tensor

from tritonmoe.config.activations import FusedActivation
from tritonmoe.config.formats import format_of
from tritonmoe.config.layer import NO_WEIGHTS, ExpertLayout, KernelOptions, PerWeight, Projection
from tritonmoe.ops.backends.ops import GradientOperands, WeightGrads, accumulation_dtype, apply_activation, required
from tritonmoe.ops.grouping import Grouping, RowSources

__all__ = [
    "WeightGrads",
    "copies_rows",
    "down",
    "down_grad",
    "gather_sum",
    "group",
    "up",
    "up_grad",
    "weight_grad",
]

MAX_BLOCK_PAIRS: int | None = None


def copies_rows() -> bool:
    return False


def _in_out(projection: Projection, expert: int) -> Tensor:
    """Return one expert's weight as (in, out), whatever the layout."""
    weight = projection.weight[expert]
    if projection.scales is not None:
        weight = format_of(weight, projection.scales).decode(weight, projection.scales[expert])
    return weight if projection.layout.transposed else weight.T


def group(
    topk_ids: Tensor,
    num_experts: int,
    *,
    chunk_row_offsets: tuple[int, ...] | None = None,
    chunk_pair_offsets: tuple[int, ...] | None = None,
    row_sources: RowSources | None = None,
) -> Grouping:
    """Sort the pairs in Python."""
    num_rows, top_k = topk_ids.shape
    device = topk_ids.device
    if chunk_row_offsets is None:
        chunk_row_offsets = (0, num_rows)
    num_chunks = len(chunk_row_offsets) - 1
    chunk_of_row = [c for c in range(num_chunks) for _ in range(chunk_row_offsets[c + 1] - chunk_row_offsets[c])]
    sources = [0] * num_rows if row_sources is None else row_sources.of_rows(topk_ids.device).tolist()
    ids = topk_ids.tolist()
    pairs = [(r, k) for r in range(num_rows) for k in range(top_k) if 0 <= ids[r][k] < num_experts]
    stored = sorted(pairs, key=lambda p: (chunk_of_row[p[0]], ids[p[0]][p[1]], p))
    by_source = sorted(pairs, key=lambda p: (ids[p[0]][p[1]], sources[p[0]], p))
    position = {pair: n for n, pair in enumerate(stored)}
    counts = torch.zeros(num_chunks, num_experts + 1, dtype=torch.int32, device="cpu")
    for r, k in pairs:
        counts[chunk_of_row[r], ids[r][k] + 1] += 1
    chunk_expert_offsets = counts.cumsum(1).to(torch.int32)
    pair_offsets = [0, *counts.sum(1).cumsum(0).tolist()]
    inverse = torch.full((num_rows, top_k), -1, dtype=torch.int32, device="cpu")
    for (r, k), n in position.items():
        inverse[r, k] = n - pair_offsets[chunk_of_row[r]]
    return Grouping(
        pair_index=torch.tensor([r * top_k + k for r, k in stored], dtype=torch.int32, device=device),
        expert_offsets=counts.sum(0).cumsum(0).to(torch.int32).to(device),
        inverse=inverse.to(device),
        source_order=None
        if num_chunks == 1
        else torch.tensor([position[p] for p in by_source], dtype=torch.int32, device=device),
        chunk_expert_offsets=chunk_expert_offsets.to(device),
        chunk_row_offsets=tuple(chunk_row_offsets),
        chunk_pair_offsets=tuple(pair_offsets),
    )


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
    """Multiply one expert's rows after the other's."""
    acc = accumulation_dtype(x.dtype)
    layout, bias = projection.layout, projection.bias
    width = projection.shape[2 if layout.transposed else 1]
    h = x.new_empty(grouping.num_pairs, width) if out_h is None else out_h
    for e, (first, last) in enumerate(_ranges(grouping)):
        rows = x[grouping.row_index[first:last].long()].to(acc)
        product = rows @ _in_out(projection, e).to(acc)
        if bias is not None:
            product = product + bias[e].to(acc)
        if projection.addend is not None:
            product = product + projection.addend[first:last].to(acc)
        h[first:last] = product.to(x.dtype)
    if activation is None:
        return h, None
    return h, apply_activation(h.to(acc), layout, activation).to(x.dtype)


def down(
    a: Tensor,
    projection: Projection,
    grouping: Grouping,
    *,
    out: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> Tensor:
    """Multiply one expert's pairs after the other's."""
    acc = accumulation_dtype(a.dtype)
    width = projection.shape[2 if projection.layout.transposed else 1]
    y = a.new_empty(grouping.num_pairs, width) if out is None else out
    for e, (first, last) in enumerate(_ranges(grouping)):
        product = a[first:last].to(acc) @ _in_out(projection, e).to(acc)
        if projection.bias is not None:
            product = product + projection.bias[e].to(acc)
        if projection.addend is not None:
            product = product + projection.addend[first:last].to(acc)
        y[first:last] = product.to(a.dtype)
    return y


def gather_sum(y: Tensor, index: Tensor, weights: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Add one slot's rows after the other's."""
    acc = accumulation_dtype(y.dtype)
    total = torch.zeros(index.shape[0], y.shape[1], dtype=acc, device=y.device)
    for j in range(index.shape[1]):
        present = index[:, j] >= 0
        term = y[index[present, j].long()].to(acc)
        if weights is not None:
            term = term * weights[present, j, None].to(acc)
        total[present] += term
    result = total.to(y.dtype)
    return result if out is None else out.copy_(result)


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
    """Carry each expert's rows through its product, and leave the activation to autograd."""
    acc = accumulation_dtype(dout.dtype)
    _, down_bias, layout, addend, *_ = projection
    rows = grouping.row_index.long()
    grad = dout[rows].to(acc)
    scale = topk_weights.flatten()[grouping.pair_index.long()].to(acc)[:, None]
    g = dout.new_empty(grouping.num_pairs, projection.shape[1 if layout.transposed else 2], dtype=acc)
    bias_term = dout.new_zeros(grouping.num_pairs, dtype=acc)
    for e, (first, last) in enumerate(_ranges(grouping)):
        g[first:last] = grad[first:last] @ _in_out(projection, e).to(acc).T
        if addend is not None:
            g[first:last] += addend[first:last].to(acc)
        if down_bias is not None:
            bias_term[first:last] = grad[first:last] @ down_bias[e].to(acc)
    da = scale * g
    if activation is None:
        a, dhidden = hidden, da
    else:
        # Inside an operator autograd is switched off by more than the grad mode.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            with torch.enable_grad():
                h = hidden.detach().to(acc).requires_grad_()
                exact_a = apply_activation(h, layout, activation)
            (dhidden,) = torch.autograd.grad(exact_a, h, da)
            a = exact_a.detach().to(dout.dtype)
    dweights = (g * a.to(acc)).sum(1) + bias_term
    scaled_a = (scale * a.to(acc)).to(dout.dtype)
    dh = dhidden.to(dout.dtype)
    out_dh, out_scaled_a = out
    if out_dh is not None:
        dh = out_dh.copy_(dh)
    if out_scaled_a is not None:
        scaled_a = out_scaled_a.copy_(scaled_a)
    return dh, scaled_a, dweights


def up_grad(
    dh: Tensor,
    projection: Projection,
    grouping: Grouping,
    *,
    out: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> Tensor:
    """Multiply one expert's pairs after the other's."""
    acc = accumulation_dtype(dh.dtype)
    width = projection.shape[1 if projection.layout.transposed else 2]
    dx = dh.new_empty(grouping.num_pairs, width) if out is None else out
    for e, (first, last) in enumerate(_ranges(grouping)):
        product = dh[first:last].to(acc) @ _in_out(projection, e).to(acc).T
        if projection.addend is not None:
            product = product + projection.addend[first:last].to(acc)
        dx[first:last] = product.to(dh.dtype)
    return dx


def weight_grad(
    grouping: Grouping,
    layout: ExpertLayout,
    operands: GradientOperands,
    needs: PerWeight[bool],
    *,
    accumulate: PerWeight[Tensor | None] = NO_WEIGHTS,
    options: KernelOptions = KernelOptions(),
) -> WeightGrads:
    """Stack each expert's sums."""
    order = slice(None) if grouping.source_order is None else grouping.source_order.long()
    rows = grouping.row_index.long()[order]

    def outer_sums(
        pair_values: Tensor, row_values: Tensor, pairs_first: bool, accumulate: Tensor | None
    ) -> Tensor | None:
        acc = accumulation_dtype(pair_values.dtype)
        left, right = pair_values[order].to(acc), row_values[rows].to(acc)
        if not pairs_first:
            left, right = right, left
        sums = torch.stack([left[i:j].T @ right[i:j] for i, j in _ranges(grouping)])
        if accumulate is None:
            return sums.to(pair_values.dtype)
        accumulate.copy_(accumulate.to(torch.promote_types(acc, accumulate.dtype)) + sums)
        return None

    def sums(values: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.stack([values[i:j].sum(0) for i, j in _ranges(grouping)]).to(dtype)

    dw1 = db1 = dw2 = db2 = None
    if needs.gate_up_proj:
        dw1 = outer_sums(required(operands.dh), required(operands.x), not layout.transposed, accumulate.gate_up_proj)
    if needs.gate_up_bias:
        dh = required(operands.dh)
        db1 = sums(dh[order].to(accumulation_dtype(dh.dtype)), dh.dtype)
    if needs.down_proj:
        dw2 = outer_sums(required(operands.scaled_a), required(operands.dout), layout.transposed, accumulate.down_proj)
    if needs.down_bias:
        dout, topk_weights = required(operands.dout), required(operands.topk_weights)
        acc = accumulation_dtype(dout.dtype)
        scale = topk_weights.flatten()[grouping.pair_index.long()[order]].to(acc)
        db2 = sums(dout[rows].to(acc) * scale[:, None], dout.dtype)
    return WeightGrads(dw1, db1, dw2, db2)


def _ranges(grouping: Grouping) -> list[tuple[int, int]]:
    offsets = grouping.host_expert_offsets
    return list(pairwise(offsets))
