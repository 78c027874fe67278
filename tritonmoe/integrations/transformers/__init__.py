"""Hugging Face transformers: `register()` makes experts_implementation="tritonmoe" work in every MoE model.

Importing this package imports no transformers; register() does.
"""

import importlib.metadata

from .patching import PatchReport, patch
from .upcycle import UpcycleReport, upcycle, verify_upcycle
from .upcycle_checkpoint import upcycle_checkpoint
from .upcycle_inplace import aux_loss
from .upcycle_saved import load_upcycled

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "MINIMUM_TRANSFORMERS",
    "PatchReport",
    "UpcycleReport",
    "aux_loss",
    "load_upcycled",
    "patch",
    "register",
    "upcycle",
    "upcycle_checkpoint",
    "verify_upcycle",
]

EXPERTS_IMPLEMENTATION = "tritonmoe"
MINIMUM_TRANSFORMERS = (5, 7)
"""Earlier releases accept only their own names for experts_implementation."""


def register() -> None:
    """Give transformers' MoE models the experts implementation "tritonmoe"; calling it again changes nothing.

    Raises:
        ImportError: transformers is missing or older than 5.7.
    Example:
        register()
        model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="tritonmoe")
        model.set_experts_implementation("eager")      # and back: model.set_experts_implementation("tritonmoe")
    """
    _check_version()
    from transformers.integrations.moe import ExpertsInterface

    from .experts import experts_forward

    ExpertsInterface.register(EXPERTS_IMPLEMENTATION, experts_forward)


def _check_version() -> None:
    needed = ".".join(str(number) for number in MINIMUM_TRANSFORMERS)
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"transformers is not installed: pip install 'transformers>={needed}', or 'tritonmoe[hf]'"
        ) from error
    if tuple(int(number) for number in version.split(".")[:2]) < MINIMUM_TRANSFORMERS:
        raise ImportError(
            f"transformers {version} is too old: experts_implementation={EXPERTS_IMPLEMENTATION!r} needs {needed} "
            f"or later. pip install -U 'transformers>={needed}'"
        )
