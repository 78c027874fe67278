"""What stands in the place of a module (wrappers of torch.compile, checkpoints, FSDP, PEFT) or of a parameter."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from tritonmoe.runtime.stand_in import StandIn

__all__ = ["COPIES", "INSIDE", "innermost", "inside_wrapper", "refuse_computed"]

INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
"""What wrappers call the module inside: torch.compile, FSDP, checkpoint_wrapper, PEFT's adapters."""
COPIES = "modules_to_save"
"""What PEFT calls the copies that it trains of a module, by adapter, beside the module itself, `original_module`."""


def inside_wrapper(module: nn.Module) -> nn.Module | None:
    """Return what a wrapper runs: the module inside or, of modules_to_save, the active copy; None for no wrapper."""
    modules = module._modules
    copies: Any = modules.get(COPIES)
    if copies is None:
        found = (modules.get(name) for name in INSIDE)
        return next((inside for inside in found if inside is not None), None)
    wrapper: Any = module
    active = () if wrapper.disable_adapters else wrapper.active_adapters
    return copies[active[0]] if active and active[0] in copies else wrapper.original_module


def refuse_computed(owner: str, module: nn.Module, names: Iterable[str], before: str) -> None:
    """Raise ValueError where a weight of a module is no parameter, but computed from others for every call.

    Whatever writes into the weights of experts, or says which parameters they are, calls it before.

    Args:
        owner: the module's name, for the error. names: of the weights. before: what has to wait.
    """
    for name in names:
        if isinstance(stand_in := module.__dict__.get(name), StandIn):
            raise ValueError(f"{name} of {owner} has no values for {before}: {stand_in.why}")
        if name not in module._parameters and (name in module.__dict__ or hasattr(type(module), name)):
            raise ValueError(
                f"{name} of {owner} is computed from other parameters (a parametrization, pruning or weight_norm), and "
                f"whatever is written into {name} itself is lost: make it a parameter again before {before}, with "
                "torch.nn.utils.parametrize.remove_parametrizations, prune.remove, remove_weight_norm or "
                "remove_spectral_norm"
            )


def innermost(module: nn.Module) -> nn.Module:
    """Return what stands inside all wrappers around a module; the module itself where there is none."""
    while (inside := inside_wrapper(module)) is not None:
        module = inside
    return module
