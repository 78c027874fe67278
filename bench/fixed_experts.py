"""How close the schedule comes to max(compute, communication), with experts of a fixed duration on emulated ranks.

Experts that sleep in proportion to their rows take the same time alone and under an exchange, so what is measured is
the schedule and the executor, not how cores or memory are shared. The link is emulated in wall time.
"""

import argparse
import statistics
from functools import partial

import torch

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.overlap.tuning.search import fixed_plan
from tritonmoe.tools.benchmarks.argument_types import chunk_count, positive_number
from tritonmoe.tools.benchmarks.stand_ins import FixedExperts, run_passes
from tritonmoe.tools.benchmarks.timing import Samples, add_arguments, summarize, write_json
from tritonmoe.transports import LinkModel, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks

__all__ = ["main"]

NUM_EXPERTS, NUM_TOKENS, MODEL_WIDTH = 8, 2048, 256


def forward_seconds(transport: Transport, experts_s: float, config: OverlapConfig) -> float:
    """Time one forward on this rank, all ranks starting together; every token needs one of the W ranks."""
    assert isinstance(config.num_chunks, int)
    generator = torch.Generator().manual_seed(transport.rank)
    topk_ids = torch.randint(NUM_EXPERTS, (NUM_TOKENS, 1), generator=generator)
    x = torch.randn(NUM_TOKENS, MODEL_WIDTH, generator=generator)
    overlap = fixed_plan(config, config.num_chunks, transport.size)
    transport.barrier()
    (report,) = run_passes(
        transport,
        overlap,
        x,
        topk_ids,
        torch.ones(NUM_TOKENS, 1),
        NUM_EXPERTS,
        lambda rows, plan: FixedExperts(experts_s, plan.receive_offsets, rows, top_k=1),
    ).reports
    return report.total_s


def measure(experts_s: float, communication_s: float, chunks: list[int], rounds: int) -> Samples:
    """Return the seconds of every variant, the slowest rank's, round by round."""
    exchanged_bytes = NUM_TOKENS // 2 * MODEL_WIDTH * 4
    link = LinkModel(bandwidth_gb_per_s=2 * exchanged_bytes / communication_s / 1e9)
    free = LinkModel(bandwidth_gb_per_s=None)
    variants = {
        "compute alone": (free, experts_s, OverlapConfig(num_chunks=1)),
        "communication alone": (link, 0.0, OverlapConfig(num_chunks=2)),
    }
    for num_chunks in chunks:
        variants[f"serial C={num_chunks}"] = (link, experts_s, OverlapConfig(num_chunks, serial=True))
        variants[f"overlapped C={num_chunks}"] = (link, experts_s, OverlapConfig(num_chunks))
        variants[f"overlapped C={num_chunks}, no local rows first"] = (
            link,
            experts_s,
            OverlapConfig(num_chunks, local_first=False),
        )
    samples: Samples = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (model, seconds, config) in variants.items():
            run = partial(forward_seconds, experts_s=seconds, config=config)
            samples[name].append(max(run_on_emulated_ranks(run, 2, link=model)))
    return samples


def main(argv: list[str] | None = None) -> None:
    """Print every variant's median, and its multiple of max(compute, communication)."""
    parser = argparse.ArgumentParser(prog="python -m bench.fixed_experts", description=__doc__)
    parser.add_argument(
        "--experts-ms", type=positive_number, default=100.0, help="time of a rank's experts (default 100)"
    )
    parser.add_argument(
        "--communication-ms", type=positive_number, default=100.0, help="dispatch + combine (default 100)"
    )
    parser.add_argument("--chunks", type=chunk_count, nargs="+", default=[2, 4, 8])
    add_arguments(parser, rounds=11)
    arguments = parser.parse_args(argv)
    samples = measure(arguments.experts_ms / 1e3, arguments.communication_ms / 1e3, arguments.chunks, arguments.rounds)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    bound = max(medians["compute alone"], medians["communication alone"])
    results = []
    print("2 emulated ranks, emulated link, experts of fixed duration; ms, slowest rank")
    for name, times in samples.items():
        summary = summarize(times)
        results.append({"variant": name, **summary, "multiple_of_bound": round(medians[name] / bound, 3)})
        print(
            f"{name:42} {summary['median_ms']:8.1f}  ({summary['lower_quartile_ms']:.1f} .. "
            f"{summary['upper_quartile_ms']:.1f})  {medians[name] / bound:.2f} x bound"
        )
    write_json(arguments.json, "fixed_experts", results)


if __name__ == "__main__":
    main()
