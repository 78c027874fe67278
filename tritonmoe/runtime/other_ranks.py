"""Whether collectives of other ranks may run beside this process's kernels, and dummy forwards that only serve others.

A rank without data runs dummy forwards because other ranks need its experts: whatever counts or records tokens leaves
them out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["dummy_forwards", "has_other_ranks", "in_dummy_forward"]


def has_other_ranks() -> bool:
    """Return whether torch.distributed knows another rank, whose collectives (FSDP's, DDP's) hold multiprocessors."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


_is_dummy = False


@contextmanager
def dummy_forwards() -> Iterator[None]:
    """Mark the forwards inside as dummies: other ranks need their experts, and nobody here asked for the results."""
    global _is_dummy
    before, _is_dummy = _is_dummy, True
    try:
        yield
    finally:
        _is_dummy = before


def in_dummy_forward() -> bool:
    """Return whether this forward serves other ranks alone; whatever counts or records tokens asks."""
    return _is_dummy
