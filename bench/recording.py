"""`python -m bench.recording`: what it costs a training step that `record` writes down what it does.

The same steps as in bench.agreement, two processes over gloo on one machine: some inside of a `record`, as many
outside, in interleaved rounds. A thread of its own writes meanwhile. What the steps take changes from round to round by
far more than a hundredth; what the cores compute for them, writing included, changes less, and is told too.
"""

import argparse
import contextlib
import functools
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.agreement import NUM_TOKENS, compare, measure_steps, run_ranks
from tritonmoe.tools.benchmarks.ranks import slowest
from tritonmoe.tools.benchmarks.timing import write_json
from tritonmoe.tools.recording import record
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["run_rank"]

RECORDED, NOT_RECORDED = "recorded", "not recorded"
STEPS = 8
"""So many in a row: what the thread still has to write falls into the next step, as in training."""


def run_rank(arguments: argparse.Namespace) -> None:
    """Measure on this process, one of the ranks; the first one prints and writes."""
    torch.set_num_threads(1)
    with torchrun_ranks(timeout_s=60) as transport, tempfile.TemporaryDirectory() as folder:
        results, numbers = [], itertools.count()
        computed: dict[str, list[float]] = {}

        @contextlib.contextmanager
        def counted(name: str) -> Iterator[None]:
            """Count what this process computes, on all of its threads, until all is written."""
            path = Path(folder) / str(next(numbers))
            started = time.process_time()
            with record(path) if name == RECORDED else contextlib.nullcontext():
                yield
            computed.setdefault(name, []).append((time.process_time() - started) / STEPS)

        for num_tokens in NUM_TOKENS:
            computed.clear()
            variants = {name: functools.partial(counted, name) for name in (RECORDED, NOT_RECORDED)}
            samples = measure_steps(transport, num_tokens, arguments.rounds, variants, STEPS)
            seconds = {name: slowest(transport, of)[-arguments.rounds :] for name, of in computed.items()}
            of_cores = compare(seconds, num_tokens, RECORDED, NOT_RECORDED)
            results.append({**compare(samples, num_tokens, RECORDED, NOT_RECORDED), "computed": of_cores})
        if transport.rank == 0:
            for result in results:
                print(result, flush=True)
            write_json(arguments.json, "recording", results)


if __name__ == "__main__":
    run_ranks("bench.recording", __doc__, 15, run_rank)
