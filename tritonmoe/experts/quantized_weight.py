"""QuantizedWeight: the frozen weights of experts in 4 or 8 bits, checked, and the tensors that a call makes of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.config.formats import WeightFormat, check_packable, find_format, format_of, weight_shape
from tritonmoe.config.layer import PerWeight
from tritonmoe.ops.backends.decoding import decoded
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.runtime.streamed import find_streamed

__all__ = [
    "QuantizedWeight",
    "Weight",
    "check_content",
    "check_contents",
    "check_packed",
    "given_weights",
    "is_packed",
    "weight_formats",
]

CHECKED = "_tritonmoe_checked_scales"
"""What scales note: the versions of values and scales that were checked."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The gate_up_proj or down_proj of experts in 4 or 8 bits, frozen, in a checkpoint's own bytes.

    It stands for bf16(value * scale), rounded once from fp32, in forward and in backward: the experts compute, bit for
    bit, what they compute with decode(). They decode where they multiply, a tile or one expert at a time, and only
    experts that have tokens. Rows are bf16. It takes no gradient; x, topk_weights, biases and adapters do.

    Args:
        format: "mxfp4" (gpt-oss: e2m1 with a power of two for 32 values along the last axis), "fp8" (DeepSeek-V3: e4m3
            with an fp32 scale for 128 x 128 values; gate and up half on whole blocks, so that F is a multiple of 128)
            or "nf4" (bitsandbytes, block size 64, without double quantisation).
        values: mxfp4 (E, A, B/32, 16) or (E, A, B/2) bytes; fp8 (E, A, B) float8_e4m3fn; nf4 E*A*B/2 uint8 in any
            shape, or (E, A, B/2).
        scales: mxfp4 (E, A, B/32) bytes of 0 to 252; fp8 (E, ceil(A/128), ceil(B/128)) fp32 of at most 7.5659e35; nf4
            E*A*B/64 fp32 of at most 3.3895e38, the largest magnitude of each block, in any shape.
        shape: (E, A, B) of the weight itself, its axes in the order in which a bf16 weight would have them: (E, 2F, D)
            or, with transposed=True, (E, D, 2F). It can be left out where `values` says it.
    Raises:
        ValueError, TypeError: no weight lies like this, or a scale has no value in bf16.
    Example:
        mxfp4 with the bytes 0x21 first and the scale 128: the low half 1 is 0.5 and the high half 2 is 1, times 2.
    """

    format: WeightFormat
    values: Tensor
    scales: Tensor
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        packed = find_format(self.format)
        values, scales = _as_bytes(self.values), _as_bytes(self.scales)
        if format_of(values, scales) is not packed:
            raise TypeError(f"these are tensors of {format_of(values, scales).name!r}, not of {self.format!r}: say so")
        shape = tuple(self.shape)
        if packed.blocks_along_depth and values.dim() == 4:
            values = values.flatten(2)
        if not shape and values.dim() != 3:
            raise ValueError(
                f"the values {tuple(values.shape)} don't determine the shape (E, A, B) of their weight: give it as "
                "the argument `shape`"
            )
        shape = shape or weight_shape(values, scales)
        stored = (*shape[:2], shape[2] // packed.per_element) if len(shape) == 3 else ()
        if len(shape) != 3 or min(shape) < 1 or values.numel() != torch.Size(stored).numel():
            raise ValueError(f"the values {tuple(values.shape)} are not those of a weight (E, A, B) = {shape}")
        wanted = packed.scales_shape(shape)
        if scales.numel() != torch.Size(wanted).numel():
            raise ValueError(f"a weight {shape} in {self.format} has scales {wanted}, got {tuple(scales.shape)}")
        held = {"values": values.reshape(stored), "scales": scales.reshape(wanted), "shape": shape}
        for name, value in held.items():
            object.__setattr__(self, name, value)
        check_packed("QuantizedWeight", self.values, self.scales)
        check_content(self.values, self.scales)

    @property
    def nbytes(self) -> int:
        """The memory of the values and of the scales."""
        return self.values.nbytes + self.scales.nbytes

    @classmethod
    def pack(cls, weight: Tensor, format: WeightFormat) -> "QuantizedWeight":
        """Return a weight (E, A, B) of any floating dtype, each value rounded to the nearest in a format."""
        packed = find_format(format)
        if weight.dim() != 3 or not weight.is_floating_point():
            raise TypeError(
                f"a weight to pack is (E, A, B) and floating point, got {tuple(weight.shape)} {weight.dtype}"
            )
        check_packable(weight)
        values, scales = packed.empty(tuple(weight.shape), weight.device)
        for one, *own in zip(weight.detach(), values, scales, strict=True):
            packed.pack(one.float(), *own)
        return cls(format, values, scales)

    def decode(self) -> Tensor:
        """Return the whole weight in bf16, (E, A, B): what experts never make."""
        return decoded(self.values, self.scales)

    def __repr__(self) -> str:
        bits = 8 * find_format(self.format).bytes_per_value
        return f"QuantizedWeight({self.format!r}, shape={self.shape}, {bits:.2f} bits a value, {self.values.device})"


Weight = Tensor | QuantizedWeight
"""What experts take for gate_up_proj and down_proj."""


def given_weights(
    gate_up_proj: Weight, gate_up_bias: Tensor | None, down_proj: Weight, down_bias: Tensor | None
) -> PerWeight[Tensor]:
    """Return the weights of a call as tensors, with the scales of those that are packed."""
    up_scales = down_scales = None
    if isinstance(gate_up_proj, QuantizedWeight):
        up_scales, gate_up_proj = gate_up_proj.scales, gate_up_proj.values
    if isinstance(down_proj, QuantizedWeight):
        down_scales, down_proj = down_proj.scales, down_proj.values
    return PerWeight(
        gate_up_proj, gate_up_bias, down_proj, down_bias, gate_up_scales=up_scales, down_scales=down_scales
    )


def is_packed(weights: PerWeight[Tensor]) -> bool:
    """Return whether a weight of a call is packed."""
    return weights.gate_up_scales is not None or weights.down_scales is not None


def weight_formats(weights: PerWeight[Tensor]) -> tuple[WeightFormat | None, WeightFormat | None]:
    """Return the formats of gate_up_proj and down_proj of a call; None for one that is not packed."""
    up_scales, down_scales = weights.gate_up_scales, weights.down_scales
    return (
        None if up_scales is None else format_of(weights.gate_up_proj, up_scales).name,
        None if down_scales is None else format_of(weights.down_proj, down_scales).name,
    )


def check_contents(weights: PerWeight[Tensor]) -> None:
    """Run check_content() on all weights of a call that are packed."""
    of_up, of_down = (weights.gate_up_proj, weights.gate_up_scales), (weights.down_proj, weights.down_scales)
    for values, scales in (of_up, of_down):
        if scales is not None:
            check_content(values, scales)


def check_packed(name: str, values: Tensor, scales: Tensor) -> None:
    """Raise ValueError or TypeError unless these are the tensors of a packed weight, which nobody trains."""
    packed = format_of(values, scales)
    if values.requires_grad or scales.requires_grad:
        raise ValueError(
            f"{name} is packed ({packed.name}) and asks for a gradient, which values of 4 or 8 bits can't have: "
            "freeze the weight (requires_grad_(False)) and train adapters, or pass a decoded weight"
        )
    if values.dim() != 3:
        raise ValueError(f"the values of {name} must have 3 axes, got {tuple(values.shape)}")
    shape = weight_shape(values, scales)
    wanted = packed.scales_shape(shape)
    if tuple(scales.shape) != wanted:
        raise ValueError(f"{name} {shape} in {packed.name} has scales {wanted}, got {tuple(scales.shape)}")


def check_content(values: Tensor, scales: Tensor, noted_on: Tensor | None = None) -> None:
    """Raise ValueError where these tensors have a value that bf16 has not; they are read once, until they are changed.

    noted_on: what lives on where `scales` is made anew for every call; None for themselves.
    """
    if torch.compiler.is_compiling() or scales.is_meta or type(scales) not in (Tensor, torch.nn.Parameter):
        return
    if find_streamed(scales) is not None:  # it was checked before it went into a file
        return
    noted_on = scales if noted_on is None else noted_on
    versions = tuple([-1 if tensor.is_inference() else tensor._version for tensor in (values, scales)])
    if getattr(noted_on, CHECKED, None) == versions or is_captured(scales.device):
        return
    format_of(values, scales).check_content(values, scales)
    for tensor in (scales, noted_on):
        setattr(tensor, CHECKED, versions)


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor, whose elements of one byte torch has another name for, as uint8."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"the values and scales of a packed weight are tensors, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"the values and scales of a packed weight are dense, got {tensor.layout}: call to_dense()")
    if tensor.dtype == torch.int8 or tensor.dtype == getattr(torch, "float8_e8m0fnu", None):
        return tensor.view(torch.uint8)
    return tensor.detach() if isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad else tensor
