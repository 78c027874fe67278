"""How a grouped product's tile is chosen: a measured one, or the table's; and how its operands are read.

A layer has one tile configuration, chosen from dtype, D, F, E, K and a coarse class of the layer's pairs per expert:
never from a chunk's rows, so that a row's bits don't depend on the chunk it is in; with `batch_invariant` not from the
layer's rows either.
"""

import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tritonmoe.config.layer import KernelOptions
from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.gpus import CARDS, Architecture
from tritonmoe.ops.kernels.row_tiles import TILE_HEIGHTS
from tritonmoe.ops.kernels.tiles import measured_tiles, table, tma
from tritonmoe.ops.kernels.tiles.config import SHARED_ELEMENTS, TileConfig

__all__ = [
    "LONG_SUMS",
    "grouped_matmul_config",
    "lacks_fences",
    "measured_class",
    "row_class",
    "tile_height",
]

log = logging.getLogger("tritonmoe")

ENOUGH_PROGRAMS = 64 * -(-max(card.multiprocessors for card in CARDS.values()) // 64)
"""So many programs, 320, occupy every supported GPU: none has more multiprocessors (MI300X has 304 compute units)."""
LONG_SUMS = (128, 256, 512, 1024, 2048, 4096)
"""The classes of pairs per expert that weight_grad is measured for beyond the lowest."""


def row_class(grouping: Grouping, options: KernelOptions) -> int | None:
    """Return the class of the layer's pairs per expert: 16, 32, 64 or 128, the height of its tiles; 8 for decoding.

    A tile that is higher than an expert's share of the pairs would be mostly empty. Calls of at most 8 rows (tokens)
    are a class of their own, 8: their tiles are 16 high too, and narrower. With `batch_invariant` the class is None:
    nothing may depend on it.
    """
    if options.batch_invariant:
        return None
    pairs = grouping.pairs_per_expert
    if pairs < 24:
        return 8 if grouping.num_layer_rows <= 8 else 16
    return 32 if pairs < 48 else 64 if pairs < 96 else 128


def measured_class(operation: str, rows: int | None, grouping: Grouping) -> int | None:
    """Return the class of pairs per expert that a product is measured for: the row class, of weight_grad up to 4096.

    Its sums are as long as an expert has pairs, so which tile is fastest changes beyond the highest tile's 128.
    """
    if operation != "weight_grad" or rows != 128:
        return rows
    return next((pairs for pairs in LONG_SUMS if grouping.pairs_per_expert < 1.5 * pairs), LONG_SUMS[-1])


def tile_height(operation: str, rows: int | None, num_experts: int, top_k: int) -> int:
    """Return the most rows that a tile may have: 16, 32, 64 or 128.

    A tile of weight_grad has columns of an operand for its rows: their number doesn't depend on the pairs. Where the
    class is unknown (rows is None), layers with more than 16 experts for each of a token's pairs take lower tiles:
    their experts have few pairs each.
    """
    if operation == "weight_grad":
        return 128
    if rows is None:
        return 64 if num_experts > 16 * top_k else 128
    return max(16, rows)


def grouped_matmul_config(
    product: str,
    like: Tensor,
    width: int,
    depth: int,
    grouping: Grouping,
    options: KernelOptions,
    refusals: Mapping[str, str],
    may_be_persistent: bool = True,
) -> TileConfig:
    """Choose the tile of one grouped product, and how the tiles of its operands are read.

    Args:
        product: "up" (block_n counts units: a gate and an up column each), "up_ungated", "down", "down_grad"
            or "weight_grad" (block_m and block_n are columns, block_k pairs). Behind it stands the format of a packed
            weight ("up mxfp4"), for which other tiles are measured than for a plain one.
        like: a tensor of the product's dtype and device; of "up" and "up_ungated" x, whose rows are gathered.
        width, depth: output columns, and the length of the sum (for weight_grad: output rows).
        refusals: for each operand whose tiles TMA may read, why it can't; empty where it can. So for the result, "out",
            of a kernel that may store it by TMA.
        may_be_persistent: False where the kernel would spill.
    """
    gpu, rows = launch.gpu_of(like.device), row_class(grouping, options)
    measured_rows = measured_class(product, rows, grouping)
    key = measured_tiles.tile_key(gpu.name, like.dtype, product, width, depth, measured_rows)
    measured = measured_tiles.fields_of(key)
    gather = dict(measured).get("gather") if measured else None
    config, clipped = _config(
        product,
        gpu,
        launch.TRITON_VERSION,
        launch.dot_precision(like),
        like.dtype,
        width,
        depth,
        rows,
        grouping.num_experts,
        grouping.top_k,
        measured,
        tuple(refusals.items()),
        _why_no_gather(gpu, gather, like, grouping.num_pairs) if gather in ("tma", "copy") else "",
        may_be_persistent,
    )
    measured_tiles.note(key, config)
    return clipped


class _Product(NamedTuple):
    """What of a grouped product doesn't depend on its rows."""

    operation: str
    gpu: Architecture
    why_no_tma: str
    lacks_fences: bool
    precision: str
    dtype: torch.dtype
    width: int
    depth: int


@functools.lru_cache(maxsize=4096)
def _config(
    product_name: str,
    gpu: Architecture,
    _triton_version: tuple[int, ...],  # for the cache: `gpu` is judged by it
    precision: str,
    dtype: torch.dtype,
    width: int,
    depth: int,
    rows: int | None,
    num_experts: int,
    top_k: int,
    measured: tuple[tuple[str, Any], ...],
    refusals: tuple[tuple[str, str], ...],
    gather_refusal: str,
    may_be_persistent: bool,
) -> tuple[TileConfig, TileConfig]:
    """Choose the tile, and shrink it to the product; every launch asks.

    Args:
        rows: the row class.
        measured: the fields that a measured entry replaces. gather_refusal: why x can't be gathered as it says.
    """
    operation, why_no_tma = product_name.partition(" ")[0], _why_no_tma(gpu)
    product = _Product(operation, gpu, why_no_tma, lacks_fences(gpu), precision, dtype, width, depth)
    why_one_tile = "" if may_be_persistent else "it would spill registers"
    height = tile_height(operation, rows, num_experts, top_k)
    if height == 64 and product_name.endswith(" mxfp8") and gpu.tensor_columns:
        height = 128  # tcgen05 multiplies scaled codes of no fewer rows, and Triton widens them to bf16
    config = table.tile_of(gpu.tiles, table.elements_of(dtype, width, depth), operation, height)
    if rows == 8 and operation != "weight_grad":
        config = _narrowed(config, width, min(top_k, num_experts))  # the row tiles that one token has at least
    gathers = operation in ("up", "up_ungated")
    config = replace(config, tma=not why_no_tma, gather="pointers" if gathers else "")
    config = replace(config, **dict(measured))
    if operation != "weight_grad" and config.block_m not in TILE_HEIGHTS:
        raise ValueError(
            f"block_m of {operation} must be one of {TILE_HEIGHTS}, the heights of which `group` lists row tiles, "
            f"got {config.block_m}: correct the measured entry, or delete it and run `tritonmoe tune` again"
        )
    refused = dict(refusals)
    out_refusal = refused.pop("out", "its kernel stores through pointers")
    reads = tma.reads(refused, why_no_tma or ("" if config.tma else "measured to be faster"))
    if config.persistent:
        _say_what_is_slow(operation, dict(reads) if config.tma else {}, why_one_tile)
    persistent = not why_one_tile and config.persistent and _may_walk(reads)
    gather = config.gather if gathers else ""
    if gather in ("tma", "copy"):
        reads = (*tma.reads({"x": gather_refusal}, ""), *reads)
        gather = "pointers" if gather_refusal else gather
    config = replace(config, persistent=persistent, gather=gather, reads=reads)
    if _needs_missing_fences(product, config):
        # With one stage no copy is asynchronous; two pieces of up's 64 rows spill then.
        subtiles = 4 if operation == "up" else config.subtiles
        config = replace(config, num_stages=1, persistent=False, subtiles=subtiles)
    if operation == "weight_grad":
        return config, _clipped_weight_grad(config, product)
    if not out_refusal and _may_be_stored_by_tma(product, config):
        config = replace(config, subtiles=config.pieces_stored_by_tma, reads=(*reads, ("out", tma.BY_TMA)))
    return config, config.clipped(width, depth)


def _may_be_stored_by_tma(product: _Product, config: TileConfig) -> bool:
    """Return whether TMA stores a product's tiles: of those that it could store, the ones for which it was counted.

    These are tall ones in half precision, all of whose operands TMA reads, where there are 227 KB of shared memory.
    """
    has_room = product.gpu.shared_bytes_per_program >= 2 * SHARED_ELEMENTS
    is_counted = product.dtype.itemsize == 2 and config.block_m >= 64 and has_room
    return (is_counted or product.gpu.tiles == "interpreter") and config.tma and _may_walk(config.reads)


def _say_what_is_slow(operation: str, reads: Mapping[str, str], why_one_tile: str) -> None:
    """Log what keeps a product from the fast way of its tile; each product is chosen once."""
    slow = [f"its {operand} is read through {way}" for operand, way in reads.items() if way != tma.BY_TMA]
    if why_one_tile:
        slow.append(f"a program has one tile: {why_one_tile}")
    if slow:
        log.info("%s is slower than it could be: %s", operation, "; ".join(slow))


def _narrowed(config: TileConfig, width: int, num_slots: int) -> TileConfig:
    """Halve the columns of a tile until `num_slots` row tiles, what one token has at least, occupy every GPU.

    Splitting the sums instead would do the same with a second pass over them; here every sum keeps its order.
    """
    block_n = config.block_n
    while block_n > 16 and num_slots * triton.cdiv(width, block_n) < ENOUGH_PROGRAMS:
        block_n //= 2
    return replace(config, block_n=block_n)


def _may_walk(reads: tuple[tuple[str, str], ...]) -> bool:
    """Return whether a program may load its next tile while it stores one.

    Addresses of operands that come through pointers take the registers that the next tile needs.
    """
    return bool(reads) and all(way == tma.BY_TMA for _, way in reads)


def _clipped_weight_grad(config: TileConfig, product: _Product) -> TileConfig:
    """Shrink the tile of weight_grad, whose rows are columns of its operand, and cut it in pieces where that pays.

    It only pays where accumulators live outside the registers: in the tensor memory of sm_100, and in the interpreter.
    """
    config = config.clipped(product.width, config.block_k)
    in_tensor_memory = product.gpu.tensor_columns > 0 and product.dtype != torch.float32
    return replace(
        config,
        block_m=min(config.block_m, max(16, triton.next_power_of_2(product.depth))),
        subtiles=config.subtiles if product.gpu.tiles == "interpreter" or in_tensor_memory else 1,
    )


def lacks_fences(gpu: Architecture) -> bool:
    """Return whether asynchronous copies through pointers are not safe: with one stage there are none.

    tcgen05 reads shared memory through another proxy than cp.async writes it through, and before 3.7.1 Triton puts no
    fence between the two. Results were seen to differ on Blackwell (pytorch/pytorch#181248). wgmma of Hopper should
    have a fence too, and has none in any release before; no wrong result of it is known.
    """
    return gpu.fences_since > launch.TRITON_VERSION


def _needs_missing_fences(product: _Product, config: TileConfig) -> bool:
    """Return whether tcgen05 multiplies what comes through pointers, and no fence stands between the two."""
    by_tcgen05 = config.block_m >= 64 and (product.dtype.itemsize <= 2 or product.precision == "tf32")
    return by_tcgen05 and product.lacks_fences and not _reads_all_by_tma(product.operation, config)


def _reads_all_by_tma(operation: str, config: TileConfig) -> bool:
    """Return whether no operand of a product comes through pointers."""
    gathered = operation in ("down_grad", "weight_grad") or config.gather == "pointers"
    return not gathered and bool(config.reads) and all(way == tma.BY_TMA for _, way in config.reads)


def _why_no_tma(gpu: Architecture) -> str:
    """Return why tiles can't be read by TMA; empty where they can: in the interpreter as on Hopper."""
    if gpu.tma_since is None:
        return f"{gpu.name} has no TMA"
    if gpu.tma_since > launch.TRITON_VERSION:
        return f"before Triton {'.'.join(map(str, gpu.tma_since))} every TMA load of {gpu.name} may become a call"
    return ""


def _why_no_gather(gpu: Architecture, gather: str, rows: Tensor, num_pairs: int) -> str:
    """Return why TMA can't gather `rows`, or read their copy in boxes; empty where it can."""
    if unusable := _why_no_tma(gpu):
        return unusable
    if gather == "copy":
        spills = f"up spills registers with it on {gpu.name}" if gpu.spills_boxes else ""
        return spills or tma.refusal_of_copied_rows(rows, num_pairs)
    return tma.refusal(rows) if gpu.gathers_by_tma else f"{gpu.name} has no TMA that gathers rows"
