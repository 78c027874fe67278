"""Between host and device: integers on their way to the host, waiting, and whether a CUDA graph is being captured."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["HostCopy", "is_captured", "wait_for_current_stream"]

SPIN_S = 0.002
"""A wait is usually over by then, and a forward waits in it: until then the host asks without a pause."""
PAUSE_S = 1e-4
LOOK_S = 1.0
"""How often a waiting host looks around."""


class HostCopy:
    """Integer tensors of one device for the host, all in one copy.

    On CUDA it goes into pinned memory and is only enqueued here; wait() waits for it alone, not for what was enqueued
    behind it. On a CPU the values are there already.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        self._values = values = torch.cat([tensor.reshape(-1).to(torch.int64) for tensor in tensors])
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True, device="cpu")
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()

    def wait(self, look_around: Callable[[float], None] | None = None) -> list[Tensor]:
        """Return the tensors as int64 on the CPU.

        look_around: called about every second with the seconds that have passed. What it raises ends the waiting, which
        nothing else can end where the device itself waits in vain.
        """
        if self._copied is not None:
            if look_around is None:
                self._copied.synchronize()
            else:
                _wait_for(self._copied, look_around)
        parts = self._values.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def _wait_for(event: torch.cuda.Event, look_around: Callable[[float], None]) -> None:
    started, looked_at_s = time.perf_counter(), 0.0
    while not event.query():
        waited_s = time.perf_counter() - started
        if waited_s - looked_at_s > LOOK_S:
            looked_at_s = waited_s
            look_around(waited_s)
        time.sleep(0.0 if waited_s < SPIN_S else PAUSE_S)  # without a pause, too, other threads get their turn


def is_captured(device: torch.device) -> bool:
    """Return whether a CUDA graph captures the device's current stream, so that nothing can be read."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # which need not be the current one
        return torch.cuda.is_current_stream_capturing()


def wait_for_current_stream(device: torch.device | str) -> None:
    """Return when a device has done what stands on its current stream, whatever its other streams still do."""
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()
