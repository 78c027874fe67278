"""How long a device takes for calls of a function, without the Python between them where they can be captured."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from tritonmoe.benchmarks.timing import Samples

__all__ = ["TimedCalls", "graph_pool", "interleaved"]

GraphPool: TypeAlias = Any
"""What torch.cuda.graph_pool_handle gives."""
WARM_UPS = 3
MOST_CALLS = 200


def graph_pool(device: torch.device) -> GraphPool | None:
    """Give a pool for the graphs of functions that are timed in turn; None on a CPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class TimedCalls:
    """Calls of one function that are timed together: on a GPU as one CUDA graph, between two events.

    On a CPU they are timed by the clock. `way` says how: "graph", "clock", or, where a GPU can't capture the calls,
    "events: " and why; then the time includes Python, unless the device is slower.
    """

    def __init__(
        self, run: Callable[[], object], device: torch.device, batch_s: float, pool: GraphPool | None = None
    ) -> None:
        """Run the function a few times, and capture as many calls as last about `batch_s` seconds.

        pool: from `graph_pool`, where graphs that are never replayed at once may share their memory.
        Raises what the function does, and torch.OutOfMemoryError where its graph needs too much.
        """
        self.run, self.device, self.pool = run, device, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.way = "clock" if device.type == "cpu" else "graph"
        for _ in range(WARM_UPS if device.type == "cuda" else 1):
            run()
        self.count = 1
        self.count = max(1, min(MOST_CALLS, round(batch_s / max(self._seconds_of_all(), 1e-9))))
        if device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                for _ in range(self.count):
                    self.run()
            graph.replay()
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            # Ending a capture that was broken off raises as well, and hides why.
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            torch.cuda.synchronize(self.device)  # raises where the device computes nothing more
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            self.way = f"events: {str(first).splitlines()[0][:200]}"
            return
        self.graph = graph

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
        """Give the seconds of one call, the mean of a batch."""
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
