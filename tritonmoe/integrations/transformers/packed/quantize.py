"""quantize_experts(): pack the experts of a model, or of layers, in place, and say what that changes."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tritonmoe.config.formats import check_packable, find_format
from tritonmoe.experts.packed_parameters import to_bytes
from tritonmoe.experts.quantized_weight import QuantizedWeight
from tritonmoe.integrations.torch_distributed.parallelize import routed_experts
from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.experts import PRECISION
from tritonmoe.integrations.transformers.packed.packed_experts import (
    PackedLayout,
    is_packed_experts,
    is_transposed,
    set_packed,
    up_name,
)
from tritonmoe.integrations.transformers.registration import check_patchable, patch
from tritonmoe.layer import GroupedExperts
from tritonmoe.placement.offloaded import offloaded_of

__all__ = ["QuantizeReport", "QuantizedLayer", "quantize_experts"]


@dataclass(frozen=True)
class QuantizedLayer:
    """What packing has changed in the weights of one module of experts."""

    name: str
    errors: dict[str, float]
    """By weight: the norm of what rounding has changed, as a share of the weight's norm."""
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizeReport:
    """What quantize_experts() did."""

    weight_format: str
    layers: tuple[QuantizedLayer, ...]

    def __str__(self) -> str:
        before, after = (sum(getattr(one, name) for one in self.layers) for name in ("bytes_before", "bytes_after"))
        sizes = f"{before / 1e6:.1f} MB are {after / 1e6:.1f}"
        lines = [f"experts of {len(self.layers)} layers in {self.weight_format}, computed in bf16: {sizes}"]
        for layer in self.layers:
            said = ", ".join(f"{name} {error:.2%}" for name, error in layer.errors.items())
            lines.append(f"  {layer.name or 'experts'}: {said}")
        return "\n".join(lines)


def quantize_experts(model: nn.Module, weight_format: Literal["nf4", "mxfp4"]) -> QuantizeReport:
    """Round the experts of a model to nearest in 4 bits, in place and one at a time, and freeze them.

    `model` is a MoE model of transformers, which then runs through tritonmoe, or has MoELayers or GroupedExperts. Make
    adapters, the optimizer, and ranks (parallelize) afterwards. nf4 rounds as bitsandbytes does (blocks of 64), mxfp4
    as transformers does. Packed experts compute in bf16, whatever the dtype of the model: without autocast a model of
    transformers in fp32 or fp16 rounds their rows to bf16, and its first forward logs a warning; a MoELayer raises
    TypeError for them. Blocks that share one module of experts go on sharing it, packed.

    Returns:
        How much the weights of each layer have changed; str() of it is a table, which says the computing dtype.
    Raises:
        ValueError: the model has no such experts, or they are packed, spread over ranks, adapted, computed from other
            parameters, or of sizes or values that the format can't hold, or patch() would refuse the model. Nothing is
            changed.
    """
    find_format(weight_format)
    if weight_format not in ("nf4", "mxfp4"):
        raise ValueError(f"experts are quantised to 'nf4' or 'mxfp4', got {weight_format!r}")
    of_transformers = experts_modules(model)
    found: dict[str, nn.Module] = {**of_transformers, **routed_experts(model)}
    if not found:
        patch(model)  # it says what is missing
    for name, experts in found.items():
        _check(name, experts, weight_format)
    if of_transformers:
        check_patchable(model, of_transformers)
    layers = [_quantize(name, experts, weight_format) for name, experts in found.items()]
    if of_transformers:
        patch(model)
        for module in model.modules():
            if hasattr(module, "save_pretrained"):
                module.__dict__["save_pretrained"] = _refuse_save
    return QuantizeReport(weight_format, tuple(layers))


def _refuse_save(*_: object, **__: object) -> None:
    """Stand in the place of a model's save_pretrained."""
    raise ValueError(
        "no release of transformers reads the experts that quantize_experts() has packed: save the adapters (of a PEFT "
        "model, save_pretrained), and load the model again as it was, with quantize_experts() after it, which gives "
        "the same bits"
    )


def _weight_names(experts: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if isinstance(experts, GroupedExperts) else up_name(experts)), "down_proj"


