"""Decoding one expert of a packed weight to bf16, fast on a CPU: config/formats.py has the formats.

A part of an expert at a time, so that what is between stays in cache: tables turn one byte or two into values, and e4m3
becomes fp16 by shifting bits. What an expert is decoded to is memory of the thread, which the next expert that the
thread decodes takes again: a whole bf16 copy of a weight never exists.
"""

import importlib
import importlib.util
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.formats import (
    FP4_VALUES,
    FP8_BLOCK,
    LARGEST_MXFP4_SCALE,
    MXFP4_BLOCK,
    NF4_BLOCK,
    NF4_VALUES,
    WeightFormat,
    format_of,
    weight_shape,
)

__all__ = ["DECODERS", "ExpertMemory", "decoded", "thread_expert"]

PART_VALUES = 2**18
"""A multiple of every block. Its fp32 values, its bytes and its indices stay in a core's second cache."""
MOST_KEPT = 8
_threads = threading.local()
"""What each thread keeps: the memories of its last experts, by format and shape."""
FP16_OF_E4M3 = 2.0**8
"""The bits of e4m3 with zeros behind them, read as fp16, are its value divided by this."""


class Part(NamedTuple):
    """A part of an expert: where it lies among the bytes and scales of the expert, and memory to decode it with."""

    values: slice
    scales: slice
    between: tuple[Tensor, ...]
    """What the format's decoder needs: views of memory that all parts share."""
    out: Tensor
    """The part of the decoded expert, as the format's decoder writes it."""


class ExpertMemory:
    """Memory for one expert (A, B) in bf16, and what decodes one into it again and again."""

    def __init__(self, weight_format: WeightFormat, out: Tensor) -> None:
        self.out = out
        """(A, B), contiguous."""
        self._decoder = DECODERS[weight_format]
        self._parts = self._decoder.cut(out)
        self._foreign = self._decoder.foreign() if out.device.type == "cpu" else None

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Decode an expert, as Decoder.bytes_of() gave its values and scales, to `out`; give that."""
        if self._foreign is not None:
            self._foreign(values, scales, self.out)
            return self.out
        for part in self._parts:
            self._decoder.decode(values[part.values], scales[part.scales], part)
        return self.out


def thread_expert(weight_format: WeightFormat, rows: int, columns: int, device: torch.device) -> ExpertMemory:
    """Return memory for one expert that the thread's next call may return again; on a GPU, fresh memory.

    A GPU's kernels may still read it when Python comes here again on another stream.
    """
    if device.type != "cpu":
        return ExpertMemory(weight_format, torch.empty(rows, columns, dtype=torch.bfloat16, device=device))
    kept: dict[tuple[WeightFormat, int, int], ExpertMemory] = _threads.__dict__.setdefault("kept", {})
    key = weight_format, rows, columns
    if key not in kept:
        if len(kept) >= MOST_KEPT:
            kept.clear()
        with torch.inference_mode(False):  # made in inference mode it could not be written to outside of it
            kept[key] = ExpertMemory(weight_format, torch.empty(rows, columns, dtype=torch.bfloat16, device=device))
    return kept[key]


def decoded(values: Tensor, scales: Tensor) -> Tensor:
    """Return a whole packed weight in bf16, (E, A, B): what experts never make."""
    weight_format = format_of(values, scales).name
    out = torch.empty(weight_shape(values, scales), dtype=torch.bfloat16, device=values.device)
    for of_expert, scales_of_expert, one in zip(*DECODERS[weight_format].bytes_of(values, scales), out, strict=True):
        ExpertMemory(weight_format, one).decode(of_expert, scales_of_expert)
    return out


def _cut_flat(block: int, table: torch.dtype, wide_dtype: torch.dtype) -> Callable[[Tensor], list[Part]]:
    """Return what cuts experts for a decoder with one scale for `block` values, of which `table` holds several."""
    num_values = table.itemsize // wide_dtype.itemsize

    def cut(out: Tensor) -> list[Part]:
        flat = out.view(-1)
        largest = min(PART_VALUES, flat.numel())
        indices = torch.empty(largest // num_values, dtype=torch.int32, device=out.device)
        wide = flat if wide_dtype == out.dtype else torch.empty(largest, dtype=wide_dtype, device=out.device)
        parts = []
        for first in range(0, flat.numel(), PART_VALUES):
            last = min(first + PART_VALUES, flat.numel())
            own = wide[first:last] if wide is flat else wide[: last - first]
            between = indices[: (last - first) // num_values], own.view(table), own.view(-1, block)
            bytes_, scales = slice(first // num_values, last // num_values), slice(first // block, last // block)
            parts.append(Part(bytes_, scales, between, flat[first:last].view(-1, block)))
        return parts

    return cut


def _mxfp4_bytes(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    values = values.flatten(1)
    if values.storage_offset() % 2 or values.stride(-1) != 1:  # no memory of int16
        values = values.clone(memory_format=torch.contiguous_format)
    return values.view(torch.int16), scales.flatten(1).to(torch.int32)  # as an index


def _decode_mxfp4(pairs: Tensor, scales: Tensor, part: Part) -> None:
    indices, quads, blocks = part.between
    table, powers = _mxfp4_tables(indices.device)
    torch.index_select(table, 0, indices.copy_(pairs).add_(2**15), out=quads)
    blocks.mul_(powers.index_select(0, scales).unsqueeze(1))


def _decode_nf4(bytes_: Tensor, scales: Tensor, part: Part) -> None:
    indices, pairs, blocks = part.between
    torch.index_select(_nf4_table(indices.device), 0, indices.copy_(bytes_), out=pairs)
    part.out.copy_(blocks.mul_(scales.unsqueeze(1)))


def _cut_tiles(out: Tensor) -> list[Part]:
    """Cut an expert into rows of whole tiles, and the rows of a last tile that is not whole."""
    num_rows, width = out.shape
    step = max(1, PART_VALUES // (FP8_BLOCK * width)) * FP8_BLOCK
    whole = num_rows // FP8_BLOCK * FP8_BLOCK
    largest = min(step, num_rows)
    half, wide = (torch.empty(largest, width, dtype=of, device=out.device) for of in (torch.float16, torch.float32))
    parts = []
    for first in [*range(0, whole, step), *([whole] if whole < num_rows else [])]:
        last = num_rows if first == whole else min(first + step, whole)
        height = min(FP8_BLOCK, last - first)
        own = half[: last - first]
        between = own.view(torch.int16), own, wide[: last - first], wide[: last - first].view(-1, height, width)
        rows, tiles = slice(first, last), slice(first // FP8_BLOCK, -(-last // FP8_BLOCK))
        parts.append(Part(rows, tiles, between, out[rows]))
    return parts


def _decode_fp8(rows: Tensor, scales: Tensor, part: Part) -> None:
    bits, half, wide, tiles = part.between
    bits.copy_(rows).mul_(2**7).bitwise_and_(~0x4000)  # sign and seven bits; the sign came twice
    wide.copy_(half)
    of_columns = (scales * FP16_OF_E4M3).repeat_interleave(FP8_BLOCK, 1)[:, : wide.shape[1]]
    tiles.mul_(of_columns.unsqueeze(1))
    part.out.copy_(wide)


class Decoder(NamedTuple):
    """How a format is decoded fast."""

    bytes_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Returns the values and scales of a weight's experts, (E, ...), as `decode` reads those of one of them."""
    cut: Callable[[Tensor], list[Part]]
    decode: Callable[[Tensor, Tensor, Part], None]
    foreign: Callable[[], Callable[[Tensor, Tensor, Tensor], None] | None] = lambda: None
    """Returns what decodes a whole expert on a CPU in place of these, or None."""


