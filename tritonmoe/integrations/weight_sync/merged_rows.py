"""Rows of a weight with PEFT's adapters added, as merge() would add them, a few rows or experts at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritonmoe.placement.watched_collectives import full_tensor

__all__ = [
    "active_adapters",
    "add_the_same",
    "check_adapter",
    "has_sharded_factors",
    "is_in_use",
    "local_part",
    "merged_rows",
]

MERGEABLE = ("Linear", "Embedding", "ParamWrapper")
"""The classes of peft.tuners.lora.layer whose adapters can be merged row by row."""
WAY_OUT = "export a copy of the model after merge_and_unload()"


def check_adapter(name: str, wrapper: nn.Module) -> None:
    """Raise ValueError unless what PEFT's wrapper of the module `name` adds to its weights is known here."""
    adapters = active_adapters(wrapper)
    if not adapters:
        return
    kind, layer = type(wrapper), _peft(wrapper)
    if kind.__module__ != "peft.tuners.lora.layer" or kind.__name__ not in MERGEABLE:
        raise ValueError(
            f"{name} has an adapter of {kind.__module__}.{kind.__name__}, and only LoRA of linear layers, embeddings "
            f"and experts is merged one weight at a time: {WAY_OUT}"
        )
    for adapter in adapters:
        if layer.lora_variant.get(adapter) is not None or layer.lora_bias.get(adapter):
            raise ValueError(f"the adapter {adapter!r} of {name} is more than two factors (DoRA, or a bias): {WAY_OUT}")


def active_adapters(wrapper: nn.Module) -> list[str]:
    """Return the adapters that are to be added to the weight: none where they are disabled, or in it already.

    Raises:
        ValueError: they are in it, and disabled, or not all of them are in it.
    """
    layer = _peft(wrapper)
    merged = list(layer.merged_adapters)
    found = [name for name in layer.active_adapters if name in _names(layer)]
    if merged and (layer.disable_adapters or set(found) != set(merged)):
        raise ValueError(
            f"the adapters {merged} are merged into the weights, and {'none' if layer.disable_adapters else found} are "
            "active: unmerge_adapter() first"
        )
    return [] if merged or layer.disable_adapters else found


def is_in_use(wrapper: nn.Module) -> bool:
    """Return whether an adapter is added to the weight, or is in it already."""
    return bool(active_adapters(wrapper)) or bool(_peft(wrapper).merged_adapters)


def _names(layer: Any) -> set[str]:
    return {name for key in layer.adapter_layer_names for name in getattr(layer, key, None) or ()}


def add_the_same(some: Sequence[nn.Module], others: Sequence[nn.Module]) -> bool:
    """Return whether two modules with one weight have the same adapters: none, or factors in the same memory."""

    def added(wrappers: Sequence[nn.Module]) -> set[tuple[float, frozenset[int]]]:
        found = [(_peft(wrapper), adapter) for wrapper in wrappers for adapter in active_adapters(wrapper)]
        memories = [
            frozenset(local_part(factor).untyped_storage().data_ptr() for factor in _factors(layer, adapter))
            for layer, adapter in found
        ]
        return {(layer.scaling[adapter], memory) for (layer, adapter), memory in zip(found, memories, strict=True)}

    return added(some) == added(others)


def has_sharded_factors(wrappers: Sequence[nn.Module]) -> bool:
    """Return whether FSDP2 has sharded the factors of experts, so that a rank has no whole ones of its own experts."""
    return any(
        hasattr(factor, "to_local") and factor.dim() == 2
        for wrapper in wrappers
        for factor in [_peft(wrapper).lora_B[adapter].weight for adapter in active_adapters(wrapper)]
    )


def merged_rows(rows: Tensor, wrappers: Sequence[nn.Module], first: int, is_local: bool) -> Tensor:
    """Return these rows of a weight with its adapters added; the rows themselves where it has none.

    Args:
        rows: (n, ...) from row `first` on: of experts, one each.
        is_local: `first` counts this rank's rows, and so do factors that are spread over ranks; else all, and every
            rank calls.
    """
    for wrapper in wrappers:
        layer = _peft(wrapper)
        for adapter in active_adapters(wrapper):
            if type(layer).__name__ == "ParamWrapper" and layer.num_experts > 1:
                delta = _experts_delta(layer, adapter, first, len(rows), is_local)
                rows = delta.to(rows.device, rows.dtype).add_(rows)  # into memory that nobody else has
            else:
                delta = _layer_delta(layer, adapter)
                # PEFT rounds what it adds to an embedding or a parameter, and of a linear layer only the sum
                rows = rows.clone().add_(delta if type(layer).__name__ == "Linear" else delta.to(rows.dtype))
    return rows


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, anything else as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _experts_delta(layer: Any, adapter: str, first: int, number: int, is_local: bool) -> Tensor:
    """Return what the adapter adds to so many experts, by the arithmetic of ParamWrapper.get_delta_weight."""
    factors = [linear[adapter].weight.detach() for linear in (layer.lora_A, layer.lora_B)]
    if is_local:
        factors = [local_part(factor) for factor in factors]
    else:
        factors = [full_tensor(factor, "export_weights, which gathers an adapter") for factor in factors]
    lora_a, lora_b = factors
    own = slice(first, first + number)
    if lora_b.dim() == 3:  # parallelize() has made it (experts, out, rank)
        num_experts, factor_b = len(lora_b), lora_b[own].permute(1, 2, 0)
    else:
        num_experts = layer.num_experts
        factor_b = lora_b.unflatten(1, (-1, num_experts))[:, :, own]
    factor_a = lora_a.unflatten(0, (num_experts, -1))[own]
    order = "e o i" if getattr(layer, "_did_swap_in_out_features", False) else "e i o"
    return torch.einsum(f"o r e, e r i -> {order}", factor_b, factor_a).mul_(layer.scaling[adapter])


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Return A and B of an adapter."""
    if type(layer).__name__ == "Embedding":
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _layer_delta(layer: Any, adapter: str) -> Tensor:
    """Return what the adapter adds to a weight, by the arithmetic of PEFT; every rank calls."""
    is_embedding = type(layer).__name__ == "Embedding"
    lora_a, lora_b = (
        full_tensor(factor.detach(), "export_weights, which gathers an adapter") for factor in _factors(layer, adapter)
    )
    dtype = lora_b.dtype
    if lora_b.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        lora_a, lora_b = lora_a.float(), lora_b.float()
    product = lora_b @ lora_a
    return ((product.T if is_embedding or layer.fan_in_fan_out else product) * layer.scaling[adapter]).to(dtype)


def _peft(wrapper: nn.Module) -> Any:
    """Return the wrapper as what it is, for type checkers, who don't know PEFT."""
    return wrapper
