"""Collectives of torch.distributed that this package makes of spread parameters, which say whom they wait for long."""

import functools
import zlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tritonmoe.transports.notices import Notices
from tritonmoe.transports.waiting import LongWait, watched

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["full_tensor", "watched_on"]


def full_tensor(tensor: Tensor, what: str) -> Tensor:
    """Return a DTensor gathered or summed over its mesh, anything else as it is; every rank of the mesh calls it.

    Args:
        what: says in which call of this package, to whoever waits long.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    spread = cast("DTensor", tensor)
    with watched_on(spread.device_mesh, what):
        if tensor.is_floating_point() and tensor.itemsize == 1:  # fp8, which gloo doesn't know, travels as bytes
            return _as_bytes(spread).full_tensor().view(tensor.dtype)
        return spread.full_tensor()


def _as_bytes(tensor: "DTensor") -> "DTensor":
    from torch.distributed.tensor import DTensor

    local, shape, stride = tensor.to_local().view(torch.uint8), tensor.shape, tensor.stride()
    return DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


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
