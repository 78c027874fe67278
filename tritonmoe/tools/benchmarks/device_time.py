"""How long a device takes for calls of a function, without the Python between them where they can be captured."""

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from tritonmoe.tools.benchmarks.timing import Samples

__all__ = ["CAPTURE_FAILED", "TimedCalls", "graph_pool", "interleaved"]

GraphPool: TypeAlias = Any
"""What torch.cuda.graph_pool_handle gives."""
CAPTURE_FAILED = "events: "
"""So begins the `way` of calls whose capture failed; why follows."""
WARM_UPS = 3
MOST_CALLS = 200


def graph_pool(device: torch.device) -> GraphPool | None:
    """Return a pool for the graphs of functions that are timed in turn; None on a CPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class TimedCalls:
    """Calls of one function that are timed together: on a GPU as one CUDA graph, between two events.

    On a CPU they are timed by the clock. `way` says how: "graph", "clock", "events" where the calls are not to be
    captured, or CAPTURE_FAILED and why they weren't; with events the time has Python in it where the device is faster.
    """

    def __init__(
        self,
        run: Callable[[], object],
        device: torch.device,
        batch_s: float,
        pool: GraphPool | None = None,
        *,
        captures: bool = True,
    ) -> None:
        """Run the function a few times, and capture as many calls as last about `batch_s` seconds.

        pool: from `graph_pool`, where graphs that are never replayed at once may share their memory; not one in which a
        capture failed. captures: False for a function that reads the device, which no graph can.
        Raises what the function does, and torch.OutOfMemoryError where its graph needs too much.
        """
        self.run, self.device = run, device
        self.pool: GraphPool = graph_pool(device) if pool is None else pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.way = "clock" if device.type == "cpu" else "graph" if captures else "events"
        for _ in range(WARM_UPS if device.type == "cuda" else 1):
            run()
        self.count = 1
        self.count = max(1, min(MOST_CALLS, round(batch_s / max(self._seconds_of_all(), 1e-9))))
        if self.way == "graph":
            self._capture()

    def _capture(self) -> None:
        torch.cuda.synchronize(self.device)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                for _ in range(self.count):
                    self.run()
            graph.replay()
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            # Ending a capture that was broken off raises as well, and hides why.
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            torch.cuda.set_stream(before)
            self._leave_pool()
            torch.cuda.synchronize(self.device)  # raises where the device computes nothing more
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            self.way = f"{CAPTURE_FAILED}{str(first).splitlines()[0][:200]}"
            return
        self.graph = graph

    def _leave_pool(self) -> None:
        """End what a failed capture leaves underway up to PyTorch 2.11: allocations in the pool, and a share of it.

        Newer ones have ended them, and raise here (pytorch/pytorch#180395).
        """
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self.pool)

    def _run_all(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for _ in range(self.count):
            self.run()

    def _seconds_of_all(self) -> float:
        if self.device.type == "cpu":
            started = time.perf_counter()
            self._run_all()
            return time.perf_counter() - started
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        self._run_all()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def seconds(self) -> float:
        """Return the seconds of one call, the mean of a batch."""
        return self._seconds_of_all() / self.count


def interleaved(
    variants: Mapping[str, TimedCalls], rounds: int, leave_out: Callable[[str, Exception], None] | None = None
) -> Samples:
    """Time every variant once a round, in an order drawn anew; one round before them is dropped.

    leave_out: takes the name and the error of a variant that raises, which has no samples then; without it the error is
    the caller's.
    """
    samples: Samples = {name: [] for name in variants}
    order, shuffle = list(variants), random.Random(0).shuffle
    for number in range(1 + rounds):
        shuffle(order)
        for name in tuple(order):
            try:
                taken = variants[name].seconds()
            except Exception as error:
                if leave_out is None:
                    raise
                leave_out(name, error)
                order.remove(name)
                del samples[name]
                continue
            if number > 0:
                samples[name].append(taken)
    return samples
