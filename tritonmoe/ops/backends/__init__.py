"""The seven operations, three times with one signature, and the choice between them."""

from tritonmoe.ops.backends.backend_choice import (
    BACKENDS,
    check_name,
    choose,
    fetches_experts,
    launches_kernels,
    triton_unusable_reason,
)

__all__ = ["BACKENDS", "check_name", "choose", "fetches_experts", "launches_kernels", "triton_unusable_reason"]
