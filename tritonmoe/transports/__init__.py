"""Transports: how rows travel between ranks. None of them knows of experts."""

from typing import Any
from weakref import WeakKeyDictionary

from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports.base import PendingExchange, Transport, leaving_nobody_waiting
from tritonmoe.transports.emulated.faults import Death, Delay
from tritonmoe.transports.emulated.link_model import LinkModel
from tritonmoe.transports.emulated.world import EmulatedTransport, EmulatedWorld
from tritonmoe.transports.local import LocalTransport
from tritonmoe.transports.mpi import MPITransport
from tritonmoe.transports.process_group import ProcessGroupTransport, is_registered
from tritonmoe.transports.two_level import TwoLevelTransport

__all__ = [
    "EXPERT",
    "Death",
    "Delay",
    "EmulatedTransport",
    "EmulatedWorld",
    "HostCopy",
    "LinkModel",
    "LocalTransport",
    "MPITransport",
    "PendingExchange",
    "ProcessGroupTransport",
    "Transport",
    "TwoLevelTransport",
    "as_transport",
    "leaving_nobody_waiting",
]

EXPERT = "expert"
"""What the dimension of a DeviceMesh is called over which experts are spread, where the other one is of replicas."""

_of_meshes: "WeakKeyDictionary[Any, TwoLevelTransport]" = WeakKeyDictionary()
_of_groups: dict[Any, ProcessGroupTransport] = {}
"""For as long as their groups exist: when a layer's memory is freed differs between ranks, and may not matter."""


def as_transport(ranks: Any) -> Transport:
    """Give the Transport of `ranks`: itself, or the one that all layers on a ProcessGroup or DeviceMesh share.

    Raises:
        TypeError: `ranks` is none of these.
        ValueError: a DeviceMesh of more than two dimensions, or one of two, none of them called "expert" (nodes, ranks
            of a node: a TwoLevelTransport), that is not all ranks in their order.
    """
    if isinstance(ranks, Transport):
        return ranks
    if hasattr(ranks, "get_group") and hasattr(ranks, "mesh_dim_names"):
        if ranks.ndim == 2 and EXPERT in (ranks.mesh_dim_names or ()):
            ranks = ranks[EXPERT]
        if ranks.ndim == 2:
            if ranks not in _of_meshes:
                _of_meshes[ranks] = _two_level(ranks)
            return _of_meshes[ranks]
        if ranks.ndim != 1:
            raise ValueError(
                f'a DeviceMesh must have one dimension, or two: one called "{EXPERT}" and one of replicas, or nodes '
                f"and ranks of a node; got {ranks.ndim}: pass mesh['replicas', '{EXPERT}'], with your names"
            )
        ranks = ranks.get_group()
    import torch.distributed

    if not torch.distributed.is_available() or not isinstance(ranks, torch.distributed.ProcessGroup):
        hint = ": torch.distributed.group.WORLD is None before init_process_group()" if ranks is None else ""
        raise TypeError(f"transport must be a Transport, a ProcessGroup or a DeviceMesh, got {type(ranks)}{hint}")
    for group in [group for group in _of_groups if not is_registered(group)]:
        del _of_groups[group]
    if ranks not in _of_groups:
        _of_groups[ranks] = ProcessGroupTransport(ranks)
    return _of_groups[ranks]


def _two_level(mesh: Any) -> TwoLevelTransport:
    import torch.distributed

    if mesh.mesh.flatten().tolist() != list(range(torch.distributed.get_world_size())):
        raise ValueError(
            f"a DeviceMesh of two dimensions must hold all {torch.distributed.get_world_size()} ranks in their order, "
            f"got {mesh.mesh.tolist()}: make a TwoLevelTransport of the transports of your own groups"
        )
    return TwoLevelTransport(
        as_transport(torch.distributed.group.WORLD),
        mesh.size(1),
        between_nodes=as_transport(mesh.get_group(0)),
        inside_node=as_transport(mesh.get_group(1)),
    )
