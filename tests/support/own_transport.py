"""The transport of a rank that is a process of its own, through gloo or MPI: `run_processes` starts such ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh

from tritonmoe.transports import MPITransport, ProcessGroupTransport, Transport, TwoLevelTransport, as_transport

__all__ = ["own_transport"]


@contextmanager
def own_transport(folder: str, backend: str, rank: int, size: int, timeout_s: float) -> Iterator[Transport]:
    """Open "gloo", "gloo two levels" (two ranks a node) or "mpi", and close it once every rank has come to the end.

    Args:
        folder: where gloo's ranks meet. rank, size: mpiexec tells those of MPI.
    """
    transport: Transport
    if backend == "mpi":
        from mpi4py import MPI

        transport = MPITransport(MPI.COMM_WORLD, timeout_s=timeout_s)
    else:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        transport = ProcessGroupTransport(timeout_s=timeout_s)
        if backend == "gloo two levels":
            transport = as_transport(DeviceMesh("cpu", torch.arange(size).view(-1, 2)))
            assert isinstance(transport, TwoLevelTransport)
    yield transport
    transport.exchange_counts(torch.zeros(transport.size, 1, dtype=torch.int64))
    transport.close()
    if backend != "mpi":
        torch.distributed.destroy_process_group()
