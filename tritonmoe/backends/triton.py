"""The seven operations as Triton kernels; their contract stands in reference.py, the kernels in ..kernels."""

import torch
from torch import Tensor

from ..config import ExpertLayout, FusedActivation, KernelOptions
from ..grouping import Grouping
from ..kernels import bias_grad as bias_grad_kernels
from ..kernels import combine as combine_kernels
from ..kernels import down as down_kernels
from ..kernels import down_grad as down_grad_kernels
from ..kernels import group as group_kernels
from ..kernels import up as up_kernels
from ..kernels import weight_grad as weight_grad_kernels
from .reference import WeightGrads

__all__ = [
    "WeightGrads",
    "combine",
    "down",
    "down_grad",
    "group",
    "up",
    "up_grad",
    "weight_grad",
]

MAX_BLOCK_PAIRS: int | None = None
"""How many pairs callers hand over at a time; None for all."""


def group(
    topk_ids: Tensor,
    num_experts: int,
    *,
    chunk_row_offsets: tuple[int, ...] | None = None,
    chunk_pair_offsets: tuple[int, ...] | None = None,
    row_source: Tensor | None = None,
) -> Grouping:
    """Order the pairs by counting sort; one chunk without pair offsets is padded to R*K positions."""
    group_kernels.check_limits(num_experts, topk_ids.shape[1])
    num_rows, top_k = topk_ids.shape
    row_offsets = (0, num_rows) if chunk_row_offsets is None else tuple(chunk_row_offsets)
    num_chunks = len(row_offsets) - 1
    if chunk_pair_offsets is not None:
        pair_offsets = tuple(chunk_pair_offsets)
    elif num_chunks == 1:
        pair_offsets = (0, num_rows * top_k)
    else:
        raise ValueError("chunk_pair_offsets is required with several chunks: counting pairs would need a host read")
    if num_chunks > 1 and row_source is None:
        raise ValueError("row_source is required with several chunks")
    expert_offsets = source_order = None
    if num_chunks == 1 and topk_ids.numel() <= group_kernels.MAX_FEW_PAIRS:
        pair_index, chunk_expert_offsets, inverse = group_kernels.group_few_pairs(
            topk_ids, num_experts, pair_offsets[-1]
        )
    else:
        device = topk_ids.device
        table = group_kernels.ChunkTable(row_offsets, pair_offsets, top_k, device)
        inverse = torch.empty(num_rows, top_k, dtype=torch.int32, device=device)
        storage = None if num_chunks == 1 else torch.empty_like(inverse)
        chunk_expert_offsets, shifts = group_kernels.sort_pairs(topk_ids, num_experts, table)
        pair_index = group_kernels.place_pairs(
            topk_ids, num_experts, table, chunk_expert_offsets, shifts, inverse=inverse, storage=storage
        )
        if row_source is not None and num_chunks > 1:
            # The same sort once more, over all chunks, walking the rows by their source.
            layer = group_kernels.ChunkTable((0, num_rows), (0, pair_offsets[-1]), top_k, device)
            row_order = torch.argsort(row_source, stable=True)
            layer_offsets, shifts = group_kernels.sort_pairs(topk_ids, num_experts, layer, row_order)
            expert_offsets = layer_offsets[0]
            source_order = group_kernels.place_pairs(
                topk_ids, num_experts, layer, layer_offsets, shifts, row_order=row_order, pair_values=storage
            )
    return Grouping(
        pair_index=pair_index,
        expert_offsets=chunk_expert_offsets[0] if expert_offsets is None else expert_offsets,
        inverse=inverse,
        source_order=source_order,
        chunk_expert_offsets=chunk_expert_offsets,
        chunk_row_offsets=row_offsets,
        chunk_pair_offsets=pair_offsets,
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
    """Gather, product, bias and activation in one kernel."""
    return up_kernels.up(
        x,
        gate_up_proj,
        gate_up_bias,
        grouping,
        layout,
        activation,
        needs_h=needs_h,
        out_h=out_h,
        out_a=out_a,
        options=options,
    )


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
    """One grouped product."""
    return down_kernels.down(a, down_proj, down_bias, grouping, layout, out=out, options=options)


def combine(
    y: Tensor,
    index: Tensor,
    weights: Tensor | None = None,
    add: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """One gather-sum in slot order."""
    return combine_kernels.combine(y, index, weights, add, out=out)


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
    """One kernel for the product and the activation's backward, a second sums the weights' gradients."""
    return down_grad_kernels.down_grad(
        dout,
        down_proj,
        down_bias,
        hidden,
        topk_weights,
        grouping,
        layout,
        activation,
        out_dh=out_dh,
        out_scaled_a=out_scaled_a,
        options=options,
    )


def up_grad(
    dh: Tensor,
    gate_up_proj: Tensor,
    grouping: Grouping,
    layout: ExpertLayout,
    *,
    out: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> Tensor:
    """One grouped product over all 2F columns."""
    return down_kernels.up_grad(dh, gate_up_proj, grouping, layout, out=out, options=options)


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
    """One grouped product with a ragged sum for each weight, one column sum for each bias."""
    order = grouping.source_order
    pairs = grouping.pair_index if order is None else grouping.pair_index.index_select(0, order)
    dw1 = db1 = dw2 = db2 = None
    if x is not None and dh is not None:
        pairs_first = not layout.transposed
        dw1 = weight_grad_kernels.outer_sums(dh, x, grouping, pairs, pairs_first, accumulate_gate_up, options)
    if dh is not None and gate_up_bias:
        db1 = bias_grad_kernels.bias_grad(dh, grouping, order)
    if dout is not None and scaled_a is not None:
        dw2 = weight_grad_kernels.outer_sums(
            scaled_a, dout, grouping, pairs, layout.transposed, accumulate_down, options
        )
    if dout is not None and topk_weights is not None and down_bias:
        db2 = bias_grad_kernels.bias_grad(dout, grouping, pairs, topk_weights)
    return WeightGrads(dw1, db1, dw2, db2)
