"""`tritonmoe doctor RUN...`: why the step of a recorded run takes as long as it does, and what would help.

RUN is a folder that `tritonmoe.diagnosis.record(RUN)`, or `tritonmoe bench overlap --record RUN`, has written. The exit
status is 0 where nothing costs 8 % of the step, 1 where something does, 2 where a recording can't be read.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from tritonmoe.benchmarks.argument_types import Subparsers, output_file, report_file
from tritonmoe.benchmarks.ranks import device_and_backend
from tritonmoe.diagnosis.attribution import attribute
from tritonmoe.diagnosis.probe_pairs import probe_pairs
from tritonmoe.diagnosis.reading import read_recording
from tritonmoe.diagnosis.run_page import run_page
from tritonmoe.diagnosis.verdict import as_json, as_text
from tritonmoe.report.html import write_page
from tritonmoe.runtime.files import write_whole
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["add_parser"]

PROBE_TIMEOUT_S = 120.0


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser("doctor", help="say why a recorded step is slow", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="a folder that record() has written")
    parser.add_argument(
        "--probe-links",
        action="store_true",
        help="under torchrun, without RUN: measure the link between every two ranks (NCCL tells of no arrivals)",
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
        found = [attribute(read_recording(path)) for path in arguments.runs]
        if arguments.json is not None:
            write_whole(arguments.json, json.dumps([as_json(one) for one in found], indent=1), "verdict")
        if arguments.html is not None:
            write_page(arguments.html, run_page(found))
    except (ValueError, OSError) as error:
        print(f"tritonmoe doctor: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(map(as_text, found)))
    return 0 if all(one.is_healthy for one in found) else 1


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
