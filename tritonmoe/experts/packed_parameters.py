"""Packed weights as parameters of a module, bytes all of them, which no cast, collective or mixed precision changes."""

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn

from tritonmoe.config.formats import PackedFormat, WeightFormat, find_format
from tritonmoe.config.layer import PerWeight
from tritonmoe.experts.quantized_weight import check_content

__all__ = ["as_values", "check_loaded", "from_bytes", "to_bytes"]

PACKED = ("gate_up_proj", "down_proj", "gate_up_proj_scales", "down_proj_scales")
"""The names of the parameters of experts that are bytes where weights are packed."""


def to_bytes(part: Tensor) -> Tensor:
    """Return values or scales as uint8, a view of them. One axis more tells fp8 from the weight itself, fp32 from fp32.

    Example:
        fp8 values (E, A, B) become (E, A, B, 1), so that no checkpoint takes one for the other, and fp32 scales (E, n)
        become (E, n, 4).
    """
    return part if part.dtype == torch.uint8 else part.unsqueeze(-1).view(torch.uint8)


def from_bytes(packed: PackedFormat, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values and scales that to_bytes() made these parts of."""
    if packed.values_dtype != torch.uint8:
        values = values.view(packed.values_dtype).squeeze(-1)
    if packed.scales_dtype != torch.uint8:
        scales = scales.view(packed.scales_dtype).squeeze(-1)
    return values, scales


def as_values(module: nn.Module, weight_format: WeightFormat | None, weights: PerWeight[Tensor]) -> PerWeight[Tensor]:
    """Return the weights of a call, whose packed ones are parameters of the module, with their values and scales.

    Raises:
        ValueError: a scale makes no value of bf16.
    """
    if weight_format is None or weights.gate_up_scales is None or weights.down_scales is None:
        return weights
    packed = find_format(weight_format)
    up, up_scales = from_bytes(packed, weights.gate_up_proj, weights.gate_up_scales)
    down, down_scales = from_bytes(packed, weights.down_proj, weights.down_scales)
    for name, values, scales in (("gate_up_proj", up, up_scales), ("down_proj", down, down_scales)):
        check_content(values, scales, noted_on=getattr(module, f"{name}_scales"))
    return weights._replace(gate_up_proj=up, gate_up_scales=up_scales, down_proj=down, down_scales=down_scales)


def check_loaded(module: nn.Module, state_dict: MutableMapping[str, object], prefix: str, *_: object) -> None:
    """Raise ValueError where packed weights would be loaded from plain ones, or the other way round."""
    for name in PACKED:
        value, parameter = state_dict.get(prefix + name), getattr(module, name)
        if not isinstance(value, Tensor):
            continue
        if parameter is None or (value.dtype != parameter.dtype and torch.uint8 in (value.dtype, parameter.dtype)):
            here = "not there" if parameter is None else f"{parameter.dtype}"
            raise ValueError(
                f"{prefix}{name} of the state dict is {value.dtype}, and {here} in this layer: make the layer with "
                "the same MoEConfig.weight_format as the saved layer. To pack plain weights, load them into a layer "
                "without a format, and call quantize_experts() on it"
            )
