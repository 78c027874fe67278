"""record: write what every layer call of this process does to files, one for each rank, which the doctor reads."""

import importlib.metadata
import json
import os
import platform
import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TextIO
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch

from tritonmoe.diagnosis.call_recording import FORMAT, SCHEMA, file_name, folder_name, plain_plan
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.expert_parallel.listeners import listeners
from tritonmoe.grouping import Grouping
from tritonmoe.overlap.report import CallMarks, LayerReport, PassReport, StepTiming
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.files import Json
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.runtime.version import __version__
from tritonmoe.simulation.cost_model import step_units
from tritonmoe.transports import Transport, TwoLevelTransport

__all__ = ["record"]

PAUSE_S = 0.25
"""So long the thread that writes waits for more calls: several in a row take it half of the time of single ones, for
which the core's caches are cold."""
DECIMALS = 7
"""Seconds are written to a tenth of a microsecond."""


@contextmanager
def record(path: str | os.PathLike) -> Iterator[None]:
    """Record every expert-parallel layer call of this process while the context lasts, for `tritonmoe doctor`.

    It goes around a training or benchmark loop; the layers may be anywhere, in models of transformers too. Every rank
    records, into a folder that they share or that is put together later: rank 3 writes rank-0003.jsonl, a header and
    one line for each call, within half a second of the end of its backward, or of its graph where none comes. Calls
    over a second transport go to transport-1 in there. Where a layer's ranks are not all of the job, as in a mesh of
    replicas and expert ranks, each group has a folder in there, ranks-0004-to-0007 say. The times are those of
    last_report; nothing is read from a device in a call, a thread of its own writes. Calls in a CUDA graph have no
    times and are left out.

    path: the folder, which may be new; emulated ranks, threads of one process, all give the same one.
    Raises:
        FileExistsError: in a layer's first call, before a row moves: it has a recording of this rank already. OSError:
            at the end, a file could not be written.
    Example:
        with tritonmoe.diagnosis.record("run"):
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


class _Held(NamedTuple):
    """A call that is to be written."""

    file: "_RankFile"
    header: CallHeader
    report: LayerReport
    pairs: HostCopy
    """Where the pairs of each expert start."""
    is_recompute: bool
    backward: PassReport | None = None
    backward_marks: CallMarks | None = None


class _Dropped(NamedTuple):
    """Says that a call's graph is gone, so that its backward can't come any more."""

    key: tuple[int, int]
    """As in _Recorder._held."""
    graph: "ReferenceType[Grouping]"


class _Recorder:
    """Listens to calls, on the threads that run them, and writes them on a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_users = 0
        self._files: WeakKeyDictionary[Transport, _RankFile] = WeakKeyDictionary()
        self._transports_of_rank: dict[tuple[Path, int], int] = {}
        self._held: dict[tuple[int, int], tuple[_Held, ReferenceType[Grouping]]] = {}
        """By file and number of the call, those whose backward may come, each with what its graph keeps. As long as
        the graph lives so does the report: holding it takes no memory worth a bound."""
        self._lock = threading.Lock()
        self._complete: queue.SimpleQueue[_Held | _Dropped | None] = queue.SimpleQueue()
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
            self._files[transport] = _RankFile(own, transport, device)
            self._transports_of_rank[folder, transport.rank] = number + 1
            transport.tells_arrivals = True

    def after_forward(self, transport: Transport, header: CallHeader, report: LayerReport, grouping: Grouping) -> None:
        file = self._files.get(transport)
        if header.captured or file is None:  # None: the call began before the recording
            return
        held = _Held(file, header, report, HostCopy(grouping.expert_offsets), is_recomputing())
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
            self._complete.put(held._replace(backward=report.backward, backward_marks=report.backward_marks))

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
            transport.tells_arrivals = False
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

    def _to_write(self, one: _Held | _Dropped | None) -> _Held | None:
        """Return a call that is over; of a call whose graph is gone, the forward, unless its backward came before."""
        if not isinstance(one, _Dropped):
            return one
        with self._lock:
            held, graph = self._held.get(one.key, (None, None))
            if graph is not one.graph:  # of the first of two runs
                return None
            del self._held[one.key]
        return held


def _write_calls(batch: Sequence[_Held]) -> None:
    """Write calls; their lines have reached the system when this returns."""
    for held in batch:
        held.file.write(held)
    for file in {held.file for held in batch}:
        file.flush()


