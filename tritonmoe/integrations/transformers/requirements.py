"""Names, checks before anything starts (of versions, models, quantised weights), and methods put in place of others."""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "CACHES",
    "EXPERTS_IMPLEMENTATION",
    "MINIMUM_TRANSFORMERS",
    "WEIGHT_DTYPES",
    "check_forward",
    "check_model",
    "check_transformers",
    "quantisation_method",
    "quantised_kind",
    "wrap_method",
]

EXPERTS_IMPLEMENTATION = "tritonmoe"
"""The name by which transformers knows the experts, and the expert-parallel implementation, of this package."""
CACHES = ("cache", "past_key_values")
"""The arguments of a model's forward with keys and values of earlier tokens."""
MINIMUM_TRANSFORMERS = (5, 7)
"""Earlier releases accept only their own names for experts_implementation."""
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_transformers() -> tuple[int, ...]:
    """Return the first two numbers of the installed version; raise ImportError where there is none or it is too old."""
    needed = ".".join(str(number) for number in MINIMUM_TRANSFORMERS)
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"transformers is not installed: pip install 'transformers>={needed}', or 'tritonmoe[hf]'"
        ) from error
    numbers = tuple(int(number) for number in version.split(".")[:2])
    if numbers < MINIMUM_TRANSFORMERS:
        raise ImportError(
            f"transformers {version} is too old: tritonmoe needs {needed} or later, whose models take any "
            f"experts_implementation. pip install -U 'transformers>={needed}'"
        )
    return numbers


def check_model(model: object) -> None:
    """Raise TypeError unless this is a module, as models are."""
    if not isinstance(model, nn.Module):
        hint = ": load it first, with from_pretrained()" if isinstance(model, str) else ""
        raise TypeError(f"model must be a model of transformers, got {model!r}{hint}")


def check_forward(name: str, module: nn.Module) -> None:
    """Raise ValueError where another forward than its class's stands on this module, through which experts `name` run.

    Whole models pass, whose loss may be another's, torch.compile's wrappers, and what says that it wraps the class's
    (accelerate's hooks).
    """
    forward = module.__dict__.get("forward")
    if forward is None or hasattr(module, "save_pretrained") or "_orig_mod" in module._modules:
        return
    own = type(module).forward
    forward = inspect.unwrap(forward, stop=lambda inner: getattr(inner, "__func__", inner) is own)
    where, what = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", type(forward).__name__)
    is_expert_parallel = str(where).startswith("transformers.distributed.")
    if getattr(forward, "__func__", forward) is not own and not is_expert_parallel:
        raise ValueError(
            f"{name} can't run through tritonmoe: {where}.{what} has taken the place of the forward of "
            f"{type(module).__name__}. Load the model without use_kernels=True; give "
            'TrainingArguments(liger_kernel_config={"swiglu": False}) beside use_liger_kernel=True; a replacement '
            "of your own that calls the forward of the class must be marked with functools.wraps"
        )


def quantisation_method(model: nn.Module) -> str | None:
    """Return what a config in `model` calls its quantisation, as "mxfp4"; None for none, and for that of GGUF.

    Weights of a GGUF file are dequantised when they are loaded.
    """
    for module in model.modules():
        found = getattr(getattr(module, "config", None), "quantization_config", None)
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", found)
        if method not in (None, "gguf"):
            return str(getattr(method, "value", method))
    return None


def quantised_kind(weight: Tensor) -> str | None:
    """Return the kind of a quantised weight; None for a weight that holds its own numbers, sharded (DTensor) or not.

    Example:
        "Params4bit of torch.uint8" (bitsandbytes), "Int4Tensor of torch.bfloat16" (torchao, whose dtype is that of the
        weight before), "Parameter of torch.float8_e4m3fn".
    """
    if hasattr(weight, "to_local"):
        return quantised_kind(weight.to_local())
    is_plain = weight.dtype in WEIGHT_DTYPES and not hasattr(weight, "quant_state")
    if is_plain and not is_traceable_wrapper_subclass(weight):
        return None
    return f"{type(weight).__name__} of {weight.dtype}"


def wrap_method(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of a method of a class, or of a function of a module.

    Args:
        function: called with the method that it replaces, then with the arguments of the call.
    """
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*arguments: object, **keywords: object) -> object:
        return function(method, *arguments, **keywords)

    setattr(owner, name, wrapped)
