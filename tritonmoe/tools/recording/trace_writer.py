"""on_trace_ready: write what torch.profiler saw on this rank, for the doctor, and the flight record beside it."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from tritonmoe.runtime.files import write_whole
from tritonmoe.transports.torch_groups import flight_record, rank_of_job

__all__ = ["on_trace_ready"]


def on_trace_ready(folder: str | os.PathLike) -> Callable[[torch.profiler.profile], None]:
    """Return a function for `torch.profiler.profile(on_trace_ready=...)` that writes this rank's trace.

    Every rank writes a file such as `folder/rank-0003.trace.json.gz`, and `rank-0003.flight.json` if PyTorch's flight
    recorder runs; `tritonmoe doctor folder` reads both. The second trace of a run is written to `folder-window-2`, and
    so on. Give the profiler `record_shapes=True`: without it the doctor can't know over gloo which rank sent how much.
    Call the profiler's `step()` after each step.

    Raises:
        FileExistsError: when a trace is complete, if the folder has a trace of this rank already: give each run a
            folder of its own.
    """
    num_written = 0

    def write(profile: torch.profiler.profile) -> None:
        nonlocal num_written
        num_written += 1
        rank = rank_of_job()
        name = f"rank-{int(os.environ.get('RANK', 0)) if rank is None else rank:04d}"
        into = Path(folder) if num_written == 1 else Path(f"{os.fspath(folder)}-window-{num_written}")
        into.mkdir(parents=True, exist_ok=True)
        trace = into / f"{name}.trace.json.gz"
        if trace.exists():
            raise FileExistsError(f"{trace} exists already: give each run a folder of its own")
        record = flight_record()
        profile.export_chrome_trace(str(trace))
        if record is not None:
            write_whole(into / f"{name}.flight.json", record, "flight record")

    return write
