"""Which operations compute in an ExpertPrecision: products of codes where the card has the instruction, or emulated."""

import itertools
import logging
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, cast

import torch

from tritonmoe.config.layer import KernelOptions
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.ops.backends.backend_choice import launches_kernels, triton_unusable_reason
from tritonmoe.ops.backends.ops import CalledLayer, Operations, Unchecked
from tritonmoe.ops.backends.rounded import RoundedOperations

__all__ = ["EMULATED", "how_computed", "operations_in"]

log = logging.getLogger("tritonmoe")
EMULATED = "emulated: bf16 products of rounded numbers, which take longer than a layer in bf16"


def operations_in(
    ops: Operations,
    precision: ExpertPrecision,
    backend: str,
    device: torch.device,
    options: KernelOptions,
    num_experts: int,
    top_k: int,
    layer: CalledLayer,
) -> Operations:
    """Return the operations of a call in a precision.

    They multiply codes where `ops` are kernels and the card has the instruction; with backend="auto" where such
    products were seen to be right, too. Elsewhere they are emulated, which is logged once.

    Args:
        ops: what was chosen for the call without a precision, of which the other arguments are those of `choose`.
    """
    if launches_kernels(ops):
        from tritonmoe.ops.backends.encoded import EncodedOperations
        from tritonmoe.ops.kernels.launch import gpu_of

        arguments = precision, device, options, num_experts, top_k, layer
        serves = precision.format in gpu_of(device).precisions
        if serves and (backend != "auto" or _are_products_right(*arguments)):
            return cast(Operations, EncodedOperations(precision))
    _say_emulated(precision.format)
    return cast(Operations, RoundedOperations(ops, precision))


def _are_products_right(*arguments: Any) -> bool:
    try:
        return _are_seen_to_be_right(*arguments)
    except Unchecked:  # taken for right in this call, and asked again in the next one
        return True


@lru_cache(maxsize=1024)
def _are_seen_to_be_right(
    precision: ExpertPrecision,
    device: torch.device,
    options: KernelOptions,
    num_experts: int,
    top_k: int,
    layer: CalledLayer,
) -> bool:
    """Return whether products of codes are right in a call's own layer."""
    from tritonmoe.ops.backends import first_use, kernel_check
    from tritonmoe.ops.backends.encoded import EncodedOperations

    # Gradients of weights are products of a layer in bf16, which has been checked.
    precision = replace(precision, weight_gradients="bf16")
    cases = kernel_check.cases_like(layer, torch.bfloat16, options, num_experts, top_k, precision)
    encoded = cast(Operations, EncodedOperations(precision))
    checks = (kernel_check.check_layer(case, encoded, device) for case in cases)
    what, instead = f"experts ({cases[0].name})", "products of rounded numbers in bf16"
    return first_use.are_right(device, torch.bfloat16, what, lambda: itertools.chain.from_iterable(checks), instead)


@cache
def _say_emulated(precision_format: str) -> None:
    """Log once that no instruction of the device is used."""
    log.warning("experts in %s are %s: results are those of the precision", precision_format, EMULATED)


def how_computed(precision_format: str, device: torch.device) -> str:
    """Return how a layer with backend="auto" computes in a format on a device, as `tritonmoe env` shows it."""
    if device.type != "cuda" or triton_unusable_reason(device) is not None:
        return EMULATED
    from tritonmoe.ops.kernels.launch import gpu_of

    gpu = gpu_of(device)
    return f"8-bit instructions of {gpu.name}" if precision_format in gpu.precisions else EMULATED
