"""What groups of torch.distributed say of themselves: whether they can be used, their backends, how long they wait."""

import json
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "available",
    "backends_of",
    "flight_record",
    "group_of_devices",
    "is_registered",
    "next_number",
    "own_group",
    "rank_of_job",
    "timeout_of",
]


def available() -> dict[str, str | None]:
    """Return why ranks in several processes can't use gloo and nccl here; None for a backend that they can use."""
    reasons: dict[str, str | None]
    if not torch.distributed.is_available():
        built_without = "this torch was built without torch.distributed"
        reasons = {"gloo": built_without, "nccl": built_without}
    else:
        import torch.distributed as dist

        nccl = None
        if not dist.is_nccl_available():
            nccl = "this torch was built without NCCL"
        elif not torch.cuda.is_available():
            nccl = "there is no CUDA device"
        reasons = {"gloo": None if dist.is_gloo_available() else "this torch was built without gloo", "nccl": nccl}
    return reasons


def is_registered(group: "ProcessGroup") -> bool:
    """Return whether the group still exists: destroy_process_group() ends it."""
    try:
        return torch.distributed.get_rank(group) >= 0
    except ValueError:
        return False


def own_group(group: "ProcessGroup | None") -> "ProcessGroup":
    """Return the group, or the default one for None. Raises ValueError where this process is in none."""
    if not torch.distributed.is_available():
        raise ValueError("this torch was built without torch.distributed: use LocalTransport()")
    import torch.distributed as dist

    found = group or dist.group.WORLD
    if not dist.is_initialized() or found is None:
        raise ValueError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group() first, "
            "or use LocalTransport()"
        )
    if dist.get_rank(found) < 0:
        raise ValueError("this process is not a member of the group: make the transport on the members only")
    return found


def backends_of(group: "ProcessGroup") -> dict[str, str]:
    """Return which backend carries the tensors of each kind of device, with gloo for the CPU where the group has none.

    Raises:
        ValueError: nothing can carry tensors on the CPU.
    """
    import torch.distributed as dist

    backends = _configured_backends(group)
    if "cpu" not in backends:  # as of init_process_group("nccl"): gloo's connections need only its store
        if not dist.is_gloo_available():
            raise ValueError(
                f"this group has no backend for tensors on the CPU, only {backends}, and this torch was "
                "built without gloo, by which its ranks would agree: initialise it with another backend for the "
                'CPU ("cpu:mpi,cuda:nccl"), or install a torch with gloo'
            )
        backends["cpu"] = "gloo"
    return backends


def _configured_backends(group: "ProcessGroup") -> dict[str, str]:
    # get_backend_config gives "cpu:gloo,cuda:nccl"
    return dict(pair.split(":", 1) for pair in torch.distributed.get_backend_config(group).split(","))


def timeout_of(group: "ProcessGroup") -> float:
    """Return the group's own timeout in seconds, for tensors on the CPU if it has a backend for them."""
    backends = _configured_backends(group)
    device_type = "cpu" if "cpu" in backends else next(iter(backends))
    options = getattr(group._get_backend(torch.device(device_type)), "options", None)
    timeout = torch.distributed.constants.default_pg_timeout if options is None else options._timeout
    return timeout.total_seconds()


def group_of_devices(group: "ProcessGroup", backend: str, timeout_s: float) -> "ProcessGroup":
    """Make another group over the same ranks, for tensors on CUDA devices; every rank calls."""
    import torch.distributed as dist

    return dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=timedelta(seconds=timeout_s),
        backend=f"cuda:{backend}",
        use_local_synchronization=True,
    )


_num_transports: "weakref.WeakKeyDictionary[ProcessGroup, int]" = weakref.WeakKeyDictionary()


def next_number(group: "ProcessGroup") -> int:
    """Number the transports that this rank makes on a group."""
    _num_transports[group] = number = _num_transports.get(group, -1) + 1
    return number


def rank_of_job() -> int | None:
    """Return this process's rank in the job; None where torch.distributed has not been initialised."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else None


def flight_record() -> str | None:
    """Return the dump of this rank's flight recorder, with its rank in it; None where there is none, or it is empty."""
    if not torch.distributed.is_initialized():
        return None
    from torch._C import _distributed_c10d

    is_nccl = "nccl" in str(torch.distributed.get_backend())
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json" if is_nccl else "_dump_fr_trace_json", None)
    if dump is None:
        return None
    found = json.loads(dump(True, False))
    if not found.get("entries"):
        return None
    return json.dumps({**found, "rank": torch.distributed.get_rank()})
