"""record: write what every layer call of this process does to files, one for each rank, which the doctor reads."""

import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch

from tritonmoe.dispatch.header import CallHeader
from tritonmoe.expert_parallel.call import listeners
from tritonmoe.ops.grouping import Grouping
from tritonmoe.overlap.report import LayerReport
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.files import write_whole
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.tools.recording.call_recording import folder_name
from tritonmoe.tools.recording.rank_file_writer import HeldCall, RankFileWriter
from tritonmoe.transports import Transport
from tritonmoe.transports.torch_groups import flight_record, rank_of_job

__all__ = ["on_trace_ready", "record"]

PAUSE_S = 0.25
"""So long the thread that writes waits for more calls: several in a row take it half of the time of single ones, for
which the core's caches are cold."""
LEFT_OUT = (
    "calls whose hot experts have copies (OverlapConfig.balance) are left out of a recording, which has no word for "
    "copies and counts these calls only: record a run without balance for the doctor; last_report tells what copies did"
)


@contextmanager
def record(path: str | os.PathLike) -> Iterator[None]:
    """Record every expert-parallel layer call of this process while the context lasts, for `tritonmoe doctor`.

    Put `record` around a training or benchmark loop. The layers may be anywhere, in models of transformers too. Every
    rank records, into one folder that the ranks share, or into several that are put together later. Rank 3 writes
    rank-0003.jsonl: a header, and one line for each call. The line is written within half a second after the call's
    backward, or, if there is no backward, after autograd freed the graph. Calls over a second transport are written to
    the subfolder transport-1. If a layer has only a part of the job's ranks, as in a mesh of replicas and expert ranks,
    each group of ranks has a subfolder, such as ranks-0004-to-0007. The times are those of last_report. A thread writes
    them, so that no call reads from the device. Calls in a CUDA graph have no times and are left out.

    path: the folder, which may be new; all emulated ranks (threads of one process) give the same folder.
    Raises:
        FileExistsError: in a layer's first call, before a row moves, if the folder has a recording of this rank
            already. OSError: at the end, if a file could not be written.
    Example:
        with tritonmoe.tools.recording.record("run"):
            train(model, steps=20)
    """
    recorder = _enter(Path(path).absolute())
    try:
        yield
    finally:
        _leave(recorder)


_recorders: "dict[Path, _Recorder]" = {}
_lock = threading.Lock()


def _enter(path: Path) -> "_Recorder":
    with _lock:
        recorder = _recorders.get(path)
        if recorder is None:
            path.mkdir(parents=True, exist_ok=True)
            recorder = _recorders[path] = _Recorder(path)
            listeners.append(recorder)
        recorder.num_users += 1
        return recorder


def _leave(recorder: "_Recorder") -> None:
    with _lock:
        recorder.num_users -= 1
        if recorder.num_users:
            return
        del _recorders[recorder.path]
        listeners.remove(recorder)
    recorder.end()


class _Dropped(NamedTuple):
    """A message that a call's graph is gone, so that its backward can't come any more."""

    key: tuple[int, int]
    """As in _Recorder._held."""
    graph: "ReferenceType[Grouping]"


class _Recorder:
    """Listens to calls, on the threads that run them, and writes them on a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_users = 0
        self._has_left_out = False
        self._files: WeakKeyDictionary[Transport, RankFileWriter] = WeakKeyDictionary()
        self._transports_of_rank: dict[tuple[Path, int], int] = {}
        self._held: dict[tuple[int, int], tuple[HeldCall, ReferenceType[Grouping]]] = {}
        """By file and number of the call, those whose backward may come, each with what its graph keeps. As long as
        the graph lives so does the report: holding it takes no memory worth a bound."""
        self._lock = threading.Lock()
        self._complete: queue.SimpleQueue[HeldCall | _Dropped | None] = queue.SimpleQueue()
        self._failure: OSError | None = None
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    def before_forward(self, transport: Transport, device: torch.device) -> None:
        with self._lock:
            if transport in self._files:
                return
            ranks = transport.job_ranks
            folder = self.path if ranks is None else self.path / folder_name(ranks)
            number = self._transports_of_rank.get((folder, transport.rank), 0)
            own = folder / f"transport-{number}" if number else folder
            self._files[transport] = RankFileWriter(own, transport, device)
            self._transports_of_rank[folder, transport.rank] = number + 1
            transport.records_arrivals = True

    def after_forward(self, transport: Transport, header: CallHeader, report: LayerReport, grouping: Grouping) -> None:
        file = self._files.get(transport)
        if header.captured or file is None:  # None: the call began before the recording
            return
        if report.copies is not None and report.copies.planned is not None:
            if not self._has_left_out:
                warnings.warn(LEFT_OUT, stacklevel=2)
            self._has_left_out = True
            file.num_left_out += 1
            return
        weight = file.load_balance_loss_weight(header.layer)
        held = HeldCall(file, header, report, HostCopy(grouping.expert_offsets), is_recomputing(), weight)
        if not header.grad_enabled:
            self._complete.put(held)
            return
        key, complete = (id(file), header.sequence), self._complete
        # Memory is freed on any thread and at any time, under the lock too: only the queue may be used then.
        graph = ref(grouping, lambda gone: complete.put(_Dropped(key, gone)))
        with self._lock:
            self._held[key] = held, graph

    def after_backward(self, transport: Transport, header: CallHeader, report: LayerReport) -> None:
        with self._lock:
            file = self._files.get(transport)
            held, _ = self._held.pop((id(file), header.sequence), (None, None))
        if held is not None:
            self._complete.put(held._replace(backward=report.backward))

    def end(self) -> None:
        """Write what is left; raises OSError where something could not be written."""
        with self._lock:
            left, self._held = self._held, {}
        for held, _ in left.values():
            self._complete.put(held)
        self._complete.put(None)
        self._is_ending.set()
        self._thread.join()
        for file in self._files.values():
            file.close()
        for transport in self._files:
            transport.records_arrivals = False
        if self._failure is not None:
            raise self._failure

    def _write(self) -> None:
        is_over = False
        while not is_over:
            batch = [self._complete.get()]
            self._is_ending.wait(PAUSE_S)
            while not self._complete.empty():
                batch.append(self._complete.get())
            is_over = any(one is None for one in batch)
            if self._failure is None:
                try:
                    _write_calls([held for held in map(self._to_write, batch) if held is not None])
                except OSError as error:
                    self._failure = error

    def _to_write(self, one: HeldCall | _Dropped | None) -> HeldCall | None:
        """Return a call that is over; of a call whose graph is gone, the forward, unless its backward came before."""
        if not isinstance(one, _Dropped):
            return one
        with self._lock:
            held, graph = self._held.get(one.key, (None, None))
            if graph is not one.graph:  # of the first of two runs
                return None
            del self._held[one.key]
        return held


def _write_calls(batch: Sequence[HeldCall]) -> None:
    """Write calls; their lines have reached the system when this returns."""
    for held in batch:
        held.file.write(held)
    for file in {held.file for held in batch}:
        file.flush()


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
