"""A measured tile that the compiler or the GPU refuses is left out with a warning, and the table's takes its place.

Its key has the architecture, Triton's version and the product, but not the driver, ptxas, or all that is beside it in a
kernel: a bias, an activation, an addend.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from triton.errors import TritonError

from tritonmoe.ops.kernels.tiles import measured_tiles

__all__ = ["is_refusal", "leaving_out_refused_tiles"]

P = ParamSpec("P")
R = TypeVar("R")


def is_refusal(error: BaseException) -> bool:
    """Return whether Triton raised before anything ran: a compiler's error, or resources that a launch hasn't."""
    return isinstance(error, TritonError) or (isinstance(error, RuntimeError) and "PassManager::run" in str(error))


def leaving_out_refused_tiles(operation: Callable[P, R]) -> Callable[P, R]:
    """Wrap an operation that launches one grouped product: it runs again without a measured tile that was refused."""

    @functools.wraps(operation)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return operation(*args, **keywords)
        except Exception as error:
            if not is_refusal(error) or not measured_tiles.leave_out_last(error):
                raise
        return operation(*args, **keywords)

    return run
