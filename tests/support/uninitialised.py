"""Memory that nothing has written yet holds what can't be overlooked."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Let torch.empty and its relatives give NaN, and largest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would raise
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
