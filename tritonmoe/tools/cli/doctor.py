"""`tritonmoe doctor RUN...`: why the step of a recorded run takes as long as it does, and what would help.

RUN is a folder that `tritonmoe.tools.recording.record(RUN)`, or `tritonmoe bench overlap --record RUN`, has written;
or a
folder of traces of any trainer: torch.profiler's (Kineto), dumps of the flight recorder, files of the NCCL Inspector.
The doctor knows a file by its content, not by its name. The exit status is 0 if the run is healthy (nothing unusual
costs 5 % of a step), 1 if there are findings or no verdict, 2 if a file can't be read.
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path

import torch

from tritonmoe.overlap.simulation.cost_model import fit_line
from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.tools.benchmarks.argument_types import Subparsers, output_file, positive, report_file
from tritonmoe.tools.benchmarks.ranks import device_and_backend
from tritonmoe.tools.doctor import reading as traces
from tritonmoe.tools.doctor.advice import Advice
from tritonmoe.tools.doctor.attribution import Verdict, attribute
from tritonmoe.tools.doctor.lanes import Shown, shown_of
from tritonmoe.tools.doctor.link_fit import SMALLEST_RATIO
from tritonmoe.tools.doctor.offers import offers_of
from tritonmoe.tools.doctor.page import RecordedPart, RunPart, runs_page
from tritonmoe.tools.doctor.recorded_run import RecordedRun, judge_recording
from tritonmoe.tools.doctor.run_figures import figures_of
from tritonmoe.tools.doctor.verdict import as_json, as_text
from tritonmoe.tools.recording.recording_reader import is_recording, read_recording
from tritonmoe.tools.report.figures import Figures
from tritonmoe.tools.report.html import Page, write_page
from tritonmoe.tools.report.terminal import refused, wrapped
from tritonmoe.transports import Transport
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["PairTimes", "add_parser", "probe_pairs"]

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
        with _no_collections():
            found = [_judge(path, arguments.ranks_per_node) for path in arguments.runs]
        if arguments.json is not None:
            write_whole(arguments.json, json.dumps([one.json() for one in found], indent=1), "verdict")
        if arguments.html is not None:
            write_page(arguments.html, _page(found))
    except (ValueError, OSError) as error:
        return refused("doctor", error)
    print(wrapped("\n\n".join(one.text() for one in found)))
    return 0 if all(one.found.is_healthy for one in found) else 1


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep Python from searching millions of small objects for circles, which there are none of."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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


PAIR_BYTES = (2**12, 2**20, 2**22)
PAIR_ROUNDS = 5
ROW_BYTES = 256


@dataclass(frozen=True)
class PairTimes:
    """What a message from rank i to rank k takes, nothing else being under way."""

    latency_s: list[list[float]]
    """[i][k]; 0 on the diagonal."""
    byte_s: list[list[float]]
    """[i][k] seconds of each further byte."""

    def slow(self) -> list[tuple[int, int, float]]:
        """Return (i, k, how many times as long as on the typical link a byte takes) of slow pairs, the worst first."""
        size = len(self.byte_s)
        links = list(permutations(range(size), 2))
        typical = statistics.median_low([self.byte_s[i][k] for i, k in links])
        found = [(i, k, self.byte_s[i][k] / typical) for i, k in links if typical > 0]
        return sorted((one for one in found if one[2] > SMALLEST_RATIO), key=lambda one: -one[2])

    def __str__(self) -> str:
        size = len(self.byte_s)
        lines = ["GB/s from rank (row) to rank (column):", "      " + "".join(f"{k:>9}" for k in range(size))]
        for i, of in enumerate(self.byte_s):
            rates = ("-" if i == k else "inf" if not s else f"{1e-9 / s:.3g}" for k, s in enumerate(of))
            lines.append(f"{i:>6}" + "".join(f"{rate:>9}" for rate in rates))
        slow = [f"rank {i} to rank {k}: {times:.1f} times as long a byte" for i, k, times in self.slow()[:8]]
        return "\n".join([*lines, *(slow or ["no link is slower than the others by 15 %"])])


def probe_pairs(transport: Transport, device: torch.device | str = "cpu") -> PairTimes:
    """Measure the links between all pairs of ranks, one direction at a time; every rank makes the call.

    At a time a rank sends to one other, or receives from one, or rests: an exchange ends when its rows have left, too,
    so that a slow way to another rank would look like a slow way from one. The median of five rounds of three sizes
    counts, by the clock of the rank that receives, from when all ranks are ready; all ranks get the same figures.
    """
    size, own = transport.size, transport.rank
    seconds = torch.zeros(len(PAIR_BYTES), size, size, dtype=torch.int64, device="cpu")
    for distance in range(1, size):
        for receiver_of in _turns(size, distance):
            for number, num_bytes in enumerate(PAIR_BYTES):
                times = [_send(transport, receiver_of, num_bytes, device) for _ in range(PAIR_ROUNDS)]
                for sender, receiver in receiver_of.items():
                    if receiver == own:
                        seconds[number, sender, own] = round(1e9 * statistics.median(times))
    told = transport.exchange_counts(seconds[:, :, own].flatten().expand(size, -1).contiguous())
    everybody = told.view(size, len(PAIR_BYTES), size).permute(1, 2, 0).to(torch.float64) / 1e9  # (sizes, W, W)
    latency, byte = [[0.0] * size for _ in range(size)], [[0.0] * size for _ in range(size)]
    for i, k in permutations(range(size), 2):
        points = zip(map(float, PAIR_BYTES), everybody[:, i, k].tolist(), strict=True)
        latency[i][k], byte[i][k] = fit_line(list(points))
    return PairTimes(latency, byte)


def _turns(size: int, distance: int) -> list[dict[int, int]]:
    """Return who sends to whom at a time (sender: receiver), `distance` ranks further, until every rank has sent once.

    Example:
        3 ranks, to the next one: rank 0 to 1, then rank 1 to 2, then rank 2 to 0.
    """
    turns: list[dict[int, int]] = [{}, {}, {}]
    length = size // math.gcd(size, distance)  # of the circles in which the ranks pass something on
    for first in range(size // length):
        for place in range(length):
            sender = (first + place * distance) % size
            turn = 2 if length % 2 and place == length - 1 else place % 2
            turns[turn][sender] = (sender + distance) % size
    return [turn for turn in turns if turn]


def _send(transport: Transport, receiver_of: dict[int, int], num_bytes: int, device: torch.device | str) -> float:
    """Send so many bytes from every sender to its receiver, and return the seconds of this rank's exchange."""
    size, own = transport.size, transport.rank
    there, here = [0] * size, [0] * size
    for sender, receiver in receiver_of.items():
        if sender == own:
            there[receiver] = num_bytes // ROW_BYTES
        if receiver == own:
            here[sender] = num_bytes // ROW_BYTES
    rows = torch.zeros(sum(there), ROW_BYTES, dtype=torch.uint8, device=device)
    transport.barrier()
    started = time.perf_counter()
    pending = transport.exchange(rows, there, here)
    pending.wait()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return (pending.finished_at() or time.perf_counter()) - started
