"""What stands in a module's place: wrappers of torch.compile, checkpoints, FSDP and PEFT, and what they run."""

from typing import Any

from torch import nn

__all__ = ["COPIES", "INSIDE", "innermost", "inside_wrapper"]

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


def innermost(module: nn.Module) -> nn.Module:
    """Return what stands inside all wrappers around a module; the module itself where there is none."""
    while (inside := inside_wrapper(module)) is not None:
        module = inside
    return module