def _halves(codes: tuple[float, ...], low_first: bool) -> Tensor:
    """Return the two fp32 values of every byte, (256, 2)."""
    each, bytes_ = torch.tensor(codes, device="cpu", dtype=torch.float32), torch.arange(256, device="cpu")
    low, high = each[bytes_ & 15], each[bytes_ >> 4]
    return torch.stack([low, high] if low_first else [high, low], 1)


@lru_cache(maxsize=16)
def _mxfp4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return four bf16 values of two bytes, by their int16 plus 2**15, and the power of two of every scale.

    That is NaN for scales that bf16 can't hold.
    """
    with torch.inference_mode(False):
        of_byte = _halves(FP4_VALUES, low_first=True).to(torch.bfloat16)
        pairs = torch.arange(-(2**15), 2**15, device="cpu") & 0xFFFF
        both = torch.cat([of_byte[pairs & 0xFF], of_byte[pairs >> 8]], 1)  # little-endian, as PyTorch's devices are
        table = both.contiguous().view(torch.int64).view(-1).to(device)
        powers = torch.ldexp(torch.ones(256, dtype=torch.float64, device="cpu"), torch.arange(256, device="cpu") - 127)
        powers[LARGEST_MXFP4_SCALE + 1 :] = torch.nan
        return table, powers.to(torch.bfloat16).to(device)


@lru_cache(maxsize=16)
def _nf4_table(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _halves(NF4_VALUES, low_first=False).contiguous().view(torch.int64).view(-1).to(device)


@cache
def bitsandbytes_decoder() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """Return what decodes NF4 by bitsandbytes' kernel, which is faster; None where there is none, or it is wrong."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        with torch.inference_mode(False):
            code = torch.tensor(NF4_VALUES, device="cpu")

        def decode(bytes_: Tensor, scales: Tensor, out: Tensor) -> None:
            state = functional.QuantState(
                absmax=scales,
                shape=torch.Size((scales.numel(), NF4_BLOCK)),  # blocks of other rows it puts where they are not
                dtype=torch.bfloat16,
                blocksize=NF4_BLOCK,
                code=code,
                quant_type="nf4",
            )
            out.copy_(functional.dequantize_4bit(bytes_.view(-1, 1), state).view(out.shape))

        bytes_ = torch.arange(256, device="cpu").to(torch.uint8).repeat(4)
        scales = torch.linspace(0.01, 3, bytes_.numel() * 2 // NF4_BLOCK, device="cpu")
        theirs, ours = (torch.empty(4, 512, dtype=torch.bfloat16, device="cpu") for _ in range(2))
        decode(bytes_, scales, theirs)
        for part in DECODERS["nf4"].cut(ours):
            _decode_nf4(bytes_[part.values], scales[part.scales], part)
    except Exception:  # whatever a foreign package does on this machine, the table decodes
        return None
    return decode if torch.equal(theirs, ours) else None


DECODERS: dict[WeightFormat, Decoder] = {
    "mxfp4": Decoder(_mxfp4_bytes, _cut_flat(MXFP4_BLOCK, torch.int64, torch.bfloat16), _decode_mxfp4),
    "fp8": Decoder(lambda values, scales: (values.view(torch.int8), scales), _cut_tiles, _decode_fp8),
    "nf4": Decoder(
        lambda values, scales: (values.flatten(1), scales),
        *(_cut_flat(NF4_BLOCK, torch.int64, torch.float32), _decode_nf4, bitsandbytes_decoder),
    ),
}
