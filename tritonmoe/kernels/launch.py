"""How kernels are launched: tile sizes, options that every launch pins, the lock around the interpreter.

A layer has one tile configuration, chosen from dtype, D, F, E, K and a coarse class of the layer's pairs per expert:
never from a chunk's rows, so that a row's bits don't depend on the chunk it is in; with `batch_invariant` not from the
layer's rows either. Kernel arguments that grow with the number of rows are never specialised:
each new value would cost a compilation in the middle of training.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..config import KernelOptions
from ..grouping import Grouping
from . import tiles, tma

__all__ = [
    "INTERPRETED",
    "TRITON_VERSION",
    "Launch",
    "TileConfig",
    "contiguous_columns",
    "dot",
    "dot_precision",
    "grouped_matmul_config",
    "launch",
    "num_programs",
    "num_tile_slots",
    "output",
    "recording",
    "round_to",
    "row_class",
    "row_tile_ends",
    "slot_and_column_tile",
    "split_column_pairs",
    "split_columns",
    "tile_of_slot",
]

ENOUGH_PROGRAMS = 320
"""No supported GPU has more multiprocessors (MI300X has 304 compute units)."""
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether this process runs kernels in Triton's interpreter (TRITON_INTERPRET=1)."""

TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
_IN_INTERPRETER = tl.constexpr(INTERPRETED)
_interpreter_lock = threading.Lock()


@dataclass(frozen=True)
class TileConfig:
    """One program's tile: block_m pairs by block_n columns, in steps of block_k, and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    """Row tiles that run side by side over all column tiles, so that their weights stay in L2."""
    subtiles: int = 1
    """Pieces in which the epilogue handles the columns: fewer live registers."""
    persistent: bool = False
    """Whether there are only as many programs as free multiprocessors, which load their next tile while they store one.
    Only where TMA reads all operands that it may, and it is known how many multiprocessors are free."""
    tma: bool = False
    """Whether operands that allow it are read by TMA."""
    gather: str = ""
    """How `up` gets the rows of x: through "pointers", by "tma", which gathers them (Blackwell), or by TMA as boxes of
    a "copy" in storage order. Empty for the other operations."""
    reads: tuple[tuple[str, str], ...] = ()
    """(operand, how its tiles are read): see `tma.reads`. Rows that are gathered are here where TMA was asked for."""

    def by_tma(self, operand: str) -> bool:
        """Say whether tiles of `operand` are read by TMA."""
        return (operand, tma.BY_TMA) in self.reads

    def __str__(self) -> str:
        fields = [
            f"{name}={value}" for name, value in dataclasses.asdict(self).items() if name != "reads" and value != ""
        ]
        return " ".join(fields) + "".join(f"; {operand} by {way}" for operand, way in self.reads)

    def clipped(self, width: int, depth: int) -> "TileConfig":
        """Shrink the tile to a product with `width` columns summed over `depth`."""
        block_n = min(self.block_n, max(16, triton.next_power_of_2(width)))
        return dataclasses.replace(
            self,
            block_n=block_n,
            block_k=min(self.block_k, max(16, triton.next_power_of_2(depth))),
            subtiles=max(1, min(self.subtiles, block_n // 16)),
        )


@dataclass(frozen=True)
class Launch:
    """A launch that `recording` caught instead of running it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]


@dataclass
class _Recording:
    target: GPUTarget
    run: Callable[[Launch], None] | None
    launches: list[Launch]


_recording: _Recording | None = None


