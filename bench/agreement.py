"""`python -m bench.agreement`: what it costs that ranks agree on a backward before its first row moves.

Two processes over gloo on one machine's loopback train one MoE layer, in interleaved rounds with the agreement and
without it. A step is the layer's forward and backward; its time is that of the slower rank.
"""

import argparse
import statistics
import subprocess
import sys
import time
from unittest import mock

import torch

import tritonmoe as tm
from tritonmoe.benchmarks.ranks import slowest
from tritonmoe.benchmarks.timing import add_arguments, summarize, write_json
from tritonmoe.dispatch.count_exchange import post_backward
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.expert_parallel import call
from tritonmoe.transports import Transport
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["main"]

CONFIG = tm.MoEConfig(hidden_size=512, intermediate_size=256, num_experts=64, top_k=8)
NUM_TOKENS = (64, 256, 1024)
NUM_RANKS = 2
NUM_CHUNKS = 2
WARM_UP = 3


def measure_alone(transport: Transport, rounds: int) -> list[float]:
    """Give the seconds of an agreement that nothing runs beside, round by round, the slower rank's."""
    seconds = []
    for number in range(WARM_UP + rounds):
        transport.barrier()
        started = time.perf_counter()
        agreement = post_backward(transport, CallHeader(sequence=number, is_backward=1))
        assert agreement is not None
        agreement.wait()
        seconds.append(time.perf_counter() - started)
    return slowest(transport, seconds)[WARM_UP:]


def measure_steps(transport: Transport, num_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Give the seconds of steps with and without the agreement, round by round, the slower rank's."""
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

    samples: dict[str, list[float]] = {"agreed": [], "not agreed": []}
    for number in range(WARM_UP + rounds):
        for name in sorted(samples, reverse=bool(number % 2)):
            with mock.patch.object(call, "post_backward", (lambda *_: None) if name == "not agreed" else post_backward):
                samples[name].append(step())
    return {name: slowest(transport, seconds)[WARM_UP:] for name, seconds in samples.items()}


def run_rank(arguments: argparse.Namespace) -> None:
    """Measure on this process, one of the ranks; the first one prints and writes."""
    torch.set_num_threads(1)
    with torchrun_ranks(timeout_s=60) as transport:
        results: list[dict] = [{"what": "agreement alone", **summarize(measure_alone(transport, arguments.rounds))}]
        for num_tokens in NUM_TOKENS:
            samples = measure_steps(transport, num_tokens, arguments.rounds)
            differences = [a - b for a, b in zip(samples["agreed"], samples["not agreed"], strict=True)]
            results.append(
                {
                    "what": "step",
                    "tokens_per_rank": num_tokens,
                    "times": {name: summarize(seconds) for name, seconds in samples.items()},
                    "agreement_us": round(statistics.median(differences) * 1e6, 1),
                    "agreement_share": round(
                        statistics.median(differences) / statistics.median(samples["not agreed"]), 5
                    ),
                }
            )
        if transport.rank == 0:
            for result in results:
                print(result, flush=True)
            write_json(arguments.json, "agreement", results)


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(prog="python -m bench.agreement", description=__doc__)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    add_arguments(parser, rounds=101)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(arguments)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    subprocess.run([*command, "-m", "bench.agreement", "--rank", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
