"""Every format of packed weights: the two tensors that hold a weight, and how its values become bytes and come back.

A packed weight (E, A, B) is `values` and `scales`, with the experts along the first axis of both:

| format | values | scales | a block of one scale |
| --- | --- | --- | --- |
| mxfp4 | (E, A, B/2) uint8, two values a byte, the low half first | (E, A, B/32) uint8, 2**(byte - 127) | 32 along B |
| fp8 | (E, A, B) float8_e4m3fn | (E, ceil(A/128), ceil(B/128)) fp32 | 128 x 128 |
| nf4 | (E, A, B/2) uint8, two codes a byte, the high half first | (E, A*B/64) fp32 | 64 along the rows of an expert |

Their dtypes say which format it is. The weight is bf16(value * scale), rounded once from fp32. ops/backends/decoding.py
and ops/kernels/packed_tiles.py have one more entry for each format: what decodes it fast on a CPU, and in kernels.
"""

from abc import ABC, abstractmethod
from contextlib import suppress
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FORMATS",
    "FP4_VALUES",
    "FP8_BLOCK",
    "LARGEST_MXFP4_SCALE",
    "MXFP4_BLOCK",
    "NF4_BLOCK",
    "NF4_VALUES",
    "PackedFormat",
    "WeightFormat",
    "check_packable",
    "find_format",
    "format_of",
    "logical_shape",
    "weight_shape",
]

WeightFormat = Literal["mxfp4", "fp8", "nf4"]
Shape = tuple[int, ...]
MXFP4_BLOCK, FP8_BLOCK, NF4_BLOCK = 32, 128, 64
LARGEST_MXFP4_SCALE = 252
"""With a larger one 6 times it is past bf16; 255 is NaN in the OCP format."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes of e2m1 are."""
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What the sixteen codes of NF4 are, as in bitsandbytes. Source: QLoRA (Dettmers et al., arXiv:2305.14314)."""


class PackedFormat(ABC):
    """One format. Whatever a format needs beside its values, it has in `scales`, with the shape that it says."""

    name: WeightFormat
    values_dtype, scales_dtype = torch.uint8, torch.float32
    per_element = 2
    """How many values, side by side along B, are in one element of `values`."""
    block: int
    """How many values, side by side along B, have one scale."""
    block_rows = 1
    """How many rows have one scale."""
    blocks_along_depth = False
    """Whether models have values as (E, A, B / block, bytes), with what is summed over as B, as gpt-oss does."""
    largest_value: float
    """The largest magnitude of a value before its scale."""
    random_bits, root_mean_square = 0xFF, 1.0
    """Which bits of a byte may be random without a value that is NaN, and how large the values of such bytes are."""

    @property
    def largest_scale(self) -> float:
        """With a larger one a value may be past bf16, and decoders, which shift values first, may make NaN of a 0."""
        return torch.finfo(torch.bfloat16).max / self.largest_value

    @property
    def bytes_per_value(self) -> float:
        """The memory of one value, its share of a scale included."""
        scales = torch.Size(self.scales_shape((1, 128, 128))).numel() * self.scales_dtype.itemsize
        return self.values_dtype.itemsize / self.per_element + scales / 128**2

    @abstractmethod
    def scales_shape(self, shape: Shape) -> Shape:
        """Return the shape of the scales of a weight (E, A, B).

        Raises:
            ValueError: the format can't hold such a weight.
        """

    def check_width(self, inner: int, way_out: str) -> None:
        """Raise ValueError where a block of experts of width F would have a part of the gate and one of the up half."""
        if inner % self.block_rows:
            raise ValueError(
                f"F = {inner} is not a multiple of {self.block_rows}, so one {self.name} block would cover a part of "
                f"the gate half and a part of the up half, and checkpoints have no scale for such a block: {way_out}"
            )

    def empty(self, shape: Shape, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """Return memory for the values and the scales of a weight (E, A, B), uninitialised."""
        scales = torch.empty(self.scales_shape(shape), dtype=self.scales_dtype, device=device)
        stored = *shape[:-1], shape[-1] // self.per_element
        return torch.empty(stored, dtype=torch.uint8, device=device).view(self.values_dtype), scales

    @abstractmethod
    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return one expert (A, B) in bf16, by the definition: each value times its scale in fp32, rounded once."""

    @abstractmethod
    def pack(self, wide: Tensor, values: Tensor, scales: Tensor) -> None:
        """Round an expert (A, B) in fp32 that has passed check_packable() to nearest; write its values and scales."""

    def nearest_scales(self, factors: Tensor) -> Tensor:
        """Return scales that multiply by fp32 factors, or by numbers near them."""
        return factors

    def check_content(self, values: Tensor, scales: Tensor) -> None:
        """Raise ValueError where a value or a scale is none of bf16."""
        for bound in map(float, scales.aminmax() if scales.numel() else ()):  # NaN, if any scale is
            if not abs(bound) <= self.largest_scale:
                raise ValueError(
                    f"a scale of an {self.name} weight is {bound:.5g}, and bf16 holds {self.largest_value:g} times at "
                    f"most {self.largest_scale:.5g}: the checkpoint is damaged, or these are no scales"
                )


