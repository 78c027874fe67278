"""RankFileWriter: the calls of one rank on one transport, as lines of a file, which rank_file.py reads."""

import importlib.metadata
import json
import os
import platform
import socket
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from tritonmoe.dispatch.header import CallHeader
from tritonmoe.expert_parallel.state import state_of
from tritonmoe.overlap.report import LayerReport, PassReport, StepTiming
from tritonmoe.overlap.simulation.cost_model import step_units
from tritonmoe.overlap.steps import StepKind
from tritonmoe.overlap.tuning.measured_calls import layer_work
from tritonmoe.runtime.files import Json
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.runtime.version import __version__
from tritonmoe.tools.recording.call_recording import CALLS_WITH_COPIES, FORMAT, SCHEMA, file_name, plain_plan
from tritonmoe.transports import Transport

__all__ = ["HeldCall", "RankFileWriter"]

DECIMALS = 7
"""Seconds are written to a tenth of a microsecond."""


class HeldCall(NamedTuple):
    """A call that is to be written."""

    file: "RankFileWriter"
    header: CallHeader
    report: LayerReport
    pairs: HostCopy
    """Where the pairs of each expert start."""
    is_recompute: bool
    load_balance_loss_weight: float | None
    """Of the layer; None where its router is not this package's."""
    backward: PassReport | None = None


class RankFileWriter:
    """The file of one rank on one transport."""

    def __init__(self, folder: Path, transport: Transport, device: torch.device) -> None:
        self._path = folder / file_name(transport.rank)
        if self._path.exists():
            raise FileExistsError(
                f"{self._path} was written by an earlier run: give record() a new folder for each run and for each "
                "restart, or remove this one first"
            )
        self._header: Json = {
            "format": FORMAT,
            "schema": SCHEMA,
            "rank": transport.rank,
            "size": transport.size,
            "job_ranks": transport.job_ranks,
            "transport": _public_name(type(transport)),
            "world": _public_name(type(transport.single_level)),
            "node_size": transport.node_size,
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
        self._state = state_of(transport)
        self._weights: dict[int, float | None] = {}
        self.num_left_out = 0
        """Calls with copies of experts, which are not written."""

    def load_balance_loss_weight(self, layer: int) -> float | None:
        """Return that of a layer, by its number on the transport; its copies have the same. None: it has none."""
        if layer not in self._weights:
            found = [calls.load_balance_loss_weight for calls in self._state.layers if calls.layer == layer]
            self._weights[layer] = found[0] if found else None
        return self._weights[layer]

    def write(self, held: HeldCall) -> None:
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
        """Write how many calls were left out, if any were, and end the file."""
        if self._file is not None:
            if self.num_left_out:
                _write_line(self._file, {CALLS_WITH_COPIES: self.num_left_out})
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


def _plain_call(held: HeldCall) -> Json:
    """Return a call as it is written; waits for the device, if it has not ended the call yet."""
    report, header = held.report, held.header
    (offsets,), work = held.pairs.wait(), layer_work(report)
    sizes = [
        [float(last - first) for first, last in pairwise(of)]
        for of in (report.send_offsets, report.return_offsets, report.pair_offsets)
    ]
    return {
        "call": header.sequence,
        "layer": header.layer,
        "recomputed": held.is_recompute,
        "half": header.half,
        **({"part": report.part} if report.part else {}),
        "choice": report.choice,
        "plan": plain_plan(report.overlap),
        "sizes": _sizes(header),
        "top_k": report.top_k,
        "row_bytes": report.row_bytes,
        "gradient_row_bytes": work.bytes_per_row(StepKind.COMBINE_BACKWARD),
        "other_row_bytes": work.bytes_per_row(StepKind.COMBINE),
        "load_balance_loss_weight": held.load_balance_loss_weight,
        "rows_to_nodes": report.rows_to_nodes,
        "overflowed": report.overflowed,
        "send_offsets": report.send_offsets,
        "return_offsets": report.return_offsets,
        "pair_offsets": report.pair_offsets,
        "rows": report.traffic_rows[report.rank].tolist(),
        "pairs": report.traffic_pairs[report.rank].tolist(),
        "pairs_per_expert": offsets.diff().tolist(),
        "forward": _plain_pass(report.forward, report, sizes),
        "backward": held.backward and _plain_pass(held.backward, report, sizes),
    }


def _plain_pass(layer_pass: PassReport, report: LayerReport, sizes: list[list[float]]) -> Json:
    num_local_slices, marks = report.overlap.num_local_slices, layer_pass.marks

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
            **({"load_s": round(timing.load_s, DECIMALS)} if timing.load_s else {}),
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
