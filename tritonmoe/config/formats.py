"""Formats of packed weights: which tensors hold one, and the shape of the weight that they stand for.

A packed weight (E, A, B) is two tensors, with the experts along the first axis of both:

| format | values | scales | a block of one scale |
| --- | --- | --- | --- |
| mxfp4 | (E, A, B/2) uint8, two values a byte, the low half first | (E, A, B/32) uint8, 2**(byte - 127) | 32 along B |
| fp8 | (E, A, B) float8_e4m3fn | (E, ceil(A/128), ceil(B/128)) fp32 | 128 x 128 |
| nf4 | (E, A, B/2) uint8, two codes a byte, the high half first | (E, A*B/64) fp32 | 64 along the rows of an expert |

Their dtypes say which format it is. The weight is bf16(value * scale), rounded once from fp32.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "FORMATS",
    "FP4_VALUES",
    "FP8_BLOCK",
    "LARGEST_MXFP4_SCALE",
    "LARGEST_SCALE",
    "LARGEST_VALUE",
    "MXFP4_BLOCK",
    "NF4_BLOCK",
    "NF4_VALUES",
    "WeightFormat",
    "bytes_per_value",
    "check_format",
    "empty_packed",
    "format_of",
    "logical_shape",
    "scales_shape",
    "values_per_element",
    "weight_shape",
]

WeightFormat = Literal["mxfp4", "fp8", "nf4"]
FORMATS: tuple[WeightFormat, ...] = ("mxfp4", "fp8", "nf4")
MXFP4_BLOCK, FP8_BLOCK, NF4_BLOCK = 32, 128, 64
LARGEST_MXFP4_SCALE = 252
"""With a larger one 6 times it is past bf16; 255 is NaN in the OCP format."""
LARGEST_VALUE: dict[WeightFormat, float] = {"mxfp4": 6.0, "fp8": 448.0, "nf4": 1.0}
"""The largest magnitude of a value before its scale."""
LARGEST_SCALE: dict[WeightFormat, float] = {
    "mxfp4": 2.0 ** (LARGEST_MXFP4_SCALE - 127),
    **{name: torch.finfo(torch.bfloat16).max / LARGEST_VALUE[name] for name in ("fp8", "nf4")},
}
"""With a larger one the largest value is past bf16, and decoders, which shift the values first, may make NaN of a 0."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes of e2m1 are."""
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What the sixteen codes of NF4 are, as in bitsandbytes. Source: QLoRA (Dettmers et al., arXiv:2305.14314)."""


def format_of(values: Tensor, scales: Tensor) -> WeightFormat:
    """Return the format of a packed weight; TypeError where these dtypes are none's."""
    dtypes = values.dtype, scales.dtype
    if dtypes == (torch.uint8, torch.uint8):
        return "mxfp4"
    if dtypes == (torch.float8_e4m3fn, torch.float32):
        return "fp8"
    if dtypes == (torch.uint8, torch.float32):
        return "nf4"
    raise TypeError(
        f"a packed weight has uint8 values and uint8 scales (mxfp4), float8_e4m3fn and fp32 (fp8), or uint8 and fp32 "
        f"(nf4); got {dtypes[0]} and {dtypes[1]}. If module.to(dtype), .half() or a mixed precision policy has cast "
        "them, load the packed weight again, and leave the experts out of that cast"
    )


def weight_shape(weight: Tensor, scales: Tensor | None) -> tuple[int, ...]:
    """Return the shape of the weight itself, packed or not."""
    if scales is None or values_per_element(weight) == 1:
        return tuple(weight.shape)
    return *weight.shape[:-1], 2 * weight.shape[-1]


def logical_shape(values: tuple[int, ...], scales: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the shape of a weight from the shapes of its tensors alone; scales: None where it is not packed."""
    if scales is None:
        return values
    num_experts, rows, columns = values
    is_mxfp4 = tuple(scales) == (num_experts, rows, 2 * columns // MXFP4_BLOCK)
    return (num_experts, rows, 2 * columns) if is_mxfp4 or len(scales) == 2 else values


def values_per_element(values: Tensor) -> int:
    """Return how many values of a packed weight are in one element of its tensor."""
    return 2 if values.dtype == torch.uint8 else 1


def bytes_per_value(weight_format: WeightFormat) -> float:
    """Return the memory of one value of a packed weight, its share of a scale included."""
    return {"mxfp4": 0.5 + 1 / MXFP4_BLOCK, "fp8": 1 + 4 / FP8_BLOCK**2, "nf4": 0.5 + 4 / NF4_BLOCK}[weight_format]


def scales_shape(weight_format: WeightFormat, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that the scales of a packed weight (E, A, B) have.

    Raises:
        ValueError: the format can't hold such a weight.
    """
    num_experts, rows, columns = shape
    if weight_format == "fp8":
        return num_experts, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    if weight_format == "mxfp4":
        if columns % MXFP4_BLOCK:
            raise ValueError(
                f"mxfp4 has a scale for {MXFP4_BLOCK} values along the last axis, which {tuple(shape)} does not divide "
                f"into: use 'nf4' or 'fp8', or sizes that are multiples of {MXFP4_BLOCK}"
            )
        return num_experts, rows, columns // MXFP4_BLOCK
    if rows * columns % NF4_BLOCK or columns % 2:
        raise ValueError(
            f"nf4 has a scale for {NF4_BLOCK} values of an expert, and two in a byte of a row; an expert of "
            f"{tuple(shape)} has {rows * columns} values in rows of {columns}: use 'fp8', or leave these experts as "
            "they are"
        )
    return num_experts, rows * columns // NF4_BLOCK


def empty_packed(
    shape: tuple[int, ...], weight_format: WeightFormat, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Return memory for the values and the scales of a packed weight (E, A, B), uninitialised."""
    num_experts, rows, columns = shape
    size = scales_shape(weight_format, shape)
    is_fp8 = weight_format == "fp8"
    values = torch.empty(num_experts, rows, columns if is_fp8 else columns // 2, dtype=torch.uint8, device=device)
    if is_fp8:
        values = values.view(torch.float8_e4m3fn)
    dtype = torch.uint8 if weight_format == "mxfp4" else torch.float32
    return values, torch.empty(size, dtype=dtype, device=device)


def check_format(weight_format: object) -> None:
    """Raise ValueError unless this is the name of a format."""
    if weight_format not in FORMATS:
        raise ValueError(f"the format of a weight must be one of {', '.join(FORMATS)}, got {weight_format!r}")
