"""`python -m bench.recording`: what it costs a training step that `record` writes down what it does.

Two processes over gloo on one machine's loopback train one MoE layer: some steps inside of a `record`, as many outside,
in interleaved rounds. A step is the layer's forward and backward; its time is that of the slower rank. A thread of its
own writes meanwhile. What the steps take changes from round to round by far more than a hundredth; what the cores
compute for them, writing included, changes less, and is told too.
"""

import argparse
import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

import tritonmoe as tm
from tritonmoe.tools.benchmarks.ranks import slowest
from tritonmoe.tools.benchmarks.timing import add_arguments, summarize, write_json
from tritonmoe.tools.recording import record
from tritonmoe.transports import Transport
from tritonmoe.transports.torchrun import torchrun_ranks

CONFIG = tm.MoEConfig(hidden_size=512, intermediate_size=256, num_experts=64, top_k=8)
NUM_TOKENS, NUM_RANKS, NUM_CHUNKS, WARM_UP, ROUNDS = (64, 256, 1024), 2, 2, 3, 15
RECORDED, NOT_RECORDED = "recorded", "not recorded"
STEPS = 8
"""So many in a row: what the thread still has to write falls into the next step, as in training."""


def measure(transport: Transport, num_tokens: int, rounds: int, folder: Path) -> dict:
    """Return what a step takes with the recording and without it, on the clock and computed on all of its threads."""
    generator = torch.Generator().manual_seed(0)
    layer = tm.MoELayer(CONFIG, transport, tm.OverlapConfig(num_chunks=NUM_CHUNKS), generator=generator)
    generator = torch.Generator().manual_seed(1 + transport.rank)
    x = torch.randn(num_tokens, CONFIG.hidden_size, generator=generator, requires_grad=True)

    def step() -> float:
        transport.barrier()
        started = time.perf_counter()
        layer(x).sum().backward()
        elapsed = time.perf_counter() - started
        layer.zero_grad()
        x.grad = None
        return elapsed

    numbers = itertools.count()
    taken: dict[str, list[float]] = {RECORDED: [], NOT_RECORDED: []}
    computed: dict[str, list[float]] = {RECORDED: [], NOT_RECORDED: []}
    for number in range(WARM_UP + rounds):
        for name in sorted(taken, reverse=bool(number % 2)):
            path = folder / f"{num_tokens}-{next(numbers)}"
            started = time.process_time()
            with record(path) if name == RECORDED else contextlib.nullcontext():
                taken[name].append(statistics.mean(step() for _ in range(STEPS)))
            computed[name].append((time.process_time() - started) / STEPS)
    of_clock, of_cores = (
        compare({name: slowest(transport, seconds)[WARM_UP:] for name, seconds in of.items()}, num_tokens)
        for of in (taken, computed)
    )
    return {**of_clock, "computed": of_cores}


def compare(samples: Mapping[str, list[float]], num_tokens: int) -> dict:
    """Return what steps take with the recording and without it, and the median of the rounds' differences."""
    differences = [a - b for a, b in zip(samples[RECORDED], samples[NOT_RECORDED], strict=True)]
    return {
        "what": "step",
        "tokens_per_rank": num_tokens,
        "times": {name: summarize(seconds) for name, seconds in samples.items()},
        "difference_us": round(statistics.median(differences) * 1e6, 1),
        "share": round(statistics.median(differences) / statistics.median(samples[NOT_RECORDED]), 5),
    }


def run_rank(arguments: argparse.Namespace) -> None:
    """Measure on this process, one of the ranks; the first one prints and writes."""
    torch.set_num_threads(1)
    with torchrun_ranks(timeout_s=60) as transport, tempfile.TemporaryDirectory() as folder:
        results = [measure(transport, num_tokens, arguments.rounds, Path(folder)) for num_tokens in NUM_TOKENS]
        if transport.rank == 0:
            for result in results:
                print(result, flush=True)
            write_json(arguments.json, "recording", results)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recording", description=__doc__)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    add_arguments(parser, ROUNDS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(arguments)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    subprocess.run([*command, "-m", "bench.recording", "--rank", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
