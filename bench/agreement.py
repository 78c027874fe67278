"""`python -m bench.agreement`: what it costs that ranks agree on a backward before its first row moves.

Two processes over gloo on one machine's loopback train one MoE layer, in interleaved rounds with the agreement and
without it. A step is the layer's forward and backward; its time is that of the slower rank.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from unittest import mock

import torch

import tritonmoe as tm
from tritonmoe.dispatch.count_exchange import post_backward
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.expert_parallel import layer_pass
from tritonmoe.tools.benchmarks.ranks import slowest
from tritonmoe.tools.benchmarks.timing import add_arguments, summarize, write_json
from tritonmoe.transports import Transport
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["NUM_TOKENS", "compare", "measure_steps", "run_ranks"]

CONFIG = tm.MoEConfig(hidden_size=512, intermediate_size=256, num_experts=64, top_k=8)
NUM_TOKENS = (64, 256, 1024)
NUM_RANKS = 2
NUM_CHUNKS = 2
WARM_UP = 3


def measure_alone(transport: Transport, rounds: int) -> list[float]:
    """Return the seconds of an agreement that nothing runs beside, round by round, the slower rank's."""
    seconds = []
    for number in range(WARM_UP + rounds):
        transport.barrier()
        started = time.perf_counter()
        agreement = post_backward(transport, CallHeader(sequence=number, is_backward=1), started)
        assert agreement is not None
        agreement.wait()
        seconds.append(time.perf_counter() - started)
    return slowest(transport, seconds)[WARM_UP:]


def measure_steps(
    transport: Transport,
    num_tokens: int,
    rounds: int,
    variants: Mapping[str, Callable[[], contextlib.AbstractContextManager]],
    steps: int = 1,
) -> dict[str, list[float]]:
    """Return the mean seconds of so many steps by variant, round by round, the slower rank's, inside of its context."""
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

    samples: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(WARM_UP + rounds):
        for name in sorted(samples, reverse=bool(number % 2)):
            with variants[name]():
                samples[name].append(statistics.mean(step() for _ in range(steps)))
    return {name: slowest(transport, seconds)[WARM_UP:] for name, seconds in samples.items()}


def compare(samples: Mapping[str, list[float]], num_tokens: int, with_it: str, without: str) -> dict:
    """Return what steps take with something and without it, and the median of the rounds' differences."""
    differences = [a - b for a, b in zip(samples[with_it], samples[without], strict=True)]
    return {
        "what": "step",
        "tokens_per_rank": num_tokens,
        "times": {name: summarize(seconds) for name, seconds in samples.items()},
        "difference_us": round(statistics.median(differences) * 1e6, 1),
        "share": round(statistics.median(differences) / statistics.median(samples[without]), 5),
    }


def _post_nothing(*_: object) -> None:
    pass


def _not_agreed() -> contextlib.AbstractContextManager:
    return mock.patch.object(layer_pass, "post_backward", new=_post_nothing)


def run_rank(arguments: argparse.Namespace) -> None:
    """Measure on this process, one of the ranks; the first one prints and writes."""
    torch.set_num_threads(1)
    with torchrun_ranks(timeout_s=60) as transport:
        results: list[dict] = [{"what": "agreement alone", **summarize(measure_alone(transport, arguments.rounds))}]
        for num_tokens in NUM_TOKENS:
            variants = {"agreed": contextlib.nullcontext, "not agreed": _not_agreed}
            samples = measure_steps(transport, num_tokens, arguments.rounds, variants)
            results.append(compare(samples, num_tokens, *variants))
        if transport.rank == 0:
            for result in results:
                print(result, flush=True)
            write_json(arguments.json, "agreement", results)


def run_ranks(
    module: str, description: str | None, rounds: int, run_rank: Callable[[argparse.Namespace], None]
) -> None:
    """Start the ranks, which run this module again, or be one of them."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    add_arguments(parser, rounds)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(arguments)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    subprocess.run([*command, "-m", module, "--rank", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    run_ranks("bench.agreement", __doc__, 101, run_rank)