class _Mxfp4(PackedFormat):
    """Packed as the triton_kernels that transformers calls do it.

    The scale is the next power of two with which no value is past 6, and halves round away from zero.
    """

    name = "mxfp4"
    scales_dtype = torch.uint8
    block = MXFP4_BLOCK
    blocks_along_depth = True
    largest_value = 6.0
    largest_scale = 2.0 ** (LARGEST_MXFP4_SCALE - 127)
    root_mean_square = 2.9

    def scales_shape(self, shape: Shape) -> Shape:
        if shape[2] % MXFP4_BLOCK:
            raise ValueError(
                f"mxfp4 has a scale for {MXFP4_BLOCK} values along the last axis, which {tuple(shape)} does not divide "
                f"into: use 'nf4' or 'fp8', or sizes that are multiples of {MXFP4_BLOCK}"
            )
        return *shape[:2], shape[2] // MXFP4_BLOCK

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        powers = torch.pow(2.0, scales.double() - 127).float()
        return _decode_codes(FP4_VALUES, values & 15, values >> 4, powers)

    def pack(self, wide: Tensor, values: Tensor, scales: Tensor) -> None:
        blocks = wide.reshape(-1, MXFP4_BLOCK)
        wanted = blocks.abs().amax(1) / self.largest_value
        powers = ((wanted.view(torch.int32) + 0x7FFFFF) >> 23).clamp(0, 255)  # the exponent of the next power of two
        scales.copy_(powers.view(scales.shape))
        exact = torch.ldexp(torch.ones_like(powers, dtype=torch.float64), 127 - powers)
        scaled = (blocks.double() * exact.unsqueeze(1)).float()
        bounds = torch.tensor([(one + other) / 2 for one, other in pairwise(FP4_VALUES[:8])], device=wide.device)
        found = torch.bucketize(scaled.abs().flatten(), bounds, right=True)
        codes = (found + 8 * torch.signbit(scaled).flatten()).to(torch.uint8)
        values.copy_((codes[1::2] << 4 | codes[::2]).view(values.shape))

    def nearest_scales(self, factors: Tensor) -> Tensor:
        return factors.log2().round() + 127

    def check_content(self, values: Tensor, scales: Tensor) -> None:
        largest = int(scales.max()) if scales.numel() else 0
        if largest > LARGEST_MXFP4_SCALE:
            raise ValueError(
                f"a scale of an mxfp4 weight is 2**({largest} - 127), and bf16 holds 6 times at most 2**("
                f"{LARGEST_MXFP4_SCALE} - 127) (255 is not a number): the checkpoint is damaged, or these are no scales"
            )


class _Fp8(PackedFormat):
    """Packed so that the largest magnitude of a block becomes 448."""

    name = "fp8"
    values_dtype = torch.float8_e4m3fn
    per_element = 1
    block = block_rows = FP8_BLOCK
    largest_value = 448.0
    random_bits, root_mean_square = 0xF7, 60.0

    def scales_shape(self, shape: Shape) -> Shape:
        return shape[0], -(-shape[1] // FP8_BLOCK), -(-shape[2] // FP8_BLOCK)

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        return (values.float() * self._of_values(scales, values.shape)).to(torch.bfloat16)

    def _of_values(self, scales: Tensor, shape: Shape) -> Tensor:
        rows, columns = shape
        return scales.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]

    def pack(self, wide: Tensor, values: Tensor, scales: Tensor) -> None:
        rows, columns = wide.shape
        padded = F.pad(wide, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
        largest = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK).abs().amax((1, 3))
        scales.copy_(torch.where(largest > 0, largest / self.largest_value, 1.0))
        scaled = wide / self._of_values(scales, wide.shape)
        values.copy_(scaled.clamp(-self.largest_value, self.largest_value).to(torch.float8_e4m3fn))

    def check_content(self, values: Tensor, scales: Tensor) -> None:
        super().check_content(values, scales)
        if any(bool((expert.view(torch.uint8) & 0x7F == 0x7F).any()) for expert in values):
            raise ValueError("a value of an fp8 weight is not a number: the checkpoint is damaged")


