"""Transports: how rows travel between ranks. None of them knows of experts."""

from typing import Any
from weakref import WeakValueDictionary

from tritonmoe.transports.base import PendingExchange, Transport
from tritonmoe.transports.emulated import Death, Delay, EmulatedTransport, EmulatedWorld, LinkModel
from tritonmoe.transports.local import LocalTransport
from tritonmoe.transports.mpi import MPITransport
from tritonmoe.transports.process_group import ProcessGroupTransport

__all__ = [
    "Death",
    "Delay",
    "EmulatedTransport",
    "EmulatedWorld",
    "LinkModel",
    "LocalTransport",
    "MPITransport",
    "PendingExchange",
    "ProcessGroupTransport",
    "Transport",
    "as_transport",
]

_of_groups: "WeakValueDictionary[Any, ProcessGroupTransport]" = WeakValueDictionary()


def as_transport(ranks: Any) -> Transport:
    """Give the Transport of `ranks`: itself, or the one that all layers on a ProcessGroup or DeviceMesh share.

    Raises:
        TypeError: `ranks` is none of these. ValueError: a DeviceMesh of more than one dimension.
    """
    if isinstance(ranks, Transport):
        return ranks
    if hasattr(ranks, "get_group") and hasattr(ranks, "mesh_dim_names"):
        if ranks.ndim != 1:
            raise ValueError(f"a DeviceMesh must have one dimension, got {ranks.ndim}: pass mesh['the expert axis']")
        ranks = ranks.get_group()
    import torch.distributed

    if not torch.distributed.is_available() or not isinstance(ranks, torch.distributed.ProcessGroup):
        raise TypeError(f"transport must be a Transport, a ProcessGroup or a DeviceMesh, got {type(ranks)}")
    transport = _of_groups.get(ranks)
    if transport is None:
        transport = _of_groups[ranks] = ProcessGroupTransport(ranks)
    return transport
