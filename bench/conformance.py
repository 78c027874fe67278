"""Compile small products and transpositions with several Tritons for each card, and run them on the virtual GPU.

Results are compared with float64 to the bit: `bench.conformance_cases` has the cases. A Triton runs in a process of its
own, with the folder that it was installed into before the installed one (pip install --no-deps --target).
"""

import argparse
import concurrent.futures
import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.codegen import overlay_environment, table_text
from tritonmoe.runtime.files import write_whole
from tritonmoe.tools.benchmarks.argument_types import output_file, positive
from tritonmoe.tools.benchmarks.kept_results import hash_of

__all__ = ["RELEASES", "RESULT", "cases_and_cards", "cases_hash", "main", "merged"]

RELEASES = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
ROOT = Path(__file__).parent.parent
RESULT = Path("bench") / "results" / "conformance.json"


def cases_hash() -> str:
    """Return a hash of the file that has the cases, their kernels and their operands."""
    return hash_of([(ROOT, ROOT / "bench" / "conformance_cases.py")])


def main(argv: list[str] | None = None) -> int:
    """Write the table; 2 when a Triton isn't installed or its process fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.conformance", description=__doc__)
    parser.add_argument("--triton-versions", nargs="+", default=list(RELEASES), help="releases (default: %(default)s)")
    parser.add_argument("--overlays", type=Path, default=Path("build") / "triton", help="folder of other Tritons")
    parser.add_argument("--workers", type=positive, default=2, help="Tritons that run at once (default 2)")
    parser.add_argument("--json", type=output_file, default=RESULT, help="file to write (default %(default)s)")
    parser.add_argument("--from", type=int, dest="first", help=argparse.SUPPRESS)  # as the process of one Triton
    arguments = parser.parse_args(argv)
    if arguments.first is not None:
        _print_outcomes(arguments.first)
        return 0
    installed = importlib.metadata.version("triton")
    overlays = {version: arguments.overlays.resolve() / version for version in arguments.triton_versions}
    for version, overlay in overlays.items():
        if version != installed and not (overlay / "triton").exists():
            command = f"python -m pip install --no-deps --target {overlay} triton=={version}"
            print(f"Triton {version} is not installed in {overlay}; {command} installs it", file=sys.stderr)
            return 2
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        found = {
            version: pool.submit(_outcomes, overlay if version != installed else None)
            for version, overlay in overlays.items()
        }
    try:
        results = merged({version: done.result() for version, done in found.items()})
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    table = {
        "benchmark": "conformance",
        "cases_hash": cases_hash(),
        "triton_versions": arguments.triton_versions,
        "torch": importlib.metadata.version("torch"),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_whole(arguments.json, table_text(table, results), "table")
    print(f"wrote {arguments.json} in {time.perf_counter() - started:.0f} s")
    return 0


def _print_outcomes(first: int) -> None:
    """Print the outcome of each case on each of its cards, from the one at this place on, one line of JSON each."""
    from bench.conformance_cases import CASES, outcome_of

    by_name = {case.name: case for case in CASES}
    for place in cases_and_cards()[first:]:
        print(json.dumps(place | outcome_of(by_name[place["case"]], place["card"])), flush=True)


def _outcomes(overlay: Path | None) -> list[dict[str, Any]]:
    """Return what one Triton prints; where its compiler ends the process, that is the outcome, and another goes on.

    Raises:
        RuntimeError: where the process fails in another way, with the end of what it said.
    """
    environment = overlay_environment(overlay) | {"OMP_NUM_THREADS": "1"}
    places = cases_and_cards()
    found: list[dict[str, Any]] = []
    while len(found) < len(places):
        command = [sys.executable, "-m", "bench.conformance", "--from", str(len(found))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        found += map(json.loads, filter(None, done.stdout.splitlines()))
        if done.returncode > 0:
            raise RuntimeError(f"{' '.join(command)} fails: {done.stderr[-2000:]}")
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            found.append(places[len(found)] | {"outcome": "not compiled", "detail": f"the compiler ends with {name}"})
    return found


def cases_and_cards() -> list[dict[str, Any]]:
    """Return the case's name and the card of each row of the table."""
    from bench.conformance_cases import CASES

    return [{"case": case.name, "card": card} for case in CASES for card in case.cards]


def merged(by_version: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each case and card, in their order: what each Triton makes of it, by its version."""
    merged_rows = []
    for rows in zip(*by_version.values(), strict=True):
        where = {name: rows[0][name] for name in ("case", "card")}
        outcomes = {
            version: {name: value for name, value in row.items() if name not in where}
            for version, row in zip(by_version, rows, strict=True)
        }
        merged_rows.append(where | {"outcomes": outcomes})
    return merged_rows


if __name__ == "__main__":
    sys.exit(main())
