"""Which backend computes a call: by name, or what "auto" chooses from the device, the dtype and the layer."""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import re
from typing import cast

import torch

from tritonmoe.config.layer import MAX_EXPERTS, MAX_TOP_K, KernelOptions
from tritonmoe.ops.backends.ops import CalledLayer, Operations, Unchecked
from tritonmoe.ops.kernels.gpus import architecture_like

__all__ = ["BACKENDS", "check_name", "choose", "fetches_experts", "launches_kernels", "triton_unusable_reason"]

BACKENDS = ("triton", "torch", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIN_TRITON = (3, 6)
MIN_COMPUTE_CAPABILITY = (8, 0)
TRITON_PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")
log = logging.getLogger("tritonmoe")


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _triton_version() -> str | None:
    """Return the installed version without importing triton; None where no package says."""
    for package in TRITON_PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


@functools.cache
def _compute_capability(index: int | None) -> tuple[int, int] | None:
    """Return an NVIDIA device's compute capability; None where there is no such device."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)


def triton_unusable_reason(device: torch.device) -> str | None:
    """Return why the Triton kernels can't run on `device`; None where they can."""
    return _triton_unusable_reason(device, _triton_version(), os.environ.get("TRITON_INTERPRET") == "1")


def _triton_unusable_reason(device: torch.device, installed: str | None, interprets: bool) -> str | None:
    if not _is_installed("triton"):
        return "the package triton is not installed (pip install triton)"
    numbers = None if installed is None else re.match(r"(\d+)\.(\d+)", installed)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < MIN_TRITON:
        return f"triton {installed} is too old, the kernels need at least {MIN_TRITON[0]}.{MIN_TRITON[1]} (upgrade it)"
    capability = _compute_capability(device.index) if device.type == "cuda" else None
    if capability is not None and capability < MIN_COMPUTE_CAPABILITY:
        return (
            f"{device} has compute capability {capability[0]}.{capability[1]}, "
            f"the kernels need at least {MIN_COMPUTE_CAPABILITY[0]}.{MIN_COMPUTE_CAPABILITY[1]} (Ampere)"
        )
    if device.type == "cuda" or interprets:
        return None
    return (
        f"tensors are on {device.type}, the kernels need a CUDA or ROCm device "
        "(TRITON_INTERPRET=1, set before Python starts, runs them in Triton's interpreter)"
    )


def _doubted_reason(device: torch.device, installed: str | None) -> str | None:
    """Return why "auto" doesn't take kernels that may run on a device; None where nothing is known against them."""
    capability = _compute_capability(device.index) if device.type == "cuda" else None
    if installed is None or capability is None:
        return None
    major, minor = capability
    fences_since = architecture_like(f"sm_{major}{minor}").fences_since
    if tuple(map(int, re.findall(r"\d+", installed)[:3])) >= fences_since:
        return None
    return (
        f"what Triton {installed} makes for compute capability {major}.{minor} lacks a barrier and fences "
        f"(triton-lang/triton#9871): upgrade it to {'.'.join(map(str, fences_since))}. With backend='triton' kernels "
        "run, and load nothing asynchronously"
    )


def _beyond_limits(dtype: torch.dtype, num_experts: int, top_k: int) -> str | None:
    """Return why the Triton kernels can't compute such a layer on any device; None where they can."""
    if dtype == torch.float64:
        return "the kernels compute in fp32, fp16 and bf16, not in fp64"
    if num_experts > MAX_EXPERTS:
        return f"there are {num_experts} experts on this device, the kernels take at most {MAX_EXPERTS}"
    if top_k > MAX_TOP_K:
        return f"K is {top_k} experts per token, the kernels take at most {MAX_TOP_K}"
    return None


def check_name(backend: str) -> None:
    """Raise ValueError unless this is "auto" or the name of a backend."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    options: KernelOptions = KernelOptions(),
    *,
    num_experts: int = 1,
    top_k: int = 1,
    layer: CalledLayer | None = None,
) -> Operations:
    """Return the backend module for `backend` ("auto", "triton", "torch" or "reference").

    "auto" is triton on a GPU whose kernels were seen to be right (first_use.py) and torch elsewhere; the choice and its
    reason are logged once. Only triton can be batch invariant: the libraries behind PyTorch's products choose their
    code by the number of rows, and round a row differently with its neighbours.

    Args:
        num_experts: on this device. top_k: experts per token.
        layer: what is seen to be right; else one of many layers.
    Raises:
        ValueError: the name is not known, or the backend can't run these tensors with these options.
        TypeError: no backend computes in this dtype.
    """
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    arguments = device, dtype, options, num_experts, top_k, layer, _triton_version(), interprets
    try:
        return _choose(backend, *arguments)
    except Unchecked:  # taken for right in this call, and asked again in the next one
        return _choose("triton", *arguments)


@functools.lru_cache(maxsize=1024)
def _choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    options: KernelOptions,
    num_experts: int,
    top_k: int,
    layer: CalledLayer | None,
    triton_version: str | None,
    interprets: bool,
) -> Operations:
    check_name(backend)
    if dtype not in DTYPES:
        raise TypeError(
            f"experts compute in float32, bfloat16, float16 or float64, got {dtype}: cast x and the weights "
            "(quantised ones are given as tritonmoe.QuantizedWeight)"
        )
    reason = _triton_unusable_reason(device, triton_version, interprets) or _beyond_limits(dtype, num_experts, top_k)
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend='triton' can't run here: {reason}. Use backend='auto', 'torch' or 'reference'.")
    if backend == "auto":
        if reason is None and device.type != "cuda":
            reason = "the interpreter is for tests only"
        reason = reason or _doubted_reason(device, triton_version)
        if reason is None and not _are_experts_right(device, dtype, options, num_experts, top_k, layer):
            reason = "its kernels are wrong here"
        backend = "triton" if reason is None else "torch"
        if reason is not None:
            log.info("backend 'auto' chose torch: %s", reason)
    if options.batch_invariant and backend != "triton":
        raise ValueError(
            f"batch_invariant=True needs backend='triton', but this call runs on {backend!r} "
            f"({reason or 'as it asked for'}): PyTorch's matrix products round a row differently with its neighbours. "
            "Use batch_invariant=False here"
        )
    return cast(Operations, importlib.import_module(f"{__package__}.{backend}"))


def _are_experts_right(
    device: torch.device,
    dtype: torch.dtype,
    options: KernelOptions = KernelOptions(),
    num_experts: int = 1,
    top_k: int = 1,
    layer: CalledLayer | None = None,
) -> bool:
    """Return whether kernels are right in a call's own layer or, if none is given, in the first checked layer."""
    from tritonmoe.ops.backends import first_use, kernel_check  # only where kernels run: a CPU may have no Triton

    ops = choose("triton", device, dtype)
    if layer is None:
        cases, what = [dataclasses.replace(kernel_check.CASES[0], dtype=dtype)], "experts"
    else:
        cases = kernel_check.cases_like(layer, dtype, options, num_experts, top_k)
        what = f"experts ({cases[0].name})"
    checks = (kernel_check.check_layer(case, ops, device) for case in cases)
    return first_use.are_right(device, dtype, what, lambda: itertools.chain.from_iterable(checks))


def launches_kernels(ops: Operations) -> bool:
    """Return whether these operations are kernels of this package, which PyTorch's modes don't see."""
    return ops.__name__ == f"{__package__}.triton"


def fetches_experts(ops: Operations) -> bool:
    """Return whether these operations take one expert at a time, which may come from a file."""
    return ops.__name__ == f"{__package__}.torch"
