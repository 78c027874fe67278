"""The seven operations as Triton kernels; their contract stands in ops.py.

Five are functions of the folder kernels as they are. `group` and `weight_grad` put several launches together.
"""

from itertools import pairwise

from torch import Tensor
from torch import device as Device

from tritonmoe.config.layer import MAX_EXPERTS, MAX_TOP_K, NO_WEIGHTS, ExpertLayout, KernelOptions, PerWeight
from tritonmoe.ops.backends.ops import GradientOperands, WeightGrads, required
from tritonmoe.ops.grouping import Grouping, RowSources
from tritonmoe.ops.kernels.bias_grad import bias_grad
from tritonmoe.ops.kernels.down import down, up_grad
from tritonmoe.ops.kernels.down_grad import down_grad
from tritonmoe.ops.kernels.gather_sum import gather_sum
from tritonmoe.ops.kernels.group import MAX_FEW_PAIRS, group_few_pairs, group_pairs
from tritonmoe.ops.kernels.group_tiles import TileTable
from tritonmoe.ops.kernels.row_tiles import list_row_tiles
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.ops.kernels.up import up
from tritonmoe.ops.kernels.weight_grad import outer_sums

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
    """Return whether `up` may copy the rows of its pairs first: a measured entry says so, for some product."""
    return measured_tiles.has_gather("copy")


def group(
    topk_ids: Tensor,
    num_experts: int,
    *,
    chunk_row_offsets: tuple[int, ...] | None = None,
    chunk_pair_offsets: tuple[int, ...] | None = None,
    row_sources: RowSources | None = None,
) -> Grouping:
    """Order the pairs by counting sort in three launches, and list the row tiles in a fourth.

    One chunk without pair offsets is padded to R*K positions. A single launch does all for few pairs of one chunk.
    """
    num_rows, top_k = topk_ids.shape
    assert num_experts <= MAX_EXPERTS, f"{num_experts} experts"
    assert top_k <= MAX_TOP_K, f"{top_k} experts per token"
    row_offsets = (0, num_rows) if chunk_row_offsets is None else tuple(chunk_row_offsets)
    num_chunks = len(row_offsets) - 1
    if num_chunks == 1:
        pair_offsets = (0, num_rows * top_k) if chunk_pair_offsets is None else tuple(chunk_pair_offsets)
        if topk_ids.numel() <= MAX_FEW_PAIRS:
            pair_index, offsets, inverse, row_tiles = group_few_pairs(topk_ids, num_experts, pair_offsets[-1])
            source_order = None
        else:
            table = TileTable(topk_ids.numel())
            pair_index, offsets, inverse, source_order = group_pairs(topk_ids, num_experts, table, pair_offsets[-1])
            row_tiles = list_row_tiles(offsets, pair_offsets[-1])
        expert_offsets = offsets[0]
    else:
        if chunk_pair_offsets is None or row_sources is None:
            raise ValueError(
                "chunk_pair_offsets and row_sources are required with several chunks: counting would need a host read"
            )
        pair_offsets = tuple(chunk_pair_offsets)
        with Device("cpu"):  # the table is made on the host, whatever the caller's default device
            table = TileTable.of_chunks(row_sources, pair_offsets, top_k, topk_ids.device)
        assert table.num_pairs == topk_ids.numel(), f"{table.num_pairs} pairs in runs, {topk_ids.numel()} in topk_ids"
        pair_index, offsets, inverse, source_order = group_pairs(topk_ids, num_experts, table, pair_offsets[-1])
        expert_offsets, offsets = offsets[-1], offsets[:-1]
        row_tiles = list_row_tiles(offsets, max(last - first for first, last in pairwise(pair_offsets)))
    return Grouping(
        pair_index=pair_index,
        expert_offsets=expert_offsets,
        inverse=inverse,
        source_order=source_order,
        chunk_expert_offsets=offsets,
        chunk_row_offsets=row_offsets,
        chunk_pair_offsets=pair_offsets,
        row_tiles=row_tiles,
    )


def weight_grad(
    grouping: Grouping,
    layout: ExpertLayout,
    operands: GradientOperands,
    needs: PerWeight[bool],
    *,
    accumulate: PerWeight[Tensor | None] = NO_WEIGHTS,
    options: KernelOptions = KernelOptions(),
) -> WeightGrads:
    """One grouped product with a ragged sum for each weight, one column sum for each bias."""
    order = grouping.source_order
    pairs = grouping.pair_index if order is None else grouping.pair_index.index_select(0, order)
    dw1 = db1 = dw2 = db2 = None
    if needs.gate_up_proj:
        dh, x = required(operands.dh), required(operands.x)
        dw1 = outer_sums(dh, x, grouping, pairs, not layout.transposed, accumulate.gate_up_proj, options)
    if needs.gate_up_bias:
        db1 = bias_grad(required(operands.dh), grouping, order)
    if needs.down_proj:
        scaled_a, dout = required(operands.scaled_a), required(operands.dout)
        dw2 = outer_sums(scaled_a, dout, grouping, pairs, layout.transposed, accumulate.down_proj, options)
    if needs.down_bias:
        db2 = bias_grad(required(operands.dout), grouping, pairs, required(operands.topk_weights))
    return PerWeight(dw1, db1, dw2, db2)
