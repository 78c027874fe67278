"""`tritonmoe doctor RUN...`: why the step of a recorded run takes as long as it does, and what would help.

RUN is a folder that `tritonmoe.tools.recording.record(RUN)`, or `tritonmoe bench overlap --record RUN`, has written;
or a
folder of traces of any trainer: torch.profiler's (Kineto), dumps of the flight recorder, files of the NCCL Inspector.
The doctor knows a file by its content, not by its name. The exit status is 0 if the run is healthy (nothing unusual
costs 5 % of a step), 1 if there are findings or no verdict, 2 if a file can't be read.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.tools.benchmarks.argument_types import Subparsers, output_file, positive, report_file
from tritonmoe.tools.benchmarks.ranks import device_and_backend
from tritonmoe.tools.doctor import reading as traces
from tritonmoe.tools.doctor.advice import Advice
from tritonmoe.tools.doctor.attribution import Verdict, attribute
from tritonmoe.tools.doctor.lanes import Shown, shown_of
from tritonmoe.tools.doctor.offers import offers_of
from tritonmoe.tools.doctor.page import RecordedPart, RunPart, runs_page
from tritonmoe.tools.doctor.probe_pairs import probe_pairs
from tritonmoe.tools.doctor.recorded_run import RecordedRun, judge_recording
from tritonmoe.tools.doctor.run_figures import figures_of
from tritonmoe.tools.doctor.verdict import as_json, as_text
from tritonmoe.tools.recording.recording_reader import is_recording, read_recording
from tritonmoe.tools.report.figures import Figures
from tritonmoe.tools.report.html import Page, write_page
from tritonmoe.tools.report.terminal import refused, wrapped
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["add_parser"]

PROBE_TIMEOUT_S = 120.0


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser("doctor", help="say why a recorded step is slow", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="a folder of a recording, or of traces")
    parser.add_argument(
        "--probe-links",
        action="store_true",
        help="under torchrun, without RUN: measure the link between every two ranks, "
        "whose speed a recording over NCCL doesn't show",
    )
    parser.add_argument(
        "--ranks-per-node",
        type=positive,
        metavar="COUNT",
        help="for traces: how many neighbouring ranks share a host, if the files don't tell or are wrong",
    )
    parser.add_argument("--json", type=output_file, help="also write all figures to this file")
    parser.add_argument("--html", type=report_file, help="also write a report to this file, a page for any browser")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.probe_links == bool(arguments.runs):
        print("tritonmoe doctor: give the folder of a recording, or --probe-links under torchrun", file=sys.stderr)
        return 2
    if arguments.probe_links:
        return _probe_links()
    try:
        found = [_judge(path, arguments.ranks_per_node) for path in arguments.runs]
        if arguments.json is not None:
            write_whole(arguments.json, json.dumps([one.json() for one in found], indent=1), "verdict")
        if arguments.html is not None:
            write_page(arguments.html, _page(found))
    except (ValueError, OSError) as error:
        return refused("doctor", error)
    print(wrapped("\n\n".join(one.text() for one in found)))
    return 0 if all(one.found.is_healthy for one in found) else 1


def _page(found: "Sequence[_Judged]") -> Page:
    figures = Figures([one.json() for one in found])
    return runs_page({str(one.run.path): one.part(figures, str(number)) for number, one in enumerate(found)}, figures)


@dataclass(frozen=True)
class _Judged:
    """A run, and why its steps take as long as they do."""

    run: traces.ReadRun
    found: Verdict

    @cached_property
    def advice(self) -> Sequence[Advice]:
        return self.run.advice if isinstance(self.run, RecordedRun) else offers_of(self.run.graph)

    @cached_property
    def shown(self) -> Shown:
        return shown_of(self.found)

    def text(self) -> str:
        return as_text(self.run, self.found, self.advice)

    def json(self) -> Json:
        figures = figures_of(self.run) if isinstance(self.run, RecordedRun) else {}
        return {**as_json(self.run, self.found, self.advice, self.shown), **figures}

    def part(self, figures: Figures, key: str) -> RunPart:
        if isinstance(self.run, RecordedRun):
            return RecordedPart(self.run, self.shown, figures, key)
        return RunPart(self.run, self.found, self.advice, self.shown, figures, key)


def _judge(path: Path, ranks_per_node: int | None) -> _Judged:
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder that record() wrote, or files of traces")
    if is_recording(path):
        if ranks_per_node is not None:
            raise ValueError(f"{path} is a recording, which has its ranks' hosts: leave --ranks-per-node out")
        own = judge_recording(read_recording(path))
        return _Judged(own, own.found)
    run = traces.read_traces(path, ranks_per_node)
    try:
        return _Judged(run, attribute(run.graph))
    except ValueError as error:  # each file was whole, and together they can't be
        raise ValueError(f"{path}: {error}") from error


def _probe_links() -> int:
    """Print what every link does, on rank 0; the status is 1 where one is slow."""
    if "RANK" not in os.environ:
        print("tritonmoe doctor: --probe-links needs torchrun: torchrun ... -m tritonmoe doctor ...", file=sys.stderr)
        return 2
    with torchrun_ranks(timeout_s=PROBE_TIMEOUT_S) as transport:
        found = probe_pairs(transport, device_and_backend()[0])
        if transport.rank == 0:
            print(found)
    return 1 if found.slow() else 0
