"""The seven operations in the plainest PyTorch, any dtype up to fp64: what "correct" means here.

Every backend module has these functions with these signatures; docstrings stand here, once. Arithmetic is done in
fp32 for narrower dtypes (fp64 stays fp64), and each stored tensor is rounded once to the dtype of the rows.

Every product takes `options`: how it runs on a GPU. It never changes what is computed, and does nothing here.

Backward, for a pair p of token t with gate weight s and expert e (h = x_t W1 + b1, a = act(h), y = a W2 + b2,
out_t = sum of s*y over the token's pairs), given dout:
    g  = dout_t W2^T          d(weight) = <g, a> + <dout_t, b2>        da = s*g          dh = act'(h) * da
    dW2 = sum dout_t (s*a)    db2 = sum s*dout_t        dW1 = sum dh x_t       db1 = sum dh       dx_t = sum dh W1
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonmoe.config.layer import ClampedSwiGLU, ExpertLayout, FusedActivation, KernelOptions, PerWeight
from tritonmoe.grouping import Grouping, RowSources

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
"""How many pairs callers hand over at a time; None for all."""


def copies_rows() -> bool:
    """Say whether `up` may hold a copy of the rows of its pairs, all of a chunk's."""
    return False


WeightGrads = PerWeight
"""Gradients of the expert weights; None where they were not asked for."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype in which sums and activations of `dtype` rows are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split_gate(h: Tensor, layout: ExpertLayout) -> tuple[Tensor, Tensor]:
    """Give views of the gate and up halves of h (n, 2F)."""
    if layout.interleaved:
        return h[:, 0::2], h[:, 1::2]
    gate, up_half = h.chunk(2, dim=1)
    return gate, up_half


def apply_activation(h: Tensor, layout: ExpertLayout, activation: FusedActivation) -> Tensor:
    """Give act(h): (n, 2F) -> (n, F), or (n, F) -> (n, F) when ungated; computed in h's own dtype."""
    if isinstance(activation, ClampedSwiGLU):
        gate, up_half = split_gate(h, layout)
        gate = gate.clamp(max=activation.limit)
        up_half = up_half.clamp(-activation.limit, activation.limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up_half + activation.up_offset)
    gate, factor = split_gate(h, layout) if layout.gated else (h, h)
    if activation == "silu":
        out = F.silu(gate)
    elif activation == "gelu":
        out = F.gelu(gate)
    elif activation == "gelu_tanh":
        out = F.gelu(gate, approximate="tanh")
    elif activation == "relu":
        out = F.relu(gate)
    elif activation == "relu2":
        out = F.relu(gate).square()
    else:
        raise ValueError(f"activation {activation!r} is not known")
    return out * factor if layout.gated else out


def _in_out(weight: Tensor, layout: ExpertLayout) -> Tensor:
    """One expert's weight as (in, out), whatever the layout."""
    return weight if layout.transposed else weight.T


def group(
    topk_ids: Tensor,
    num_experts: int,
    *,
    chunk_row_offsets: tuple[int, ...] | None = None,
    chunk_pair_offsets: tuple[int, ...] | None = None,
    row_sources: RowSources | None = None,
) -> Grouping:
    """Order the pairs of R rows by (chunk, expert, source rank, token) and give the ways back.

    Args:
        topk_ids: (R, K) integers; ids outside [0, num_experts) are skipped pairs. Within a chunk rows come
            by (source rank, token).
        num_experts: E of this rank.
        chunk_row_offsets: host integers, C+1 of them, leading zero; None means one chunk.
        chunk_pair_offsets: the same for pairs that do work; required with several chunks.
        row_sources: which rank sent each row; required with several chunks.
    Returns:
        The Grouping (grouping.py has a worked example).
    """
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
    """Gather each pair's row, multiply by its expert's up-projection, add the bias, apply the activation.

    Args:
        x: (R, D) rows, of all chunks (row numbers in `grouping` count from the layer's first row).
        gate_up_proj: (E, 2F, D), or (E, D, 2F) transposed; F instead of 2F when ungated.
        gate_up_bias: (E, 2F) or None.
        grouping: one chunk.
        activation: a fused activation, or None for h alone.
        needs_h: False, with an activation and no out_h: h is not kept, and None is given for it (inference).
        out_h, out_a: (N, 2F) and (N, F) where h and a are written.
    Returns:
        h (N, 2F) in x.dtype, rounded once, and a = act(h) (N, F) computed from the rounded h, or None.
    """
    acc = accumulation_dtype(x.dtype)
    width = gate_up_proj.shape[2 if layout.transposed else 1]
    h = x.new_empty(grouping.num_pairs, width) if out_h is None else out_h
    for e, (first, last) in enumerate(_ranges(grouping)):
        rows = x[grouping.row_index[first:last].long()].to(acc)
        product = rows @ _in_out(gate_up_proj[e], layout).to(acc)
        if gate_up_bias is not None:
            product = product + gate_up_bias[e].to(acc)
        h[first:last] = product.to(x.dtype)
    if activation is None:
        return h, None
    return h, apply_activation(h.to(acc), layout, activation).to(x.dtype)


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
    """Multiply each pair's activation by its expert's down-projection and add the bias.

    Args:
        a: (N, F) in storage order of `grouping` (one chunk).
        down_proj: (E, D, F), or (E, F, D) transposed. down_bias: (E, D) or None.
        out: (N, D) where y is written.
    Returns:
        y (N, D) in a.dtype, storage order.
    """
    acc = accumulation_dtype(a.dtype)
    y = a.new_empty(grouping.num_pairs, down_proj.shape[2 if layout.transposed else 1]) if out is None else out
    for e, (first, last) in enumerate(_ranges(grouping)):
        product = a[first:last].to(acc) @ _in_out(down_proj[e], layout).to(acc)
        if down_bias is not None:
            product = product + down_bias[e].to(acc)
        y[first:last] = product.to(a.dtype)
    return y


