"""Rounding weights to the nearest values of a packed format, an expert at a time.

nf4: as bitsandbytes rounds (block size 64). mxfp4: as the triton_kernels that transformers calls: the scale is the next
power of two with which no value is past 6, and halves round away from zero. fp8: the largest magnitude of a 128 x 128
block becomes 448.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonmoe.config.formats import (
    FP4_VALUES,
    FP8_BLOCK,
    LARGEST_SCALE,
    LARGEST_VALUE,
    MXFP4_BLOCK,
    NF4_BLOCK,
    NF4_VALUES,
    WeightFormat,
)

__all__ = ["check_packable", "pack_expert"]

LARGEST_FP4, LARGEST_E4M3 = LARGEST_VALUE["mxfp4"], LARGEST_VALUE["fp8"]


def check_packable(weight: Tensor) -> None:
    """Raise ValueError where a value is not finite, or past what all formats hold."""
    limit = LARGEST_FP4 * LARGEST_SCALE["mxfp4"]
    for expert in weight.detach():
        largest = float(expert.abs().max())
        if not largest <= limit:
            raise ValueError(
                f"a weight whose largest magnitude is {largest} can't be packed: look for NaN, infinity or an "
                "overflow in the weight"
            )


@torch.no_grad()
def pack_expert(expert: Tensor, weight_format: WeightFormat, values: Tensor, scales: Tensor) -> None:
    """Round one expert (A, B) and write it to the values and scales of a packed weight's expert.

    The weight has passed check_packable().
    """
    wide = expert.float()
    {"mxfp4": _pack_mxfp4, "fp8": _pack_fp8, "nf4": _pack_nf4}[weight_format](wide, values, scales)


def _pack_nf4(wide: Tensor, values: Tensor, scales: Tensor) -> None:
    blocks = wide.reshape(-1, NF4_BLOCK)
    largest = blocks.abs().amax(1)
    scales.copy_(largest)
    scaled = (blocks * (1 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1)
    codes = torch.tensor(NF4_VALUES, device=wide.device)
    bounds = torch.tensor([(one + other) / 2 for one, other in pairwise(codes.tolist())], device=wide.device)
    found = torch.bucketize(scaled.flatten(), bounds).to(torch.uint8)
    values.copy_((found[::2] << 4 | found[1::2]).view(values.shape))


def _pack_mxfp4(wide: Tensor, values: Tensor, scales: Tensor) -> None:
    blocks = wide.reshape(-1, MXFP4_BLOCK)
    wanted = blocks.abs().amax(1) / LARGEST_FP4
    powers = ((wanted.view(torch.int32) + 0x7FFFFF) >> 23).clamp(0, 255)  # the exponent of the next power of two
    scales.copy_(powers.view(scales.shape))
    scaled = (
        blocks.double() * torch.ldexp(torch.ones_like(powers, dtype=torch.float64), 127 - powers).unsqueeze(1)
    ).float()
    steps = FP4_VALUES[:8]
    bounds = torch.tensor([(one + other) / 2 for one, other in pairwise(steps)], device=wide.device)
    found = torch.bucketize(scaled.abs().flatten(), bounds, right=True)
    codes = (found + 8 * torch.signbit(scaled).flatten()).to(torch.uint8)
    values.copy_((codes[1::2] << 4 | codes[::2]).view(values.shape))


def _pack_fp8(wide: Tensor, values: Tensor, scales: Tensor) -> None:
    rows, columns = wide.shape
    padded = F.pad(wide, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    largest = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK).abs().amax((1, 3))
    scales.copy_(torch.where(largest > 0, largest / LARGEST_E4M3, 1.0))
    of_values = scales.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    values.copy_((wide / of_values).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn))
