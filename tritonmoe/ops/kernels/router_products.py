"""The router's three products, summed in fp32: logits, and the gradients of the tokens and of the router's weight.

Two operands in bf16, or both in fp16, are multiplied by kernels. No matrix unit multiplies fp32: there, and where one
operand is in fp32, the product is PyTorch's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.ops.kernels.arithmetic import dot, round_to
from tritonmoe.ops.kernels.launch import cdiv, contiguous_columns, gpu_of, launch, next_power_of_2, target_of
from tritonmoe.ops.kernels.tiles.tile_choice import lacks_fences

__all__ = ["router_logits", "tokens_grad", "weight_grad"]

ROWS_PER_SPLIT = 512
"""A sum over tokens is cut into no pieces shorter than this."""
NUM_PROGRAMS = 256
"""It is cut until there are so many programs."""


@triton.jit(do_not_specialize=["T"])
def _row_products_kernel(
    rows,  # (T, PARTS * depth)
    matrix,  # (depth, N)
    topk_ids,  # (T, K) int64: rows whose first id is below zero give zeros; or None
    out,  # (T, N)
    T,
    depth,
    N,
    K,
    stride_rows_row,
    stride_rows_column,
    stride_matrix_row,
    stride_matrix_column,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store rows @ matrix; with two parts, the sum of what each half of a row's columns gives with the same matrix."""
    num_column_tiles = tl.cdiv(N, BLOCK_N)  # those of the same rows run side by side
    tokens = (tl.program_id(0) // num_column_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) % num_column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token, is_column = tokens < T, columns < N
    row_pointers = rows + tokens[:, None] * stride_rows_row
    matrix_pointers = matrix + columns.to(tl.int64)[None, :] * stride_matrix_column
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, PARTS * depth, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        is_place = places < PARTS * depth
        left = tl.load(
            row_pointers + places[None, :] * stride_rows_column, mask=is_token[:, None] & is_place[None, :], other=0.0
        )
        matrix_rows = (places if PARTS == 1 else places % depth).to(tl.int64)
        right = tl.load(
            matrix_pointers + matrix_rows[:, None] * stride_matrix_row,
            mask=is_place[:, None] & is_column[None, :],
            other=0.0,
        )
        total = dot(left, right, total, "ieee")
    if topk_ids is not None:
        # Where the weight isn't finite, zero times it is none.
        is_routed = tl.load(topk_ids + tokens * K, mask=is_token, other=-1) >= 0
        total = tl.where(is_routed[:, None], total, 0.0)
    out_pointers = out + tokens[:, None] * N + columns[None, :]
    tl.store(out_pointers, round_to(total, out.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["T", "rows_per_split"])
def _sums_over_rows_kernel(
    left,  # (T, M), contiguous
    right,  # (T, N)
    topk_ids,  # (T, K) int64: rows whose first id is below zero are left out
    out,  # (splits, M, N) fp32
    T,
    rows_per_split,
    M,
    N,
    K,
    stride_right_row,
    stride_right_column,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store left.T @ right of each split's rows."""
    num_column_tiles = tl.cdiv(N, BLOCK_N)
    out_rows = (tl.program_id(0) // num_column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % num_column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = out_rows < M, columns < N
    first = tl.program_id(1) * rows_per_split
    end = tl.minimum(first + rows_per_split, T)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_T):
        tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        # A skipped token's x may be NaN.
        is_routed = tl.load(topk_ids + tokens * K, mask=tokens < end, other=-1) >= 0
        left_tile = tl.load(
            left + tokens[:, None] * M + out_rows[None, :], mask=is_routed[:, None] & is_row[None, :], other=0.0
        )
        right_tile = tl.load(
            right + tokens[:, None] * stride_right_row + columns[None, :] * stride_right_column,
            mask=is_routed[:, None] & is_column[None, :],
            other=0.0,
        )
        total = dot(tl.trans(left_tile), right_tile, total, "ieee")
    out_pointers = out + (tl.program_id(1).to(tl.int64) * M + out_rows[:, None]) * N + columns[None, :]
    tl.store(out_pointers, total, mask=is_row[:, None] & is_column[None, :])


def _tile(device: torch.device, width: int, *strides: int) -> dict[str, int]:
    """Return the rows, columns and depth of a product's tile, its warps and its stages.

    It doesn't depend on the number of tokens, so neither do a token's bits. An operand whose rows are no multiple of
    eight elements fits no vector load, and takes registers for every address.
    """
    if target_of(device) is None:
        return {"rows": 32, "columns": 32, "depth": 32, "num_warps": 4, "num_stages": 1}
    gpu, columns = gpu_of(device), min(128, max(16, next_power_of_2(width)))
    is_odd = any(stride % 8 for stride in strides)
    num_stages = 1 if lacks_fences(gpu) else 2 if is_odd or gpu.backend != "cuda" else 3
    if is_odd:
        return {"rows": 64, "columns": min(64, columns), "depth": 32, "num_warps": 8, "num_stages": num_stages}
    return {"rows": 64, "columns": columns, "depth": 64, "num_warps": 4, "num_stages": num_stages}


def _row_products(rows: Tensor, matrix: Tensor, topk_ids: Tensor | None, out: Tensor) -> Tensor:
    num_tokens, width = out.shape
    tile = _tile(out.device, width, rows.stride(0), *(stride for stride in matrix.stride() if stride != 1))
    launch(
        _row_products_kernel,
        (cdiv(num_tokens, tile["rows"]) * cdiv(width, tile["columns"]),),
        rows,
        matrix,
        topk_ids,
        out,
        num_tokens,
        matrix.shape[0],
        width,
        0 if topk_ids is None else topk_ids.shape[1],
        *rows.stride(),
        *matrix.stride(),
        PARTS=rows.shape[1] // matrix.shape[0],
        BLOCK_T=tile["rows"],
        BLOCK_N=tile["columns"],
        BLOCK_K=tile["depth"],
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    return out


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (T, D) times the rows of weight (E, D): (T, E) fp32, of any dtypes up to fp32."""
    if x.dtype != weight.dtype or x.dtype == torch.float32:
        return x.float() @ weight.float().T
    weight = contiguous_columns(weight)
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    return _row_products(contiguous_columns(x), weight.T, None, out)


def tokens_grad(dlogits: Tensor, weight: Tensor, topk_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of x, (T, D) in `dtype`: zero for tokens without experts.

    Args:
        dlogits: as choice_grad gives it: (T, 2E) bf16, with which x and weight are in bf16, or (T, E) fp32.
        weight: (E, D). topk_ids: (T, K), -1 for tokens without experts.
    """
    if dlogits.dtype == torch.float32:
        # Where the weight isn't finite, zero times it is none.
        return torch.where(topk_ids[:, :1] >= 0, dlogits @ weight.float(), 0.0).to(dtype)
    out = dlogits.new_empty(dlogits.shape[0], weight.shape[1])
    return _row_products(dlogits, contiguous_columns(weight), topk_ids, out)


def weight_grad(dlogits: Tensor, x: Tensor, topk_ids: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the router's weight, (E, D) in its dtype; tokens without experts take no part.

    The sum over tokens is cut into pieces that run side by side, and are then added in their order.

    Args:
        dlogits, topk_ids, weight: as in tokens_grad. x: (T, D).
    """
    if dlogits.dtype == torch.float32:
        # A skipped token's x may be NaN.
        return (dlogits.T @ torch.where(topk_ids[:, :1] >= 0, x.float(), 0.0)).to(weight.dtype)
    x = contiguous_columns(x)
    num_tokens, width = x.shape
    num_rows = dlogits.shape[1]
    tile = _tile(x.device, width, num_rows, x.stride(0))
    block_m, depth = min(tile["rows"], max(16, next_power_of_2(num_rows))), tile["depth"]
    num_tiles = cdiv(num_rows, block_m) * cdiv(width, tile["columns"])
    num_splits = max(1, min(cdiv(NUM_PROGRAMS, num_tiles), num_tokens // ROWS_PER_SPLIT))
    num_warps, num_stages = tile["num_warps"], tile["num_stages"]
    if num_stages == 3:
        # Which tokens are skipped is loaded before their x, and that load takes two stages from those of the tiles.
        num_stages = 5
        # With operands in registers, 4 warps would spill with Triton 3.6.
        num_warps = 4 if gpu_of(x.device).multiplies_shared_memory else 8
    sums = x.new_empty(num_splits, num_rows, width, dtype=torch.float32)
    launch(
        _sums_over_rows_kernel,
        (num_tiles, num_splits),
        dlogits,
        x,
        topk_ids,
        sums,
        num_tokens,
        cdiv(cdiv(num_tokens, num_splits), depth) * depth,
        num_rows,
        width,
        topk_ids.shape[1],
        *x.stride(),
        BLOCK_T=depth,
        BLOCK_M=block_m,
        BLOCK_N=tile["columns"],
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return sums.view(-1, *weight.shape).sum(dim=0).to(weight.dtype)
