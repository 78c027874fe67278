"""DeviceClock: moments of a CUDA device's streams, told in the host's time."""

import time

import torch
from torch import Tensor

__all__ = ["DeviceClock", "Moment"]


class DeviceClock:
    """A clock of a device's stream: when the stream came to a point, as time.perf_counter()."""

    def __init__(self, device: torch.device) -> None:
        # Always empty, and of high priority: a stream of the ordinary pool might be one that computes.
        self.stream = torch.cuda.Stream(device, priority=-1)

    def mark(self, rows: Tensor) -> "Moment":
        """Return the moment at which the current stream of the rows' device will have come to here."""
        return Moment(self, torch.cuda.current_stream(rows.device))


class Moment:
    """A point of a stream, behind what was enqueued there before."""

    def __init__(self, clock: DeviceClock, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)
        self._clock = clock
        self._marked_at = time.perf_counter()

    def has_come(self) -> bool:
        return self.event.query()

    def time(self) -> float:
        """Return its time.perf_counter(), never before it was marked; blocks until it has come."""
        self.event.synchronize()
        now = torch.cuda.Event(enable_timing=True)
        now.record(self._clock.stream)
        now.synchronize()
        return max(self._marked_at, time.perf_counter() - self.event.elapsed_time(now) * 1e-3)
