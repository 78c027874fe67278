"""Compile every kernel for every target under the oldest and the installed Triton, without a GPU, and keep the table.

An older Triton is installed into a folder of its own (pip install --target), which stands before the installed one in
PYTHONPATH of a second process: no second torch is needed.

With --steps it is the small table of what a step of each of a layer's products costs: minutes instead of two hours.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tritonmoe.benchmarks.argument_types import output_file, positive
from tritonmoe.benchmarks.kept_results import hash_of
from tritonmoe.runtime.files import write_whole

__all__ = ["OLDEST_TRITON", "STEPS", "STEP_KERNELS", "main", "source_hash"]

OLDEST_TRITON = "3.6.0"
ROOT = Path(__file__).parent.parent / "tritonmoe"
RESULT = Path("bench") / "results" / "codegen.json"
STEPS = RESULT.with_name("codegen_steps.json")
STEP_VARIANT = "bf16"
STEP_KERNELS = (
    *("up up", "down grouped_matmul", "down_grad down_grad", "up_grad grouped_matmul"),
    *("weight_grad W1 outer_sums", "weight_grad W2 outer_sums"),
)
"""The products of a training step of one layer."""


def source_hash() -> str:
    """Return a hash of everything that the kernels' machine code depends on, this side of Triton.

    These are the files of kernels/, the list of what aot/ compiles, and the backend that launches them.
    """
    kernels = ROOT / "kernels"
    files = [*sorted(kernels.rglob("*.py")), ROOT / "aot" / "launches.py", ROOT / "backends" / "triton.py"]
    return hash_of((ROOT, path) for path in files)


def main(argv: list[str] | None = None) -> int:
    """Write the table; 1 when a kernel doesn't fit, 2 when a Triton can't be had."""
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__)
    installed = importlib.metadata.version("triton")
    parser.add_argument(
        "--triton-versions",
        nargs="+",
        default=[OLDEST_TRITON, installed],
        help=f"Triton releases; others than the installed {installed} are downloaded (default: {OLDEST_TRITON} and it)",
    )
    parser.add_argument("--overlays", type=Path, default=Path("build") / "triton", help="folder of other Tritons")
    parser.add_argument("--workers", type=positive, default=2, help="compiling processes (default 2)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--variants", nargs="+", help="only these variants (default: all)")
    what.add_argument("--steps", action="store_true", help=f"what a step of each product of {STEP_VARIANT} costs")
    parser.add_argument("--targets", nargs="+", help="only these targets (default: all)")
    parser.add_argument("--json", type=output_file, help=f"file to write (default {RESULT}, of steps {STEPS})")
    arguments = parser.parse_args(argv)
    before, started = source_hash(), time.perf_counter()
    rows: list[dict[str, Any]] = []
    problems = 0
    for version in dict.fromkeys(arguments.triton_versions):
        try:
            overlay = None if version == installed else _overlay(version, arguments.overlays)
        except subprocess.CalledProcessError:  # pip has said why
            print(f"Triton {version} could not be installed into {arguments.overlays}", file=sys.stderr)
            return 2
        found = _compile(overlay, arguments)
        if found is None:
            print(f"Triton {version} compiled nothing", file=sys.stderr)
            return 2
        problems += sum(bool(row["problem"]) for row in found)
        rows += [{"triton": version, **row} for row in found]
        print(f"Triton {version}: {len(found)} kernels, {time.perf_counter() - started:.0f} s so far", flush=True)
    if source_hash() != before:
        print("the kernels' sources changed meanwhile: run it again", file=sys.stderr)
        return 2
    table = {
        "benchmark": "codegen",
        "source_hash": before,
        "triton_versions": list(dict.fromkeys(arguments.triton_versions)),
        "torch": importlib.metadata.version("torch"),
        "date": time.strftime("%Y-%m-%d"),
    }
    # One row a line: a readable difference when a kernel changes.
    shortened = _step_of if arguments.steps else _without_zeros
    lines = [json.dumps(shortened(row)) for row in rows]
    text = json.dumps(table, indent=1)[:-2] + ',\n "results": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    file = arguments.json or (STEPS if arguments.steps else RESULT)
    write_whole(file, text, "table")
    print(f"wrote {file} in {time.perf_counter() - started:.0f} s")
    return 1 if problems else 0


def _without_zeros(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is zero or empty, and what only the table of steps has: a short file."""
    unused = {"step"} if row.get("matrix") else {"step", "loop"}
    return {name: value for name, value in row.items() if value and name not in unused}


def _step_of(row: dict[str, Any]) -> dict[str, Any]:
    where = {name: row[name] for name in ("triton", "kernel", "target")}
    return where | row["step"] | {"loop_instructions": row["loop"]["all"]}


def _overlay(version: str, folder: Path) -> Path:
    """Return a folder that holds this Triton, and download it where there is none."""
    overlay = (folder / version).resolve()
    if not (overlay / "triton").exists():
        command = ["pip", "install", "--quiet", "--no-deps", "--target", str(overlay), f"triton=={version}"]
        subprocess.run([sys.executable, "-m", *command], check=True)
    return overlay


def _compile(overlay: Path | None, arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Return the rows of one Triton; None where it can't compile."""
    command = [sys.executable, "-m", "tritonmoe.aot", "--json", "--workers", str(arguments.workers)]
    if arguments.steps:
        command += ["--variants", STEP_VARIANT, "--kernels", *STEP_KERNELS]
    else:
        command += ["--variants", *arguments.variants] if arguments.variants else ["--all"]
    command += ["--targets", *arguments.targets] if arguments.targets else []
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(overlay)] if overlay else []
    paths += [str(ROOT.parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if done.returncode in (0, 1) and done.stdout else None


if __name__ == "__main__":
    sys.exit(main())