@contextlib.contextmanager
def recording(target: GPUTarget, run: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Collect launches, as `target` would get them, instead of running them (works on meta tensors).

    run: called with each launch as it is caught, to fill its outputs in another way than on the target.
    """
    global _recording
    _recording = _Recording(target, run, [])
    try:
        yield _recording.launches
    finally:
        _recording = None


@functools.cache
def _device_target(index: int) -> GPUTarget:
    if torch.version.hip is not None:
        properties = torch.cuda.get_device_properties(index)
        return GPUTarget("hip", properties.gcnArchName.split(":")[0], 64)
    major, minor = torch.cuda.get_device_capability(index)
    return GPUTarget("cuda", 10 * major + minor, 32)


def _target(device: torch.device) -> GPUTarget | None:
    """Give what kernels on `device` are compiled for; None for the interpreter."""
    if _recording is not None:
        return _recording.target
    if INTERPRETED:
        return None
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


def _name(target: GPUTarget | None) -> str:
    if target is None:
        return "interpreter"
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def _why_no_tma(target: GPUTarget | None) -> str:
    """Say why tiles can't be read by TMA; empty where they can: in the interpreter as on Hopper."""
    if target is None:
        return ""
    if target.backend != "cuda" or target.arch < 90:
        return f"{_name(target)} has no TMA"
    if target.arch // 10 == 12 and TRITON_VERSION < (3, 7):
        return "before Triton 3.7 every TMA load of sm_120 may become a call"
    return ""


def _why_no_gather(target: GPUTarget | None, gather: str, rows: Tensor, num_pairs: int) -> str:
    """Say why TMA can't gather `rows`, or read their copy in boxes; empty where it can."""
    if unusable := _why_no_tma(target):
        return unusable
    family = 0 if target is None else target.arch // 10
    if gather == "copy":
        if family == 12:
            return f"up spills registers with it on {_name(target)}"
        return tma.refusal_of_copied_rows(rows, num_pairs)
    return f"{_name(target)} has no TMA that gathers rows" if family == 9 else tma.refusal(rows)


@functools.cache
def _pinned_options() -> dict[str, Any]:
    """Give options that every launch fixes: Triton's default for FP fusion changes between versions."""
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError:
        return {}
    fields = {field.name for field in dataclasses.fields(CUDAOptions)}
    return {"enable_fp_fusion": True} if "enable_fp_fusion" in fields else {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int | None = None,
    **constexprs: Any,
) -> None:
    """Run `kernel` over `grid`; an empty grid is nothing to do.

    max_registers: a thread's, on NVIDIA; by itself ptxas may spill some bytes so that one more program fits.
    The interpreter patches module globals while it runs, so its launches take turns.
    """
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, **_pinned_options()}
    on_nvidia = torch.version.hip is None if _recording is None else _recording.target.backend == "cuda"
    if max_registers is not None and on_nvidia:
        options["maxnreg"] = max_registers
    if _recording is not None:
        caught = Launch(kernel, grid, args, constexprs, options)
        _recording.launches.append(caught)
        if _recording.run is not None:
            _recording.run(caught)
    elif INTERPRETED:
        with _interpreter_lock:
            kernel[grid](*args, **constexprs)
    else:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device(device):
            kernel[grid](*args, **constexprs, **options)


def num_tile_slots(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Bound the row tiles of a grouped product without reading expert_offsets: see `tile_of_slot`.

    An expert with pairs has at most one tile that is not full.
    """
    return num_pairs // block_m + min(num_experts, num_pairs)


@triton.jit
def row_tile_ends(
    expert_offsets,  # (E+1,) int32
    E,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Give for each expert the number of row tiles up to its last: (BLOCK_E,) int32, whose maximum is that of all."""
    experts = tl.arange(0, BLOCK_E)
    begins = tl.load(expert_offsets + experts, mask=experts < E, other=0)
    ends = tl.load(expert_offsets + experts + 1, mask=experts < E, other=0)
    return tl.cumsum(tl.cdiv(ends - begins, BLOCK_M), 0)


@triton.jit
def tile_of_slot(
    slot,
    tile_ends,  # (BLOCK_E,) int32: see row_tile_ends
    expert_offsets,  # (E+1,) int32
    E,
    BLOCK_M: tl.constexpr,
):
    """Give the expert, first position and end position of row tile `slot`; first >= end: nothing to do.

    The tiles of expert 0 come first, then those of expert 1, and so on; slots past the last tile have nothing to do.
    """
    earlier = tile_ends <= slot
    # Past the last tile this is E, which begins and ends at expert_offsets[E].
    expert = tl.minimum(tl.sum(earlier.to(tl.int32), 0), E)
    tile = slot - tl.max(tl.where(earlier, tile_ends, 0), 0)
    begin = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + tl.minimum(expert + 1, E))
    return expert, begin + tile * BLOCK_M, end


