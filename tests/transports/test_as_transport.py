"""What as_transport() gives for groups and meshes whose transport has ended, and what with_nodes() refuses."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tritonmoe.transports import ProcessGroupTransport, TwoLevelTransport, as_transport


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_closed_transport_makes_room_for_another() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    first = as_transport(dist.group.WORLD)
    assert as_transport(dist.group.WORLD) is first
    first.close()
    second = as_transport(dist.group.WORLD)
    counts = torch.arange(3).view(1, 3)
    assert torch.equal(second.exchange_counts(counts), counts)
    assert as_transport(dist.group.WORLD) is second


@pytest.mark.parametrize("end", ["close", "destroy"])
def test_a_mesh_of_nodes_whose_transports_have_ended(end: str) -> None:
    """Another mesh over the same ranks equals the first one, which something still holds."""

    def mesh_of_a_world() -> DeviceMesh:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "rank"))

    mesh = first_mesh = mesh_of_a_world()
    first = as_transport(mesh)
    assert as_transport(mesh) is first
    if end == "close":
        first.close()
    else:
        dist.destroy_process_group()
        mesh = mesh_of_a_world()
        assert mesh == first_mesh
    second = as_transport(mesh)
    assert isinstance(second, TwoLevelTransport)
    assert as_transport(mesh) is second
    for level, old in zip(second._levels(), first._levels(), strict=True):
        assert level is not old
        assert level.group in (dist.group.WORLD, mesh.get_group(0), mesh.get_group(1))
        level._check_usable()


def test_ranks_that_with_nodes_can_not_take() -> None:
    """Before a group is made, which other ranks would wait for."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    transport = ProcessGroupTransport()
    part = ProcessGroupTransport(dist.new_group([0, 1, 2, 3]))
    names = [*dist.distributed_c10d._world.pg_names.values()]
    for node_size in (0, 1, 3, 8):
        with pytest.raises(ValueError, match=f"8 ranks can't be two or more nodes of node_size = {node_size}"):
            transport.with_nodes(node_size)
    with pytest.raises(ValueError, match=r"needs a group of the whole job, got ranks \[0, 1, 2, 3\]"):
        part.with_nodes(2)
    assert [*dist.distributed_c10d._world.pg_names.values()] == names
    assert (transport.with_nodes(4).num_nodes, transport.with_nodes(2).num_nodes) == (2, 4)
