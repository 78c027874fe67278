"""Packed weights as parameters of a module: what casts, loading and a call make of them."""

from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor, nn

from tritonmoe.config.layer import PerWeight
from tritonmoe.experts.quantized_weight import check_content, is_packed

__all__ = ["apply_to_packed", "as_values", "check_loaded"]

PACKED = ("gate_up_proj", "down_proj", "gate_up_proj_scales", "down_proj_scales")
"""The names of the parameters that are not to be cast where weights are packed."""


def apply_to_packed(module: nn.Module, fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return fn(tensor), as Module._apply wants it, but in its own dtype where this is a packed weight of the module.

    Of a DTensor, and under FSDP2, it is that tensor itself which comes here.
    """
    applied = fn(tensor)
    if applied.dtype == tensor.dtype or getattr(module, "gate_up_proj_scales", None) is None:
        return applied
    own = [getattr(module, name) for name in PACKED]
    is_own = any(tensor is one or tensor is getattr(one, "data", None) for one in own)
    return tensor.to(applied.device) if is_own else applied


def as_values(module: nn.Module, weights: PerWeight[Tensor]) -> PerWeight[Tensor]:
    """Return the weights of a module's call with packed values in their own dtype, which parameters have as bytes.

    Raises:
        ValueError: a scale makes no value of bf16.
    """
    if not is_packed(weights):
        return weights
    if getattr(getattr(module, "config", None), "weight_format", None) == "fp8":
        up, down = (values.view(torch.float8_e4m3fn) for values in (weights.gate_up_proj, weights.down_proj))
        weights = weights._replace(gate_up_proj=up, down_proj=down)
    for name, values, scales in (
        ("gate_up_proj_scales", weights.gate_up_proj, weights.gate_up_scales),
        ("down_proj_scales", weights.down_proj, weights.down_scales),
    ):
        if scales is not None:
            check_content(values, scales, noted_on=getattr(module, name))
    return weights


def check_loaded(module: nn.Module, state_dict: MutableMapping[str, object], prefix: str, *_: object) -> None:
    """Raise ValueError where packed weights would be loaded from plain ones, or the other way round."""
    for name in PACKED:
        value, parameter = state_dict.get(prefix + name), getattr(module, name)
        if not isinstance(value, Tensor):
            continue
        if parameter is None or (value.dtype != parameter.dtype and not (is_plain(value) and is_plain(parameter))):
            here = "not there" if parameter is None else f"{parameter.dtype}"
            raise ValueError(
                f"{prefix}{name} of the state dict is {value.dtype}, and {here} in this layer: a layer with the "
                "MoEConfig.weight_format of the one that was saved takes it. To pack plain weights, load them into a "
                "layer without a format, and call quantize_experts on it"
            )


def is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
