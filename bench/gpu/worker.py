"""The process that runs the cases, so that one that crashes or hangs takes only itself: another worker goes on."""

import gc
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from bench.gpu.children import Child
from bench.gpu.setting import Setting
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.device_time import CAPTURE_FAILED

__all__ = ["Worker", "measures"]

LEAVING_TRACES = ("profile_step",)
"""Behind these the process ends: the profiler's library stays in it, where every launch takes the host longer from then
on."""
SILENT = "6"
"""The log level at which the profiler's library doesn't print two lines for every run."""


def measures() -> dict[str, Callable[..., Json]]:
    """Return everything that a case can ask for, by name."""
    from bench.gpu import checks, layers, offloaded, operations, programs, versions

    functions = (
        *(versions.describe_machine, checks.check_small_layers, checks.check_samples, checks.rerun),
        *(operations.measure_dense, operations.measure_operation, operations.profile_step, operations.measure_host),
        *(operations.try_tile, operations.remeasure_tile),
        *(layers.measure_layer, layers.measure_few, layers.measure_memory, layers.measure_router),
        *(offloaded.measure_offloaded, layers.measure_compiling_peers),
        *(programs.run_alone, programs.run_benchmark, programs.run_tests),
    )
    return {function.__name__: function for function in functions}


def _work(pipe: Connection, setting: Setting) -> None:
    gc.freeze()  # looking through all that was imported would take a second for every case
    os.environ.setdefault("KINETO_LOG_LEVEL", SILENT)  # before the profiler's library is loaded
    from bench.gpu.workbench import Workbench

    by_name, bench = measures(), Workbench(setting)
    while True:
        try:
            measure, arguments = pipe.recv()
        except EOFError:
            bench.clocks.close()
            return
        try:
            found = by_name[measure](bench, **_translated(setting, arguments))
        except torch.OutOfMemoryError as error:
            found = {"out_of_memory": str(error).splitlines()[0]}
            bench.forget()
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        pipe.send(found)


def _translated(setting: Setting, arguments: Json) -> Json:
    """Return the arguments with the keys of tiles as this process looks them up: a rehearsal has no GPU's."""
    if not setting.is_rehearsal:
        return arguments

    def key_here(key: str) -> str:
        return " ".join(["interpreter", setting.dtype_name, *key.split()[2:]])

    translated = dict(arguments)
    if "key" in arguments:
        translated["key"] = key_here(arguments["key"])
    if "entries" in arguments:
        translated["entries"] = {key_here(key): fields for key, fields in arguments["entries"].items()}
    return translated


def _leaves_a_capture(found: Json) -> bool:
    """Return whether a capture failed: it may keep memory, and what comes after it may not be captured."""
    ways = [*found.get("timed_by", {}).values(), *(timed["timed_by"] for timed in found.get("times", {}).values())]
    return any(way.startswith(CAPTURE_FAILED) for way in ways)


class Worker:
    """One process at a time that runs cases, begun when it is needed, and anew after a failure."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._child: Child | None = None

    def run(self, measure: str, arguments: Json, limit_s: float) -> Json:
        """Run one case; what fails, crashes or takes longer than `limit_s` says so under "failed"."""
        if self._child is None:
            self._child = self._started()
        self._child.send((measure, arguments))
        is_late = not self._child.pipe.poll(limit_s)
        found = {"failed": f"it took longer than {limit_s:.0f} s"} if is_late else self._child.answer()
        # The device may compute nothing more for a process that failed.
        if "failed" in found or measure in LEAVING_TRACES or _leaves_a_capture(found):
            self.stop()
        return found

    def _started(self) -> Child:
        before = os.environ.get("TRITON_INTERPRET")
        if self._setting.is_rehearsal:
            os.environ["TRITON_INTERPRET"] = "1"
        try:
            return Child(_work, self._setting)
        finally:
            if before is None:
                os.environ.pop("TRITON_INTERPRET", None)

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._child is not None:
            self._child.kill()
        self._child = None