class _Nf4(PackedFormat):
    """Packed as bitsandbytes does it, with blocks of 64."""

    name = "nf4"
    block = NF4_BLOCK
    largest_value = 1.0
    root_mean_square = 0.5

    def scales_shape(self, shape: Shape) -> Shape:
        num_experts, rows, columns = shape
        if rows * columns % NF4_BLOCK or columns % 2:
            raise ValueError(
                f"nf4 has a scale for {NF4_BLOCK} values of an expert, and two in a byte of a row; an expert of "
                f"{tuple(shape)} has {rows * columns} values in rows of {columns}: use 'fp8', or leave these experts "
                "as they are"
            )
        return num_experts, rows * columns // NF4_BLOCK

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        return _decode_codes(NF4_VALUES, values >> 4, values & 15, scales)

    def pack(self, wide: Tensor, values: Tensor, scales: Tensor) -> None:
        blocks = wide.reshape(-1, NF4_BLOCK)
        largest = blocks.abs().amax(1)
        scales.copy_(largest)
        scaled = (blocks * (1 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1)
        bounds = torch.tensor([(one + other) / 2 for one, other in pairwise(NF4_VALUES)], device=wide.device)
        found = torch.bucketize(scaled.flatten(), bounds).to(torch.uint8)
        values.copy_((found[::2] << 4 | found[1::2]).view(values.shape))


FORMATS: dict[WeightFormat, PackedFormat] = {packed.name: packed for packed in (_Mxfp4(), _Fp8(), _Nf4())}
_BY_DTYPES = {(packed.values_dtype, packed.scales_dtype): packed for packed in FORMATS.values()}


def find_format(name: object) -> PackedFormat:
    """Return the format of this name; ValueError where there is none."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"the format of a weight must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def format_of(values: Tensor, scales: Tensor) -> PackedFormat:
    """Return the format of a packed weight; TypeError where these dtypes are none's."""
    found = _BY_DTYPES.get((values.dtype, scales.dtype))
    if found is None:
        known = ", ".join(f"{one} and {other} ({packed.name})" for (one, other), packed in _BY_DTYPES.items())
        raise TypeError(
            f"a packed weight has values and scales of {known}; got {values.dtype} and {scales.dtype}. If "
            "module.to(dtype), .half() or a mixed precision policy has cast them, load the packed weight again, and "
            "leave the experts out of that cast"
        )
    return found


def weight_shape(values: Tensor, scales: Tensor | None) -> Shape:
    """Return the shape of the weight itself, packed or not."""
    if scales is None:
        return tuple(values.shape)
    return *values.shape[:-1], values.shape[-1] * format_of(values, scales).per_element


def logical_shape(values: Shape, scales: Shape | None) -> Shape:
    """Return the shape of a weight from the shapes of its tensors alone; scales: None where it is not packed."""
    for packed in FORMATS.values():
        shape = *values[:-1], values[-1] * packed.per_element
        with suppress(ValueError):
            if packed.scales_shape(shape) == scales:
                return shape
    return values


def check_packable(weight: Tensor) -> None:
    """Raise ValueError where a value is not finite, or past what all formats hold."""
    limit = min(packed.largest_value * packed.largest_scale for packed in FORMATS.values())
    for expert in weight.detach():
        largest = float(expert.abs().max())
        if not largest <= limit:
            raise ValueError(
                f"a weight whose largest magnitude is {largest} can't be packed: look for NaN, infinity or an "
                "overflow in the weight"
            )


def _decode_codes(table: tuple[float, ...], first: Tensor, second: Tensor, factors: Tensor) -> Tensor:
    """Return one expert (A, B) in bf16 from the codes (A, B/2) of every two values and an fp32 factor of each block."""
    codes = torch.stack([first, second], -1).flatten(1)
    blocks = torch.tensor(table, device=codes.device)[codes.long()].view(factors.numel(), -1)
    return (blocks * factors.reshape(-1, 1)).to(torch.bfloat16).view(codes.shape)
