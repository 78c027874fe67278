"""has_other_ranks: whether collectives of this process may run beside its kernels."""

import torch

__all__ = ["has_other_ranks"]


def has_other_ranks() -> bool:
    """Say whether torch.distributed knows another rank, whose collectives (FSDP's, DDP's) hold multiprocessors too."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
