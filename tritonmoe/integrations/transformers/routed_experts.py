"""Which modules of a model get routed tokens, of transformers and of tritonmoe, and which block routes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.sharding import transport_of
from tritonmoe.layer import MoELayer
from tritonmoe.runtime.wrappers import COPIES, INSIDE
from tritonmoe.transports import Transport

__all__ = ["RoutedExperts", "routed_experts", "routed_ids"]

WRAPPERS = {*INSIDE, "original_module", COPIES}
"""What wrappers call the module inside."""
PREFIXES = ("module.", "base_model.model.")
"""What DistributedDataParallel and PEFT put before the names of a whole model."""


@dataclass(frozen=True)
class RoutedExperts:
    """A module that gets rows, ids and weights."""

    experts: nn.Module
    block: nn.Module | None
    """The module around it whose forward runs the router, then the experts; None where there is none in the model."""
    layer: str
    """Its name without those that wrappers add: the same in a model, in DistributedDataParallel and under PEFT.

    A module and the copies that PEFT's modules_to_save made of it, of which one runs, share it.
    """
    num_experts: int
    """E, over all ranks."""
    transport: Transport | None
    """Over what its rows go; None where its experts are all here."""


def routed_experts(model: nn.Module) -> dict[str, RoutedExperts]:
    """Give the modules of a model that get routed tokens by name, in the model's order.

    Raises:
        ValueError: there are none, neither experts that go through transformers' registry, nor tritonmoe's own.
    """
    found: dict[str, RoutedExperts] = {}
    registered = experts_modules(model)
    for name, module in model.named_modules():
        if name in registered:
            num_experts, transport = registered[name].down_proj.shape[0], transport_of(module)
            found[name] = RoutedExperts(module, _block(model, name), _layer(name), num_experts, transport)
        elif isinstance(module, MoELayer):
            own_name = f"{name}.experts" if name else "experts"
            num_experts, transport = module.config.num_experts, module.grouped_experts.transport
            found[own_name] = RoutedExperts(module.experts, module, _layer(own_name), num_experts, transport)
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts that go through transformers' registry")
    return found


def routed_ids(arguments: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Give the ids and weights (T, K) of a call of such a module."""
    own = [keywords.get("hidden_states"), keywords.get("top_k_index"), keywords.get("top_k_weights")]
    own[: len(arguments)] = arguments[:3]
    _, topk_ids, topk_weights = own
    assert topk_ids is not None
    assert topk_weights is not None
    return topk_ids, topk_weights


def _block(model: nn.Module, name: str) -> nn.Module | None:
    parts = name.split(".")
    while _is_wrapper(parts, len(parts) - 1):
        parts.pop()
    return model.get_submodule(".".join(parts[:-1])) if parts != [""] else None


def _layer(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.removeprefix("module.").removeprefix("base_model.model.")
    parts = name.split(".")
    return ".".join(part for place, part in enumerate(parts) if not _is_wrapper(parts, place))


def _is_wrapper(parts: Sequence[str], place: int) -> bool:
    """Say whether a part of a module's name is what a wrapper calls what it wraps."""
    return parts[place] in WRAPPERS or (place > 0 and parts[place - 1] == COPIES)
