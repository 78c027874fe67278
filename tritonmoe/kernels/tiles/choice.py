"""How a grouped product's tile is chosen: a measured one, or by rules of thumb; and how its operands are read.

A layer has one tile configuration, chosen from dtype, D, F, E, K and a coarse class of the layer's pairs per expert:
never from a chunk's rows, so that a row's bits don't depend on the chunk it is in; with `batch_invariant` not from the
layer's rows either.
"""

import dataclasses
from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tritonmoe.config.layer import KernelOptions
from tritonmoe.grouping import Grouping
from tritonmoe.kernels import launch
from tritonmoe.kernels.tiles import measured as measured_tiles
from tritonmoe.kernels.tiles import tma
from tritonmoe.kernels.tiles.config import TileConfig

__all__ = ["grouped_matmul_config", "row_class"]

ENOUGH_PROGRAMS = 320
"""No supported GPU has more multiprocessors (MI300X has 304 compute units)."""


def row_class(grouping: Grouping, options: KernelOptions) -> int | None:
    """Give the class of the layer's pairs per expert, as the height of its tiles: 16, 32, 64 or 128; 8 for decoding.

    Tiles taller than an expert's share would be mostly empty. Those of at most 8 rows (tokens) are 16 high too, and
    narrow. None with `batch_invariant`: unknown on purpose.
    """
    if options.batch_invariant:
        return None
    pairs = grouping.pairs_per_expert
    if pairs < 24:
        return 8 if grouping.num_layer_rows <= 8 else 16
    return 32 if pairs < 48 else 64 if pairs < 96 else 128