def _check(name: str, experts: nn.Module, weight_format: Literal["nf4", "mxfp4"]) -> None:
    where = name or "the module"
    if (offloaded := offloaded_of(experts)) is not None:
        raise ValueError(
            f"the experts of {where} stay in {offloaded.place} since offload_experts(): load the model again, and call "
            "quantize_experts() first"
        )
    is_packed = experts.config.weight_format if isinstance(experts, GroupedExperts) else is_packed_experts(experts)
    if is_packed:
        raise ValueError(f"the experts of {where} are packed already")
    precision = experts.spec.precision if isinstance(experts, GroupedExperts) else getattr(experts, PRECISION, None)
    if precision is not None:
        raise ValueError(
            f"{precision} of {where} is for experts that train, and packed ones are frozen: call "
            "set_expert_precision(model, None) first"
        )
    for weight in _weight_names(experts):
        parameter = experts._parameters.get(weight)
        if parameter is None or hasattr(parameter, "to_local") or not parameter.is_floating_point():
            raise ValueError(
                f"{weight} of {where} is no plain parameter here (spread over ranks, adapted, or computed): "
                "quantise the experts first, then adapt them and call parallelize()"
            )
        if parameter.is_meta:
            raise ValueError(f"{weight} of {where} is on the meta device, and has no values yet: load it first")
        if parameter.itemsize < 2:
            raise ValueError(f"{weight} of {where} is {parameter.dtype}: it is quantised already")
        find_format(weight_format).scales_shape(tuple(_stored(experts, weight_format, parameter).shape))
        check_packable(parameter)
    if isinstance(experts, GroupedExperts) and experts.transport is not None:
        raise ValueError(f"the experts of {where} are spread over ranks: quantise them first, then call parallelize()")


def _stored(experts: nn.Module, weight_format: str, weight: Tensor) -> Tensor:
    """Return a weight as the format has it: of models, perhaps with blocks along what is summed over."""
    is_own = isinstance(experts, GroupedExperts)
    is_swapped = find_format(weight_format).blocks_along_depth and not is_own and is_transposed(experts)
    return weight.detach().mT if is_swapped else weight.detach()


@torch.no_grad()
def _quantize(name: str, experts: nn.Module, weight_format: Literal["nf4", "mxfp4"]) -> QuantizedLayer:
    """Pack one module; of its plain weights each is gone before the next one is packed."""
    errors, sizes, packed = {}, [0, 0], find_format(weight_format)
    for weight in _weight_names(experts):
        plain = experts.get_parameter(weight)
        del experts._parameters[weight]
        stored = _stored(experts, weight_format, plain)
        quantized = QuantizedWeight.pack(stored, weight_format)
        errors[weight] = _error(stored, quantized)
        sizes[0] += plain.nbytes
        sizes[1] += quantized.nbytes
        parts = to_bytes(quantized.values), to_bytes(quantized.scales)
        if isinstance(experts, GroupedExperts):
            for own_name, part in zip((weight, f"{weight}_scales"), parts, strict=True):
                experts.register_parameter(own_name, nn.Parameter(part, requires_grad=False))
            continue
        if packed.blocks_along_depth:
            parts = parts[0].unflatten(2, (-1, packed.block // packed.per_element)), parts[1]
        swapped = not packed.blocks_along_depth and is_transposed(experts)
        set_packed(experts, weight, parts, tuple(plain.shape), PackedLayout(weight_format, swapped))
    if isinstance(experts, GroupedExperts):
        experts.config = replace(experts.config, weight_format=weight_format)
    return QuantizedLayer(name, errors, *sizes)


def _error(stored: Tensor, packed: QuantizedWeight) -> float:
    """Return the relative error of a packed weight, decoded one expert at a time."""
    difference, norm = 0.0, 0.0
    for expert, one in enumerate(stored):
        own = slice(expert, expert + 1)
        decoded = QuantizedWeight(packed.format, packed.values[own], packed.scales[own]).decode()[0]
        difference += float((decoded.double() - one.double()).square().sum())
        norm += float(one.double().square().sum())
    return (difference / norm) ** 0.5 if norm else 0.0
