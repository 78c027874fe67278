"""`python -m bench.recording`: what it costs a training step that `record` writes down what it does.

The same steps as in bench.agreement, two processes over gloo on one machine: some inside of a `record`, as many
outside, in interleaved rounds. A thread of its own writes meanwhile.
"""

import argparse
import contextlib
import itertools
import tempfile
from pathlib import Path

import torch

from bench.agreement import NUM_TOKENS, compare, measure_steps, run_ranks
from tritonmoe.benchmarks.timing import write_json
from tritonmoe.diagnosis import record
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["run_rank"]

STEPS = 8
"""So many in a row: what the thread still has to write falls into the next step, as in training."""


def run_rank(arguments: argparse.Namespace) -> None:
    """Measure on this process, one of the ranks; the first one prints and writes."""
    torch.set_num_threads(1)
    with torchrun_ranks(timeout_s=60) as transport, tempfile.TemporaryDirectory() as folder:
        results, numbers = [], itertools.count()

        def recorded() -> contextlib.AbstractContextManager:
            return record(Path(folder) / str(next(numbers)))

        for num_tokens in NUM_TOKENS:
            variants = {"recorded": recorded, "not recorded": contextlib.nullcontext}
            samples = measure_steps(transport, num_tokens, arguments.rounds, variants, STEPS)
            results.append(compare(samples, num_tokens, *variants))
        if transport.rank == 0:
            for result in results:
                print(result, flush=True)
            write_json(arguments.json, "recording", results)


if __name__ == "__main__":
    run_ranks("bench.recording", __doc__, 15, run_rank)
