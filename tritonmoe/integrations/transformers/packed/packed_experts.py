"""Packed weights of an experts module of transformers: where they are, whoever has put them there.

MXFP4 as gpt-oss has it, or what quantize_experts() made: `NAME_blocks` and `NAME_scales`, bytes, in place of `NAME`.
FP8 as transformers has it: `NAME` and `NAME_scale_inv`. NF4 as bitsandbytes has it: a parametrization of `NAME`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from tritonmoe.config.formats import WeightFormat, find_format
from tritonmoe.experts.packed_parameters import from_bytes
from tritonmoe.experts.quantized_weight import check_content
from tritonmoe.runtime.stand_in import make_stand_in

__all__ = [
    "PACKED",
    "PackedLayout",
    "is_packed_experts",
    "is_packed_weight",
    "is_transposed",
    "logical_shape_of",
    "num_experts_of",
    "read_packed",
    "set_packed",
    "up_name",
    "weight_names",
]

PACKED = "_tritonmoe_packed"
"""The attribute of an experts module with blocks and scales; it holds its PackedLayout."""
FOREIGN = "Bnb4bitParametrization"
"""The class of bitsandbytes with which a weight is decoded, all of it, whenever somebody asks for it."""
Take = Callable[[str], Tensor]
"""What gives a parameter of a module by its name: all experts, or those of this rank."""


class PackedLayout(NamedTuple):
    """How the packed weights of a module lie."""

    weight_format: WeightFormat
    is_transposed: bool
    """Whether they are (E, D, 2F) and (E, F, D); mxfp4 is not, where the bf16 weights of gpt-oss are."""


class _QuantState(Protocol):
    """bitsandbytes' state of a packed weight, as far as it is read here."""

    absmax: Tensor
    shape: torch.Size
    """The weight's own."""


WHY = (
    'it is a packed weight of experts: call model.set_experts_implementation("tritonmoe"), or load the model without '
    "register(packed=True)"
)


def set_packed(
    experts: nn.Module, name: str, parts: tuple[Tensor, Tensor], shape: tuple[int, ...], layout: PackedLayout
) -> None:
    """Replace a weight of the module by bytes, of values and scales.

    Under its name stays a tensor that has its shape, and is no parameter.
    """
    experts._parameters.pop(name, None)
    experts.__dict__[name] = make_stand_in(shape, torch.bfloat16, WHY, is_initialised=True)
    for suffix, part in zip(("blocks", "scales"), parts, strict=True):
        experts.register_parameter(f"{name}_{suffix}", nn.Parameter(part, requires_grad=False))
    setattr(experts, PACKED, layout)


def is_packed_experts(experts: nn.Module) -> bool:
    """Return whether a weight of this module is packed in a way that is read here."""
    return is_packed_weight(experts, up_name(experts)) or is_packed_weight(experts, "down_proj")


def is_packed_weight(experts: nn.Module, name: str) -> bool:
    """Return whether this weight of a module is packed in a way that is read here."""
    own = f"{name}_scale_inv"  # offloaded, it is no parameter any more
    return (
        hasattr(experts, PACKED) or own in experts._parameters or own in experts.__dict__ or _is_foreign(experts, name)
    )


def up_name(experts: nn.Module) -> str:
    """Return the name of the up-projection of a module."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def is_transposed(experts: nn.Module) -> bool:
    """Return whether the weights of a module are (E, D, 2F) and (E, F, D)."""
    return bool(getattr(experts, "is_transposed", False))


def weight_names(experts: nn.Module) -> tuple[str, ...]:
    """Return the names of the module's parameters of which each expert has a part, packed or not."""
    suffixes = ("", "_bias", "_blocks", "_scales", "_scale_inv")
    named = [f"{name}{suffix}" for name in (up_name(experts), "down_proj") for suffix in suffixes]
    return tuple(name for name in experts._parameters if name in named)


def num_experts_of(experts: nn.Module) -> int:
    """Return how many experts the weights of a module have here, without reading one."""
    if hasattr(experts, PACKED):
        return int(cast(Tensor, experts.down_proj_blocks).shape[0])
    if _is_foreign(experts, "down_proj"):
        return int(_foreign_state(experts, "down_proj").shape[0])
    weight = cast(Tensor, experts.down_proj)  # whatever a parametrization makes of it
    return int(weight.shape[0])


def read_packed(experts: nn.Module, name: str, take: Take) -> tuple[Tensor, Tensor, bool]:
    """Return the values and scales of a packed weight, as PerWeight has them, and whether it is transposed.

    Raises:
        ValueError: bitsandbytes has packed it otherwise than NF4 in blocks of 64 with plain scales.
    """
    layout: PackedLayout | None = getattr(experts, PACKED, None)
    swapped = is_transposed(experts)
    if layout is not None:
        parts = take(f"{name}_blocks").flatten(2), take(f"{name}_scales")
        values, scales = from_bytes(find_format(layout.weight_format), *parts)
        noted_on, swapped = getattr(experts, f"{name}_scales"), layout.is_transposed
    elif f"{name}_scale_inv" in experts._parameters:
        values, scales = take(name), take(f"{name}_scale_inv")
        if values.dtype == torch.int8:  # e2m1 with a power of two for a row and 32 columns
            values, scales = values.view(torch.uint8), scales.view(torch.uint8)
        noted_on = getattr(experts, f"{name}_scale_inv")
    else:
        state = _foreign_state(experts, name)
        _check_foreign(name, state)
        values = experts.get_submodule(f"parametrizations.{name}").get_parameter("original")
        scales = noted_on = state.absmax
        num_experts, rows, columns = state.shape
        values = values.detach().view(num_experts, rows, columns // 2)
        scales = scales.view(num_experts, -1)
    check_content(values, scales, noted_on=noted_on)
    return values, scales, swapped


def logical_shape_of(experts: nn.Module, name: str) -> tuple[int, ...]:
    """Return the shape of a packed weight as the module's class has it, of the experts that are here."""
    if _is_foreign(experts, name):
        return tuple(_foreign_state(experts, name).shape)
    if hasattr(experts, PACKED):
        shaped: Tensor = experts.__dict__[name] if name in experts.__dict__ else getattr(experts, name)
        return num_experts_of(experts), *shaped.shape[1:]
    return tuple(getattr(experts, name).shape)


def _is_foreign(experts: nn.Module, name: str) -> bool:
    own = getattr(experts, "parametrizations", {})
    return name in own and type(own[name][0]).__name__ == FOREIGN


def _foreign_state(experts: nn.Module, name: str) -> _QuantState:
    return cast(_QuantState, experts.get_submodule(f"parametrizations.{name}.0").quant_state)


def _check_foreign(name: str, state: object) -> None:
    kind, size = getattr(state, "quant_type", None), getattr(state, "blocksize", None)
    if kind != "nf4" or size != 64 or getattr(state, "nested", False):
        nested = ", with scales that are quantised too" if getattr(state, "nested", False) else ""
        raise ValueError(
            f"{name} is quantised by bitsandbytes as {kind} in blocks of {size}{nested}: experts run on nf4 in blocks "
            "of 64 with plain scales. Call replace_parameter_4bit with quant_type='nf4' and without "
            "compress_statistics, or leave the experts out"
        )
