"""flight_record: what PyTorch's flight recorder keeps of this rank's last exchanges, as JSON."""

import json

import torch.distributed

__all__ = ["flight_record", "rank_of_job"]


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
