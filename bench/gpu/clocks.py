"""SM clock, power and temperature while something is measured: a figure without them can't be compared.

`python -m bench.gpu.clocks` prints them of the first GPU. It asks NVML itself: nvidia-smi keeps back what it prints
into a pipe.
"""

import collections
import ctypes
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from tritonmoe.runtime.files import Json
from tritonmoe.runtime.processes import dies_with_its_parent

__all__ = ["Clocks"]

OF_THE_GPU = ("python", "-m", "bench.gpu.clocks")
EVERY_S = 0.01
NVML_CLOCK_SM = 1
NAMES = ("sm_mhz", "watts", "celsius")


class Clocks:
    """Reads a program that prints the three numbers again and again, until the process ends."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        command = OF_THE_GPU if command is None else command
        if command[0] == "python":
            command = (sys.executable, *command[1:])
        self._readings: collections.deque[tuple[float, list[float]]] = collections.deque(maxlen=10_000)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=dies_with_its_parent)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                values = [float(value) for value in line.split(",")]
            except ValueError:  # "[N/A]", where a card doesn't tell
                continue
            if len(values) == len(NAMES):
                self._readings.append((time.monotonic(), values))

    def since(self, started: float) -> Json:
        """Return each number's median since time.monotonic() was `started`, the lowest clock, and how many readings.

        There are none where less than some ten milliseconds went by, or where the card has no NVML.
        """
        rows = [values for when, values in tuple(self._readings) if when >= started]
        if not rows:
            return {"readings": 0}
        medians = {name: statistics.median(column) for name, column in zip(NAMES, zip(*rows, strict=True), strict=True)}
        return {"readings": len(rows), **medians, "lowest_sm_mhz": min(row[0] for row in rows)}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def print_readings() -> None:
    """Print MHz, W and C of the first GPU every EVERY_S, without end; raises OSError where there is no NVML."""
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    device, mhz, milliwatts, celsius = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
    for status in (nvml.nvmlInit_v2(), nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))):
        if status:
            raise OSError(f"NVML gives the error {status}")
    while True:
        nvml.nvmlDeviceGetClockInfo(device, NVML_CLOCK_SM, ctypes.byref(mhz))
        nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(milliwatts))
        nvml.nvmlDeviceGetTemperature(device, 0, ctypes.byref(celsius))
        print(f"{mhz.value}, {milliwatts.value / 1e3}, {celsius.value}", flush=True)
        time.sleep(EVERY_S)


if __name__ == "__main__":
    print_readings()