def grouped_matmul_config(
    operation: str,
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
        operation: "up" (block_n counts units: a gate and an up column each), "up_ungated", "down", "down_grad"
            or "weight_grad" (block_m and block_n are columns, block_k pairs).
        like: a tensor of the product's dtype and device; of "up" and "up_ungated" x, whose rows are gathered.
        width, depth: output columns, and the length of the sum (for weight_grad: output rows).
        refusals: for each operand whose tiles TMA may read, why it can't; empty where it can.
        may_be_persistent: False where the kernel would spill.
    """
    target = launch.target_of(like.device)
    rows = row_class(grouping, options)
    if operation == "weight_grad":
        block_m = 128
    elif rows is None:
        block_m = 64 if grouping.num_experts > 16 * grouping.top_k else 128
    else:
        block_m = max(16, rows)
    if target is None:
        config = TileConfig(min(block_m, 32), 32, min(block_m, 32), num_warps=4, num_stages=1, group_m=2, subtiles=2)
    elif width % 8 or depth % 8:
        # No vector load fits such rows, so every element's address takes registers.
        config = TileConfig(64, 32 if operation == "up" else 64, 32, num_warps=8, num_stages=2, subtiles=2)
        if like.dtype == torch.float32:
            config = dataclasses.replace(config, block_k=16)
    elif like.dtype == torch.float32:
        config = TileConfig(128, 32 if operation == "up" else 64, 16, num_warps=8, num_stages=3, subtiles=2)
    elif block_m < 64:
        config = _few_rows_config(target, operation)
    else:
        config = _half_precision_config(target, operation)
        if block_m == 64 and operation in ("up", "down_grad") and target.backend == "cuda" and target.arch // 10 == 10:
            config = dataclasses.replace(config, subtiles=2)  # four of 64 rows spill 8 bytes a thread
    config = dataclasses.replace(config, block_m=min(config.block_m, block_m), tma=not _why_no_tma(target))
    # Such a tile has a multiprocessor to itself: no other program multiplies while it stores.
    fills_one = target is not None and target.backend == "cuda" and target.arch // 10 in (9, 10)
    fills_one = fills_one and like.element_size() == 2 and config.block_m == 128
    config = dataclasses.replace(config, persistent=fills_one)
    if operation == "down" and not fills_one:
        config = dataclasses.replace(config, subtiles=1)  # smaller accumulators: storing them at once spills nothing
    if rows == 8 and operation != "weight_grad":
        config = _narrowed(config, width, min(grouping.top_k, grouping.num_experts))
    gathers = operation in ("up", "up_ungated")
    config = dataclasses.replace(config, gather="pointers" if gathers else "")
    key = measured_tiles.tile_key(launch.architecture_of(target), like.dtype, operation, width, depth, rows)
    config = measured_tiles.choose(key, config)
    unusable = _why_no_tma(target) or ("" if config.tma else "measured to be faster")
    reads = tma.reads(refusals, unusable)
    # The tiles of a program whose multiprocessor an exchange holds would wait until the exchange ends. Addresses of
    # operands that come through pointers take the registers that the next tile's need.
    may_be_persistent &= options.num_sms is not None or not options.beside_exchanges
    persistent = config.persistent and may_be_persistent and bool(reads) and all(way == tma.BY_TMA for _, way in reads)
    gather = config.gather if gathers else ""
    if gather in ("tma", "copy"):
        refused = _why_no_gather(target, gather, like, grouping.num_pairs)
        reads = (*tma.reads({"x": refused}, ""), *reads)
        gather = "pointers" if refused else gather
    config = dataclasses.replace(config, persistent=persistent, gather=gather, reads=reads)
    by_tcgen05 = config.block_m >= 64 and (like.element_size() == 2 or launch.dot_precision(like.dtype) == "tf32")
    if by_tcgen05 and _lacks_fences(target) and not _reads_all_by_tma(operation, config):
        subtiles = 4 if operation == "up" else config.subtiles  # with one stage two of 64 rows spill
        config = dataclasses.replace(config, num_stages=1, persistent=False, subtiles=subtiles)
    measured_tiles.note(key, config)
    if operation == "weight_grad":
        config = config.clipped(width, config.block_k)
        # Cutting its tile only pays where accumulators live outside the registers.
        has_tensor_memory = target is not None and target.backend == "cuda" and target.arch // 10 == 10
        in_registers = target is not None and (not has_tensor_memory or like.dtype == torch.float32)
        return dataclasses.replace(
            config,
            block_m=min(config.block_m, max(16, triton.next_power_of_2(depth))),
            subtiles=1 if in_registers else config.subtiles,
        )
    return config.clipped(width, depth)


def _few_rows_config(target: GPUTarget, operation: str) -> TileConfig:
    """Choose for fp16 and bf16 where reading the weights is all the work: narrow tiles, so that many SMs read."""
    block_n = 32 if operation == "up" else 64
    if target.backend == "hip":
        return TileConfig(32, block_n, 64, num_warps=4, num_stages=2)
    return TileConfig(32, block_n, 128, num_warps=4, num_stages=4 if target.arch // 10 in (9, 10) else 3)


def _narrowed(config: TileConfig, width: int, num_slots: int) -> TileConfig:
    """Halve the columns of a tile until `num_slots` row tiles, what one token has at least, occupy every GPU.

    Splitting the sums instead would do the same with a second pass over them; here every sum keeps its order.
    """
    block_n = config.block_n
    while block_n > 16 and num_slots * triton.cdiv(width, block_n) < ENOUGH_PROGRAMS:
        block_n //= 2
    return dataclasses.replace(config, block_n=block_n)


def _half_precision_config(target: GPUTarget, operation: str) -> TileConfig:
    """Choose for fp16 and bf16 where the arithmetic is the work."""
    # Three stages fit the 99 KB of shared memory of sm_86, sm_89 and sm_120.
    block_n, num_stages = 64 if operation == "up" else 128, 3
    if target.backend == "hip":
        num_stages = 2
    elif target.arch // 10 in (9, 10):
        block_n = {"up": 128, "down_grad": 128}.get(operation, 256)
    elif target.arch == 80:
        num_stages = 4
    if operation == "weight_grad" and target.backend == "cuda":
        # Rows are found through an index: its load takes stages from the data's, and leaves 2 or 3 buffers.
        num_stages = 7 if target.arch == 80 else 5
    return TileConfig(128, block_n, 64, num_warps=8, num_stages=num_stages, subtiles=4)


def _lacks_fences(target: GPUTarget | None) -> bool:
    """Say whether asynchronous copies through pointers are not safe: with one stage there are none.

    tcgen05 reads shared memory through another proxy than cp.async writes it through, and before 3.7.1 Triton puts no
    fence between the two. Results were seen to differ on Blackwell (pytorch/pytorch#181248). wgmma of Hopper should
    have a fence too, and has none in any release before; no wrong result of it is known.
    """
    is_blackwell = target is not None and target.backend == "cuda" and target.arch // 10 == 10
    return is_blackwell and launch.TRITON_VERSION < (3, 7, 1)


def _reads_all_by_tma(operation: str, config: TileConfig) -> bool:
    """Say whether no operand of a product comes through pointers."""
    gathered = operation in ("down_grad", "weight_grad") or config.gather == "pointers"
    return not gathered and bool(config.reads) and all(way == tma.BY_TMA for _, way in config.reads)


def _why_no_tma(target: GPUTarget | None) -> str:
    """Say why tiles can't be read by TMA; empty where they can: in the interpreter as on Hopper."""
    if target is None:
        return ""
    if target.backend != "cuda" or target.arch < 90:
        return f"{launch.architecture_of(target)} has no TMA"
    if target.arch // 10 == 12 and launch.TRITON_VERSION < (3, 7):
        return "before Triton 3.7 every TMA load of sm_120 may become a call"
    return ""


def _why_no_gather(target: GPUTarget | None, gather: str, rows: Tensor, num_pairs: int) -> str:
    """Say why TMA can't gather `rows`, or read their copy in boxes; empty where it can."""
    if unusable := _why_no_tma(target):
        return unusable
    family = 0 if target is None else target.arch // 10
    if gather == "copy":
        if family == 12:
            return f"up spills registers with it on {launch.architecture_of(target)}"
        return tma.refusal_of_copied_rows(rows, num_pairs)
    return f"{launch.architecture_of(target)} has no TMA that gathers rows" if family == 9 else tma.refusal(rows)
