"""How close the schedule comes to max(compute, communication), with experts of a fixed duration on emulated ranks.

Experts that sleep in proportion to their rows take the same time alone and under an exchange, so what is measured is
the schedule and the executor, not how cores or memory are shared. The link is emulated in wall time.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from torch import Tensor

from ..backends import reference
from ..backends.reference import WeightGrads
from ..config import OverlapConfig
from ..dispatch import DTYPE_CODES, CallHeader, exchange_plan, plan_tokens
from ..emulation import run_on_emulated_ranks
from ..overlap.executor import LayerPass
from ..overlap.tuner import fixed_plan
from ..transports import LinkModel, Transport
from .timing import Samples, add_arguments, summarize, write_json

__all__ = ["FixedExperts", "main"]

NUM_EXPERTS, NUM_TOKENS, MODEL_WIDTH = 8, 2048, 256


class FixedExperts:
    """Experts that take a given time for all rows of a call, each row its share, and compute nothing."""

    def __init__(self, total_s: float, row_offsets: tuple[int, ...], rows: Tensor) -> None:
        self.total_s = total_s
        self.row_offsets = row_offsets
        self.rows = rows

    def forward(self, chunk: int, out: Tensor | None = None) -> Tensor:
        first, last = self.row_offsets[chunk : chunk + 2]
        if self.total_s:
            time.sleep(self.total_s * (last - first) / max(1, self.row_offsets[-1]))
        values = self.rows[first:last]
        return values if out is None else out.copy_(values)

    def backward(
        self, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        raise NotImplementedError("this benchmark measures the forward")

    def weight_grad(self, dout: Tensor, needs: tuple[bool, bool, bool, bool]) -> WeightGrads:
        raise NotImplementedError("this benchmark measures the forward")


def forward_seconds(transport: Transport, experts_s: float, config: OverlapConfig) -> float:
    """Time one forward on this rank, all ranks starting together; every token needs one of the W ranks."""
    assert isinstance(config.num_chunks, int)
    generator = torch.Generator().manual_seed(transport.rank)
    topk_ids = torch.randint(NUM_EXPERTS, (NUM_TOKENS, 1), generator=generator)
    x = torch.randn(NUM_TOKENS, MODEL_WIDTH, generator=generator)
    overlap = fixed_plan(config, config.num_chunks, transport.size)
    tokens = plan_tokens(topk_ids, NUM_EXPERTS, transport.rank, transport.size, overlap)
    header = CallHeader.of(
        overlap,
        sequence=0,
        num_experts=NUM_EXPERTS,
        top_k=1,
        hidden_size=MODEL_WIDTH,
        dtype=DTYPE_CODES[x.dtype],
        grad_enabled=0,
        needs_any=0,
        needs_x=0,
        needs_topk_weights=0,
        error=0,
        nonfinite_rows=0,
        vote=0,
    )
    plan = exchange_plan(transport, header, tokens, overlap)
    layer_pass = LayerPass(
        plan,
        transport,
        reference.combine,
        lambda rows, ids, weights: FixedExperts(experts_s, plan.receive_offsets, rows),
    )
    transport.exchange_counts(torch.zeros(transport.size, 1, dtype=torch.int64))  # a barrier
    _, timings = layer_pass.forward(x, topk_ids, torch.ones(NUM_TOKENS, 1))
    return timings.total_s


def measure(experts_s: float, communication_s: float, chunks: list[int], rounds: int) -> Samples:
    """Give the seconds of every variant, the slowest rank's, round by round."""
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
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=__doc__)
    parser.add_argument("--experts-ms", type=float, default=100.0, help="time of a rank's experts (default 100)")
    parser.add_argument("--communication-ms", type=float, default=100.0, help="dispatch + combine (default 100)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 4, 8])
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
    write_json(arguments.json, "overlap", results)
