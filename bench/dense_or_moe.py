"""`python -m bench.dense_or_moe`: the code of docs/tutorials/dense-or-moe.md, run with several seeds.

Each training has one thread and a process of its own; its cost is the CPU time of that process, whatever else runs.
"""

import argparse
import contextlib
import io
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tritonmoe.tools.benchmarks.argument_types import output_file, positive
from tritonmoe.tools.benchmarks.timing import write_json

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "dense-or-moe.md"
KINDS = {"dense": False, "moe": True}


def train_of_page() -> Callable[[bool, int], list[tuple[int, float]]]:
    """Return the page's function train(is_moe, seed), from its blocks of Python up to the one that defines it."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, PAGE.name, "exec"), names)
        if "train" in names:
            return names["train"]
    raise ValueError(f"{PAGE} defines no function train")


def run(kind: str, seed: int) -> dict[str, Any]:
    """Return the curve of one training, and the seconds of CPU time that it took."""
    torch.set_num_threads(1)
    train = train_of_page()
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        curve = train(KINDS[kind], seed)
    return {"kind": kind, "seed": seed, "curve": curve, "cpu_s": time.process_time() - started}


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.dense_or_moe", description=__doc__)
    parser.add_argument("--seeds", type=positive, default=3, help="trainings of each kind (default 3)")
    parser.add_argument("--json", type=output_file, help="also write the curves to this file")
    arguments = parser.parse_args()
    cases = [(kind, seed) for seed in range(arguments.seeds) for kind in KINDS]
    with ProcessPoolExecutor(len(cases), multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(run, *zip(*cases, strict=True)))
    for one in runs:
        print(f"{one['kind']:5} seed {one['seed']}: {one['curve'][-1][1]:.3f} nats a byte, {one['cpu_s']:.0f} s")
    write_json(arguments.json, "dense_or_moe", {"runs": runs})


if __name__ == "__main__":
    main()
