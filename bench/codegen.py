"""Compile every kernel for every target under the oldest and the installed Triton, without a GPU, and keep the worst.

An older Triton is installed into a folder of its own (pip install --target), which stands before the installed one in
PYTHONPATH of a second process: no second torch is needed.

The table has a line for each kernel of an operation, with the worst that any layout, gate, dtype, shape and batch size
makes of it; --rows keeps each of them. With --steps it is the table of what a step of each of a layer's products costs,
with plain weights and with packed ones: minutes instead of two hours.
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

from tritonmoe.runtime.files import write_whole
from tritonmoe.tools.benchmarks.argument_types import output_file, positive
from tritonmoe.tools.benchmarks.kept_results import hash_of

__all__ = [
    "FIGURES",
    "OLDEST_TRITON",
    "PACKED_STEP_KERNELS",
    "STEPS",
    "STEP_KERNELS",
    "main",
    "overlay_environment",
    "source_hash",
    "table_text",
    "worst_of_kernels",
]

OLDEST_TRITON = "3.6.0"
ROOT = Path(__file__).parent.parent / "tritonmoe"
RESULT = Path("bench") / "results" / "codegen.json"
STEPS = RESULT.with_name("codegen_steps.json")
STEP_VARIANT = "Qwen3-30B-A3B"
STEP_KERNELS = (
    *("up up", "down grouped_matmul", "down_grad down_grad", "up_grad grouped_matmul"),
    *("weight_grad W1 outer_sums", "weight_grad W2 outer_sums"),
)
"""The products of a training step of one layer."""
STEP_FORMATS = ("mxfp4", "fp8", "nf4")
"""Variants that are named as the formats of their packed weights, whose products decode them."""
PACKED_STEP_KERNELS = tuple(
    kernel.replace(" ", f" of {weight_format} ", 1) for weight_format in STEP_FORMATS for kernel in STEP_KERNELS[:4]
)
FIGURES = {"registers": max, "spills": max, "shared_bytes": max, "occupancy": min}
"""What of a kernel is kept, and which of two is worse."""


def source_hash() -> str:
    """Return a hash of everything that the kernels' machine code depends on, this side of Triton.

    These are the files of kernels/ but the one that launches what was compiled, the list of what aot/ compiles, and the
    backend that launches them.
    """
    kernels = ROOT / "ops" / "kernels"
    compiled = [ROOT / "ops" / one for one in ("aot/launches.py", "aot/variants.py", "backends/triton.py")]
    files = [*sorted({*kernels.rglob("*.py")} - {kernels / "compiled.py"}), *compiled]
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
    what.add_argument("--steps", action="store_true", help="what a step of each product of some layers costs")
    parser.add_argument("--targets", nargs="+", help="only these targets (default: all)")
    parser.add_argument("--json", type=output_file, help=f"file to write (default {RESULT}, of steps {STEPS})")
    parser.add_argument("--rows", type=output_file, help="file for the row of every kernel (default: none)")
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
    if arguments.rows:
        write_whole(arguments.rows, table_text(table, [_without_zeros(row) for row in rows]), "rows")
    file = arguments.json or (STEPS if arguments.steps else RESULT)
    if arguments.steps:
        text = table_text(table, [_step_of(row) for row in rows])
    else:
        text = table_text(table | _counts(rows), worst_of_kernels(rows))
    write_whole(file, text, "table")
    print(f"wrote {file} in {time.perf_counter() - started:.0f} s")
    return 1 if problems else 0


def table_text(table: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Return a table as JSON, one result a line: a readable difference when a kernel changes."""
    lines = map(json.dumps, results)
    return json.dumps(table, indent=1)[:-2] + ',\n "results": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def _counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the table says of all rows: how many, of how many variants, how many spill, and which are unfit."""
    return {
        "num_kernels": len(rows),
        "num_variants": len({row["variant"] for row in rows}),
        "num_spilling": sum(bool(row.get("spills")) for row in rows),
        "unfit": [_without_zeros(row) for row in rows if row.get("problem")],
        "figures": list(FIGURES),
    }


def worst_of_kernels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each kernel its worst FIGURES by Triton and target, of all variants that compiled.

    What the table of steps counts too, instructions of the innermost loop of a product's STEP_VARIANT, is in "loops".
    """
    kernels: dict[str, dict[str, Any]] = {}
    for row in rows:
        place = row["triton"], row["target"]
        kernel = kernels.setdefault(row["kernel"], {"num_kernels": 0, "worst": {}, "loops": {}})
        kernel["num_kernels"] += 1
        if row.get("error"):
            continue
        figures = {name: row.get(name, 0) for name in FIGURES}
        before = kernel["worst"].get(place, figures)
        kernel["worst"][place] = {name: worse(before[name], figures[name]) for name, worse in FIGURES.items()}
        if row["variant"] == STEP_VARIANT and row["kernel"] in STEP_KERNELS:
            kernel["loops"][place] = row["loop"]["all"]
    return [
        {
            "kernel": name,
            "num_kernels": kernel["num_kernels"],
            "worst": _nested({place: list(figures.values()) for place, figures in kernel["worst"].items()}),
        }
        | ({"loops": _nested(kernel["loops"])} if kernel["loops"] else {})
        for name, kernel in kernels.items()
    ]


def _nested(by_place: dict[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    """Return values by Triton and target as values by target, by Triton."""
    found: dict[str, dict[str, Any]] = {}
    for (version, target), value in by_place.items():
        found.setdefault(version, {})[target] = value
    return found


def _without_zeros(row: dict[str, Any]) -> dict[str, Any]:
    """Drop fields that are zero or empty, or that only the table of steps has: a short file."""
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


def overlay_environment(overlay: Path | None) -> dict[str, str]:
    """Return the environment of a process that compiles with the Triton of a folder; None: the installed one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(overlay)] if overlay else []
    paths += [str(ROOT.parent), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(paths)}


def _compile(overlay: Path | None, arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Return the rows of one Triton; None where it can't compile."""
    command = [sys.executable, "-m", "tritonmoe.ops.aot", "--json", "--workers", str(arguments.workers)]
    if arguments.steps:
        kernels = *STEP_KERNELS, *PACKED_STEP_KERNELS
        command += ["--variants", STEP_VARIANT, *STEP_FORMATS, "--kernels", *kernels]
    else:
        command += ["--variants", *arguments.variants] if arguments.variants else ["--all"]
    command += ["--targets", *arguments.targets] if arguments.targets else []
    done = subprocess.run(command, env=overlay_environment(overlay), stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if done.returncode in (0, 1) and done.stdout else None


if __name__ == "__main__":
    sys.exit(main())