class _RankFile:
    """The file of one rank on one transport."""

    def __init__(self, folder: Path, transport: Transport, device: torch.device) -> None:
        self._path = folder / file_name(transport.rank)
        if self._path.exists():
            raise FileExistsError(
                f"{self._path} is of an earlier run: give record() another folder for each run, and each restart of "
                "one, or remove this one first"
            )
        self._header: Json = {
            "format": FORMAT,
            "schema": SCHEMA,
            "rank": transport.rank,
            "size": transport.size,
            "job_ranks": transport.job_ranks,
            "transport": _public_name(type(transport)),
            "node_size": transport.node_size if isinstance(transport, TwoLevelTransport) else None,
            "shares_link": transport.shares_link(device),
            "uses_rendezvous": transport.uses_rendezvous(device),
            "host": socket.gethostname(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": {"tritonmoe": __version__, "python": platform.python_version(), **_versions("torch", "triton")},
            "wall_clock": time.time(),
            "perf_counter": time.perf_counter(),
        }
        self._file: TextIO | None = None

    def write(self, held: _Held) -> None:
        """Write a call, into memory at first."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("x")
            self._header["model"] = {**_sizes(held.header), "top_k": held.header.top_k}
            _write_line(self._file, self._header)
        _write_line(self._file, _plain_call(held))

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _write_line(file: TextIO, values: Json) -> None:
    file.write(json.dumps(values, separators=(",", ":")) + "\n")


def _versions(*packages: str) -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _sizes(header: CallHeader) -> dict[str, int]:
    return {name: getattr(header, name) for name in ("num_experts", "hidden_size", "intermediate_size")}


def _plain_call(held: _Held) -> Json:
    """Return a call as it is written; waits for the device, if it has not ended the call yet."""
    report, header = held.report, held.header
    (offsets,) = held.pairs.wait()
    sizes = [
        [float(last - first) for first, last in pairwise(of)]
        for of in (report.send_offsets, report.return_offsets, report.pair_offsets)
    ]
    return {
        "call": header.sequence,
        "layer": header.layer,
        "recomputed": held.is_recompute,
        "half": header.half,
        "choice": report.choice,
        "plan": plain_plan(report.overlap),
        "sizes": _sizes(header),
        "top_k": report.top_k,
        "row_bytes": report.row_bytes,
        "other_row_bytes": report.row_bytes if report.other_row_bytes is None else report.other_row_bytes,
        "rows_to_nodes": report.rows_to_nodes,
        "overflowed": report.overflowed,
        "send_offsets": report.send_offsets,
        "return_offsets": report.return_offsets,
        "pair_offsets": report.pair_offsets,
        "rows": report.traffic_rows[report.rank].tolist(),
        "pairs": report.traffic_pairs[report.rank].tolist(),
        "pairs_per_expert": offsets.diff().tolist(),
        "forward": _plain_pass(report.forward, report.marks, report, sizes),
        "backward": held.backward and _plain_pass(held.backward, held.backward_marks, report, sizes),
    }


def _plain_pass(layer_pass: PassReport, marks: CallMarks | None, report: LayerReport, sizes: list[list[float]]) -> Json:
    num_local_slices = report.overlap.num_local_slices

    def plain(timing: StepTiming) -> Json:
        step, arrivals = timing.step, timing.arrivals_s
        return {
            "kind": str(step.kind),
            "chunk": step.chunk,
            "start_s": round(timing.start_s, DECIMALS),
            "end_s": round(timing.end_s, DECIMALS),
            "wait_s": round(timing.wait_s, DECIMALS),
            "post_s": round(timing.post_s, DECIMALS),
            "units": step_units(step, num_local_slices, *sizes),
            "arrivals_s": arrivals and [None if at is None else round(at, DECIMALS) for at in arrivals],
        }

    return {
        "marks": marks and {name: round(at, DECIMALS) for name, at in marks._asdict().items()},
        "origin": round(layer_pass.started_at, DECIMALS),
        "total_s": round(layer_pass.total_s, DECIMALS),
        "steps": [plain(timing) for timing in layer_pass.steps],
        "steps_inside": [plain(timing) for timing in layer_pass.steps_inside],
    }


def _public_name(kind: type) -> str:
    """Return the name of the class, or of the nearest one above it whose name is public."""
    return next(one.__name__ for one in kind.__mro__ if not one.__name__.startswith("_"))
