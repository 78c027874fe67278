"""The memory of one step: what a forward keeps for backward, and the most that a call holds at once."""

import os
from collections.abc import Callable, Iterable

import torch

from tritonmoe.runtime.cpu_memory import recycled

__all__ = ["kept_for_backward_mb", "peak_mb"]

SILENT = "6"
"""The log level at which the profiler's library doesn't print two lines for every run."""


def kept_for_backward_mb(forward: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]) -> float:
    """Return the megabytes (1e6 bytes) of tensors, parameters aside, that `forward` keeps for backward."""
    not_counted = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # alive while they are summed: no address is used twice
        total = sum(kept.values())
    del loss
    return round(total / 1e6, 3)


def peak_mb(run: Callable[[], object]) -> float:
    """Return the most megabytes (1e6 bytes) that a call holds at once, beside what was there before it.

    On a GPU its allocator says it, else torch's CPU allocator, as the profiler sees that.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 3)
    recycled.clear()  # what tritonmoe keeps from call to call counts too
    os.environ.setdefault("KINETO_LOG_LEVEL", SILENT)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None  # it is made when the profile starts
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = most = 0
    for _, num_bytes in sorted(changes, key=lambda change: change[0]):
        held += num_bytes
        most = max(most, held)
    return round(most / 1e6, 3)
