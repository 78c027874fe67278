"""What stands in a module's place: wrappers of torch.compile, checkpoints, FSDP and PEFT, and what they run."""

from typing import Any

from torch import nn

__all__ = ["COPIES", "INSIDE", "inside_wrapper"]

INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
"""What wrappers call the module inside: torch.compile, FSDP, checkpoint_wrapper, PEFT's adapters."""
COPIES = "modules_to_save"
"""What PEFT calls the copies that it trains of a module, by adapter, beside the module itself, `original_module`."""


def inside_wrapper(wrapper: nn.Module) -> nn.Module:
    """Give what a wrapper runs: the module inside or, of PEFT's modules_to_save, the copy in force.

    Raises:
        TypeError: it is no wrapper of these kinds.
    """
    modules = wrapper._modules
    copies: Any = modules.get(COPIES)
    if copies is not None:
        of_wrapper: Any = wrapper
        active = () if of_wrapper.disable_adapters else of_wrapper.active_adapters
        return copies[active[0]] if active and active[0] in copies else wrapper.get_submodule("original_module")
    for name in INSIDE:
        inside = modules.get(name)
        if inside is not None:
            return inside
    raise TypeError(
        f"a {type(wrapper).__name__} stands where experts are expected, and is no wrapper that is known here: those of "
        "torch.compile, checkpoint_wrapper, FSDP and PEFT are"
    )