@triton.jit
def slot_and_column_tile(tile, num_slots, num_column_tiles, GROUP_M: tl.constexpr):
    """Give the (row slot, column tile) of a tile: GROUP_M slots go through all column tiles together."""
    tiles_per_group = GROUP_M * num_column_tiles
    first_slot = tile // tiles_per_group * GROUP_M
    slots = min(num_slots - first_slot, GROUP_M)
    within = tile % tiles_per_group
    return first_slot + within % slots, within // slots


@triton.jit
def dot(left, right, accumulator, PRECISION: tl.constexpr):
    """Add left @ right in fp32."""
    if _IN_INTERPRETER and left.dtype == tl.bfloat16:
        # The interpreter reads bf16 operands of tl.dot as integers.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round fp32 to a stored dtype, to nearest even."""
    if _IN_INTERPRETER and dtype == tl.bfloat16:
        # The interpreter cuts the low bits off: leave none to cut.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def split_column_pairs(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """Split (BLOCK_M, 2*BLOCK_N) in two: left and right half (HALVES), or even and odd columns."""
    if HALVES:
        pairs = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1))
    else:
        pairs = tl.reshape(tile, (BLOCK_M, BLOCK_N, 2))
    return tl.split(pairs)


@triton.jit
def split_columns(tile, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Cut (BLOCK_M, WIDTH) into a tuple of 1, 2 or 4 tiles, from left to right."""
    if PARTS == 1:
        return (tile,)
    elif PARTS == 2:
        return split_column_pairs(tile, BLOCK_M, WIDTH // 2, True)
    else:
        tl.static_assert(PARTS == 4)
        left, right = split_column_pairs(tile, BLOCK_M, WIDTH // 2, True)
        first, second = split_column_pairs(left, BLOCK_M, WIDTH // 4, True)
        third, fourth = split_column_pairs(right, BLOCK_M, WIDTH // 4, True)
        return (first, second, third, fourth)


def num_programs(num_tiles: int, config: TileConfig, options: KernelOptions, device: torch.device) -> int:
    """Give the grid of a kernel whose programs walk all tiles: one for each tile, or one for each SM it may take."""
    num_sms = options.num_sms
    if num_sms is None and config.persistent and device.type == "cuda":
        num_sms = _num_multiprocessors(torch.cuda.current_device() if device.index is None else device.index)
    return num_tiles if num_sms is None else min(num_sms, num_tiles)


@functools.cache
def _num_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """Give the PRECISION of `dot`: tf32 only for fp32 and only if the torch setting asks for it."""
    # allow_tf32 raises where the newer setting has been used; fp32_precision reflects both.
    wants_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and wants_tf32 else "ieee"


def contiguous_columns(tensor: Tensor) -> Tensor:
    """Give `tensor` (n, width) with columns side by side or expanded; rows may have any stride."""
    return tensor if tensor.stride(1) in (0, 1) or tensor.shape[1] == 1 else tensor.contiguous()


def output(like: Tensor, num_rows: int, num_columns: int, out: Tensor | None = None) -> Tensor:
    """Give `out`, whose rows must be contiguous, or new memory with the dtype and device of `like`."""
    if out is None:
        return like.new_empty(num_rows, num_columns)
    assert out.shape == (num_rows, num_columns), f"out is {tuple(out.shape)}, not {(num_rows, num_columns)}"
    assert num_columns == 1 or out.stride(1) == 1, f"rows of out must be contiguous, strides are {out.stride()}"
    return out


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
    target = _target(like.device)
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
    key = tiles.tile_key(_name(target), like.dtype, operation, width, depth, rows)
    config = tiles.choose(key, config)
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
    tiles.note(key, config)
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
