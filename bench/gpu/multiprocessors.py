"""A kernel that holds multiprocessors for a while, as the kernels of an exchange do, beside which others are timed."""

import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from tritonmoe.ops.aot import architecture_named
from tritonmoe.ops.kernels import launch

__all__ = ["Holder"]

ROWS, WARPS = 128, 8
DEPTHS = (256, 128, 64)
"""Of the product whose operands a program keeps in shared memory: 128, 64 and 32 KiB. The largest that a device has
room for; beside the first no program of a product's kernel fits on a Hopper's multiprocessor."""
BEGUN_S = 200e-6
"""So long after its launch all programs of the holding kernel run."""
MARGIN_S = 2e-3
MOST_TRIES = 6


@triton.jit
def _hold(
    operands,  # (ROWS * DEPTH,) bf16
    sums,  # (programs, ROWS, ROWS) fp32
    nanoseconds,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Multiply once, so that the program has shared memory for two operands, and wait until the time is over."""
    started = globaltimer()
    rows, inner = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    left = tl.load(operands + rows[:, None] * DEPTH + inner[None, :])
    right = tl.load(operands + inner[:, None] * ROWS + rows[None, :])
    product = tl.dot(left, right)
    tl.store(sums + tl.program_id(0) * ROWS * ROWS + rows[:, None] * ROWS + rows[None, :], product)
    now = globaltimer()
    while now - started < nanoseconds:
        now = globaltimer()


class Holder:
    """Holds multiprocessors of one device on a stream of its own; on a CPU nothing is held."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_multiprocessors = 0
        self.shared_bytes = 0
        if device.type != "cuda":
            return
        self.num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        room = architecture_named(launch.architecture_of(launch.target_of(device))).shared_bytes_per_program
        self._stream = torch.cuda.Stream(device)
        self._operands = torch.zeros(ROWS * DEPTHS[0], dtype=torch.bfloat16, device=device)
        self._sums = torch.empty(self.num_multiprocessors, ROWS, ROWS, device=device)
        self._depth = next(depth for depth in DEPTHS if 4 * ROWS * depth <= room)
        torch.cuda.synchronize(device)  # what is written above is there for every stream
        self.shared_bytes = self._launch(1, 0.0)

    def _launch(self, num_programs: int, seconds: float) -> int:
        """Hold so many multiprocessors for so long; return the bytes of shared memory of each program."""
        nanoseconds = round(1e9 * seconds / 16) * 16  # of other numbers Triton would compile another kernel
        with torch.cuda.stream(self._stream):
            compiled = _hold[(num_programs,)](
                self._operands, self._sums, nanoseconds, ROWS=ROWS, DEPTH=self._depth, num_warps=WARPS
            )
        return compiled.metadata.shared

    def seconds_beside(self, measure: Callable[[], float], num_held: int) -> float:
        """Return the seconds that `measure` gives while so many multiprocessors are held from its beginning to its end.

        measure: waits until what it measures has ended.
        """
        if num_held == 0 or self.device.type != "cuda":
            return measure()
        started = time.perf_counter()
        measure()
        held_s = 3 * (time.perf_counter() - started) + MARGIN_S
        for _ in range(MOST_TRIES):
            torch.cuda.synchronize(self.device)
            self._launch(num_held, held_s)
            time.sleep(BEGUN_S)
            seconds = measure()
            has_outlasted = not self._stream.query()
            self._stream.synchronize()
            if has_outlasted:
                return seconds
            held_s *= 2
        raise RuntimeError(
            f"{num_held} multiprocessors held for {held_s / 2:.3f} s were free before what was measured ended"
        )
