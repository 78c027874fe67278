"""Transports: how rows travel between ranks. None of them knows of experts."""

from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports.base import PendingExchange, Transport, fail_peers_on_error
from tritonmoe.transports.emulated.faults import Death, Delay
from tritonmoe.transports.emulated.link_model import LinkModel
from tritonmoe.transports.emulated.world import EmulatedTransport, EmulatedWorld
from tritonmoe.transports.local import LocalTransport
from tritonmoe.transports.mpi import MPITransport
from tritonmoe.transports.process_group import ProcessGroupTransport
from tritonmoe.transports.torch_groups import is_registered
from tritonmoe.transports.two_level_transport import TwoLevelTransport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

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
    "Ranks",
    "Transport",
    "TwoLevelTransport",
    "as_transport",
    "fail_peers_on_error",
    "is_mesh",
]

EXPERT = "expert"
"""What the dimension of a DeviceMesh is called over which experts are spread, where the other one is of replicas."""

Ranks: TypeAlias = "Transport | ProcessGroup | DeviceMesh"
"""What people pass to say over which ranks experts are spread."""

_of_groups: "dict[ProcessGroup, ProcessGroupTransport]" = {}
_of_levels: dict[tuple[Transport, Transport, Transport], TwoLevelTransport] = {}
"""The transports of groups, and of the levels of meshes, kept until they are closed or their groups destroyed.

When the memory of a layer is freed differs between ranks, so it must not decide when a transport ends.
"""


def is_mesh(ranks: object) -> "TypeGuard[DeviceMesh]":
    """Return whether `ranks` is a DeviceMesh, also where this torch was built without torch.distributed."""
    return hasattr(ranks, "get_group") and hasattr(ranks, "mesh_dim_names")


def as_transport(ranks: "Ranks | None") -> Transport:
    """Return the Transport of `ranks`: itself, or the one that all layers on a ProcessGroup or DeviceMesh share.

    None is refused: `torch.distributed.group.WORLD` is None before init_process_group().

    Raises:
        TypeError: `ranks` is none of these.
        ValueError: a DeviceMesh of more than two dimensions, or one of two, none of them called "expert" (nodes, ranks
            of a node: a TwoLevelTransport), that is not all ranks in their order.
    """
    if isinstance(ranks, Transport):
        return ranks
    if is_mesh(ranks):
        mesh = ranks[EXPERT] if ranks.ndim == 2 and EXPERT in (ranks.mesh_dim_names or ()) else ranks
        if mesh.ndim == 2:
            return _two_level(mesh)
        if mesh.ndim != 1:
            raise ValueError(
                f'a DeviceMesh must have one dimension, or two: one called "{EXPERT}" and one of replicas, or nodes '
                f"and ranks of a node; got {mesh.ndim}: pass mesh['replicas', '{EXPERT}'], with your names"
            )
        ranks = mesh.get_group()
    import torch.distributed

    if not torch.distributed.is_available() or not isinstance(ranks, torch.distributed.ProcessGroup):
        hint = ": torch.distributed.group.WORLD is None before init_process_group()" if ranks is None else ""
        raise TypeError(f"transport must be a Transport, a ProcessGroup or a DeviceMesh, got {type(ranks)}{hint}")
    for group in [group for group, of in _of_groups.items() if of.is_closed or not is_registered(group)]:
        del _of_groups[group]
    if ranks not in _of_groups:
        _of_groups[ranks] = ProcessGroupTransport(ranks)
    return _of_groups[ranks]


def _two_level(mesh: "DeviceMesh") -> TwoLevelTransport:
    import torch.distributed

    if mesh.mesh.flatten().tolist() != list(range(torch.distributed.get_world_size())):
        raise ValueError(
            f"a DeviceMesh of two dimensions must hold all {torch.distributed.get_world_size()} ranks in their order, "
            f"got {mesh.mesh.tolist()}: make a TwoLevelTransport of the transports of your own groups"
        )
    world, between = as_transport(torch.distributed.group.WORLD), as_transport(mesh.get_group(0))
    levels = world, between, as_transport(mesh.get_group(1))
    for old in [old for old in _of_levels if not {*old} <= {*_of_groups.values()}]:
        del _of_levels[old]
    if levels not in _of_levels:
        _of_levels[levels] = TwoLevelTransport(world, mesh.size(1), between_nodes=between, inside_node=levels[2])
    return _of_levels[levels]
