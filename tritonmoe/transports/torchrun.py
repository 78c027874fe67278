"""torchrun_ranks: the processes that torchrun has started, joined by a ProcessGroupTransport."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from tritonmoe.errors import TransportError
from tritonmoe.transports.process_group import ProcessGroupTransport

__all__ = ["torchrun_ranks"]


@contextmanager
def torchrun_ranks(*, timeout_s: float) -> "Iterator[ProcessGroupTransport]":
    """Join the processes that torchrun has started: gloo for the CPU and, with a CUDA device, NCCL for that.

    The group ends with the context; after an exception it is left as it is, for the process to end.
    """
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except dist.DistError as error:
        raise TransportError(f"the ranks did not meet within {timeout_s:g} s: {error}") from error
    yield ProcessGroupTransport(timeout_s=timeout_s)
    dist.destroy_process_group()
