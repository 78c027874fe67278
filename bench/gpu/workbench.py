"""What the cases of a process share: the setting, the last inputs, the clocks, and functions timed side by side."""

import gc
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from bench.gpu.clocks import Clocks
from bench.gpu.setting import Setting
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.device_time import CAPTURE_FAILED, TimedCalls, graph_pool, interleaved
from tritonmoe.tools.benchmarks.shapes import LayerInputs, draw_inputs, operation_calls
from tritonmoe.tools.benchmarks.tuning import calls_by_key

__all__ = ["Call", "Workbench", "times_of", "with_entries"]

Call = Callable[[], object]


def times_of(seconds: Sequence[float], way: str) -> Json:
    """Return one function's times as results keep them: median and samples in microseconds, and how it was timed."""
    return {
        "us": round(1e6 * statistics.median(seconds), 3),
        "samples_us": [round(1e6 * one, 3) for one in seconds],
        "timed_by": way,
    }


def with_entries(call: Call, entries: measured_tiles.Entries) -> Call:
    """Return the call with these measured tiles, and with the table's for all others, whatever is in tiles.json."""

    def run() -> object:
        with measured_tiles.using(entries):
            return call()

    return run


class Workbench:
    """One process's measurements, one after the other."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clocks = Clocks(setting.clocks_command)
        self._inputs: tuple[tuple[str, int, str], LayerInputs] | None = None
        self._operations: tuple[LayerInputs, dict[str, Call]] | None = None
        self._by_key: tuple[LayerInputs, dict[str, Call]] | None = None

    def inputs(self, shape: str, num_tokens: int, routing: str) -> LayerInputs:
        """Return a layer's inputs, the last ones where they are the same."""
        key = shape, num_tokens, routing
        if self._inputs is None or self._inputs[0] != key:
            self.forget()
            layer = self.setting.shapes[shape]
            self._inputs = key, draw_inputs(layer, num_tokens, routing, self.setting.dtype, self.setting.device)
        return self._inputs[1]

    def operations(self, inputs: LayerInputs) -> dict[str, Call]:
        """Return the layer's operations on the Triton kernels, made once for the last inputs."""
        if self._operations is None or self._operations[0] is not inputs:
            with measured_tiles.using({}):
                self._operations = inputs, operation_calls(inputs, "triton")
        return self._operations[1]

    def calls_by_key(self, inputs: LayerInputs) -> dict[str, Call]:
        """Return for every product's key an operation that asks for its tile, found once for the last inputs."""
        if self._by_key is None or self._by_key[0] is not inputs:
            self._by_key = inputs, calls_by_key(self.operations(inputs))
        return self._by_key[1]

    def forget(self) -> None:
        """Return the memory of the last inputs."""
        self._inputs = self._operations = self._by_key = None
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()

    def time(self, variants: Mapping[str, Call], needed: str, uncaptured: Collection[str] = ()) -> Json:
        """Time functions in the same rounds.

        Args:
            needed: the one that must run; any other that raises is left out, and its error told.
            uncaptured: those that read the device, so that no graph can hold them.

        Returns:
            "times": by name the median in microseconds ("us"), all "samples_us", and how they were timed ("timed_by");
            "left_out": by name why; "clocks": see Clocks.since.
        """
        timed: dict[str, TimedCalls] = {}
        device = self.setting.device
        pool = graph_pool(device)
        left_out: dict[str, str] = {}

        def leave_out(name: str, error: Exception) -> None:
            if name == needed:
                raise error
            left_out[name] = f"{type(error).__name__}: {error}"[:300]
            gc.collect()
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where the device computes nothing more

        for name, run in variants.items():
            try:
                timed[name] = TimedCalls(run, device, self.setting.batch_s, pool, captures=name not in uncaptured)
            except Exception as error:
                leave_out(name, error)
            if name in left_out or timed[name].way.startswith(CAPTURE_FAILED):
                pool = graph_pool(device)  # what is pinned in the other one may still be underway
        started = time.monotonic()
        samples = interleaved(timed, self.setting.rounds, leave_out)
        times = {name: times_of(seconds, timed[name].way) for name, seconds in samples.items()}
        return {"times": times, "left_out": left_out, "clocks": self.clocks.since(started)}
