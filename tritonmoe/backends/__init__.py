"""The seven operations, three times with one signature, and the choice between them."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

# Not `import torch`: importing the submodule of that name would rebind it.
from torch import device as Device
from torch import dtype as DType
from torch import float64

__all__ = ["BACKENDS", "choose", "triton_unusable_reason"]

BACKENDS = ("triton", "torch", "reference")
log = logging.getLogger("tritonmoe")


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def triton_unusable_reason(device: Device) -> str | None:
    """Say why the Triton kernels can't run on `device`; None where they can."""
    if not _is_installed("triton"):
        return "the package triton is not installed (pip install triton)"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"tensors are on {device.type}, the kernels need a CUDA or ROCm device "
        "(TRITON_INTERPRET=1, set before Python starts, runs them in Triton's interpreter)"
    )


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)


def choose(backend: str, device: Device, dtype: DType) -> ModuleType:
    """Give the module of ops for `backend` ("auto", "triton", "torch" or "reference").

    "auto" is triton on a GPU and torch elsewhere; the choice and its reason are logged once.

    Raises:
        ValueError: the name is not known, or the backend can't run these tensors.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = triton_unusable_reason(device)
    if reason is None and dtype == float64:
        reason = "the kernels compute in fp32, fp16 and bf16, not in fp64"
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend='triton' can't run here: {reason}. Use backend='auto', 'torch' or 'reference'.")
    if backend == "auto":
        if reason is None and device.type == "cuda":
            backend = "triton"
        else:
            backend = "torch"
            _log_once(f"backend 'auto' chose torch: {reason or 'the interpreter is for tests only'}")
    return importlib.import_module(f"{__name__}.{backend}")