def gather_sum(
    y: Tensor,
    index: Tensor,
    weights: Tensor | None = None,
    add: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Sum rows of y per token, in slot order: out[t] = sum over j of weights[t, j] * y[index[t, j]], plus add[t].

    Args:
        y: (N, D). index: (T, J) int32, -1 where there is nothing to add. weights: (T, J) or None (all one).
        add: (T, D) floating point, added last (the output of a shared expert), or None.
        out: (T, D) where the sums are written.
    Returns:
        (T, D) in y.dtype; the sum is kept in fp32 (fp64 for fp64) and rounded once. A row with no terms is zero.
    Example:
        y = [[1], [2], [4]], index = [[0, 2], [-1, 1], [-1, -1]] gives [[5], [2], [0]]; with
        add = [[10], [20], [30]] it gives [[15], [22], [30]].
    """
    acc = accumulation_dtype(y.dtype)
    total = torch.zeros(index.shape[0], y.shape[1], dtype=acc, device=y.device)
    for j in range(index.shape[1]):
        present = index[:, j] >= 0
        term = y[index[present, j].long()].to(acc)
        if weights is not None:
            term = term * weights[present, j, None].to(acc)
        total[present] += term
    if add is not None:
        total += add.to(acc)
    result = total.to(y.dtype)
    return result if out is None else out.copy_(result)


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
    """Carry dout back through gather_sum, the down-projection and the activation.

    Args:
        dout: (R, D) rows of all chunks. topk_weights: (R, K) of all chunks.
        hidden: h (N, 2F) of this chunk; with activation=None it is a (N, F) instead.
        grouping: one chunk. out_dh, out_scaled_a: (N, 2F) and (N, F) where results are written.
    Returns:
        dh (N, 2F) (activation=None: da (N, F)), s*a (N, F), both in dout.dtype, and the gradient of each
        pair's weight (N,) in fp32 (fp64 for fp64); all in storage order.
    """
    acc = accumulation_dtype(dout.dtype)
    rows = grouping.row_index.long()
    grad = dout[rows].to(acc)
    scale = topk_weights.flatten()[grouping.pair_index.long()].to(acc)[:, None]
    g = dout.new_empty(grouping.num_pairs, down_proj.shape[1 if layout.transposed else 2], dtype=acc)
    bias_term = dout.new_zeros(grouping.num_pairs, dtype=acc)
    for e, (first, last) in enumerate(_ranges(grouping)):
        g[first:last] = grad[first:last] @ _in_out(down_proj[e], layout).to(acc).T
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
    if out_dh is not None:
        dh = out_dh.copy_(dh)
    if out_scaled_a is not None:
        scaled_a = out_scaled_a.copy_(scaled_a)
    return dh, scaled_a, dweights


def up_grad(
    dh: Tensor,
    gate_up_proj: Tensor,
    grouping: Grouping,
    layout: ExpertLayout,
    *,
    out: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> Tensor:
    """Carry dh (N, 2F) back through the up-projection: dx of each pair, (N, D), storage order of one chunk."""
    acc = accumulation_dtype(dh.dtype)
    dx = dh.new_empty(grouping.num_pairs, gate_up_proj.shape[1 if layout.transposed else 2]) if out is None else out
    for e, (first, last) in enumerate(_ranges(grouping)):
        dx[first:last] = (dh[first:last].to(acc) @ _in_out(gate_up_proj[e], layout).to(acc).T).to(dh.dtype)
    return dx


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
    """Sum the weight gradients over all pairs of the layer, in source order; empty experts get zeros.

    Args:
        grouping: the whole layer, all chunks.
        x, dh: (R, D) and (N, 2F): given together for dW1. dout, scaled_a: (R, D) and (N, F): together for dW2.
        gate_up_bias: also sum db1 from dh. down_bias: also sum db2 from dout and topk_weights (R, K).
        accumulate_gate_up, accumulate_down: shaped like the weights, any floating dtype and strides; where given, the
            gradient is added into it, in fp32 or wider and rounded once to its dtype, and None is given back
            (Megatron-LM's `weight.main_grad`, mostly fp32 for bf16 weights; the training loop owns and zeroes it).
    Returns:
        WeightGrads in the layout and dtype of the weights' rows; biases are (E, 2F) and (E, D).
    Example:
        One expert, D = F = 1, ungated, x = [[2]], dh = [[3]]: dW1 is [[[6]]]; with accumulate_gate_up = [[[10]]]
        that becomes [[[16]]] and dW1 is None.
    """
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
    if x is not None and dh is not None:
        dw1 = outer_sums(dh, x, not layout.transposed, accumulate_gate_up)
    if dh is not None and gate_up_bias:
        db1 = sums(dh[order].to(accumulation_dtype(dh.dtype)), dh.dtype)
    if dout is not None and scaled_a is not None:
        dw2 = outer_sums(scaled_a, dout, layout.transposed, accumulate_down)
    if dout is not None and topk_weights is not None and down_bias:
        acc = accumulation_dtype(dout.dtype)
        scale = topk_weights.flatten()[grouping.pair_index.long()[order]].to(acc)
        db2 = sums(dout[rows].to(acc) * scale[:, None], dout.dtype)
    return WeightGrads(dw1, db1, dw2, db2)


def _ranges(grouping: Grouping) -> list[tuple[int, int]]:
    offsets = grouping.host_expert_offsets
    return list(pairwise(offsets))
