"""Collectives of torch.distributed that this package makes of spread parameters, which say whom they wait for long."""

import functools
import zlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from tritonmoe.transports.notices import Notices
from tritonmoe.transports.waiting import LongWait, watched

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["full_tensor", "watched_on"]


def full_tensor(tensor: Tensor, what: str) -> Tensor:
    """Return a DTensor gathered or summed over its mesh, anything else as it is; every rank of the mesh calls it.

    Args:
        what: says in which call of this package, to whoever waits long.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with watched_on(tensor.device_mesh, what):  # type: ignore[attr-defined]
        return tensor.full_tensor()


def watched_on(mesh: "DeviceMesh", what: str) -> AbstractContextManager[None]:
    """Return a context for collectives over a mesh in which this rank says whom it waits for long, and in what."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()

    @functools.cache  # most waits end before anything is asked
    def place() -> tuple[Notices, list[int], int]:
        """Return this rank's notices, the ranks of the mesh, and a number that those of them show that wait in this."""
        store = dist.distributed_c10d._get_default_store()
        ranks = mesh.mesh.flatten().tolist()
        number = zlib.crc32(f"{what} {ranks}".encode())
        return Notices(dist.PrefixStore("tritonmoe", store), rank, size, 0), ranks, number

    def whom() -> str:
        notices, ranks, number = place()
        return notices.whom([other for other in ranks if other != rank], -1, number)

    def show(words: str) -> None:
        notices, _, number = place()
        notices.show_wait(-1, number, words)

    return watched(LongWait(f"rank {rank} of {size}", whom, what, show=show))
