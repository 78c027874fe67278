"""The tolerance rule: at most twice the error that plain PyTorch makes in the same dtype, plus a small floor."""

import torch
from torch import Tensor

__all__ = ["assert_close_to_exact", "error_floor"]


def error_floor(dtype: torch.dtype, exact: Tensor) -> float:
    """Return the error that is allowed where plain PyTorch happens to make none: a few units in the last place.

    In fp64 the exact values are themselves sums of rounded terms, in another order.
    """
    ulps = 100 if dtype == torch.float64 else 4
    return ulps * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())


def assert_close_to_exact(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Compare a result with the same computation in plain PyTorch, in the same dtype and in fp64.

    Args:
        name: what it is, for the message.
        actual: the result under test. plain: plain PyTorch on the same inputs, in the same dtype.
        exact: plain PyTorch on the same numbers in fp64.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, expected {plain.dtype}"
    assert exact.dtype == torch.float64, f"{name}: the exact values are {exact.dtype}"
    if actual.numel() == 0:
        return
    assert exact.isfinite().all(), f"{name}: the case itself is not finite"
    assert actual.isfinite().all(), f"{name}: not finite at {(~actual.isfinite()).nonzero()[:3].tolist()}"
    error = (actual.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    allowed = 2 * plain_error + error_floor(actual.dtype, exact)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (plain PyTorch makes {plain_error:.3e})"
