"""Overlap on one GPU: one rank of several computes, its peers are replayed over a link as slow as its compute."""

import statistics

from bench.gpu.workbench import Workbench
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.measured_layer import Link, MeasuredLayer
from tritonmoe.tools.benchmarks.overlap_rank import RankMeasurement, measure_rank
from tritonmoe.tools.benchmarks.overlap_report import summarize_overlap
from tritonmoe.tools.benchmarks.replayed_peers import ReplayedPeers
from tritonmoe.tools.benchmarks.workload import Workload
from tritonmoe.transports import LinkModel, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks

__all__ = ["measure_overlap"]

FIRST_GB_PER_S = 50.0
"""Of the link, until its rate is chosen."""
COMPUTE_RATIO = 1.0
TIMEOUT_S = 120.0


def measure_overlap(bench: Workbench, model: str, num_ranks: int, num_tokens: int, chunks: list[int]) -> Json:
    """Time a layer's forward and backward on rank 0, serial and overlapped, while rows are under way on other streams.

    The link takes as long for a call's rows as the experts do, where overlap can gain most: at best a call takes half
    as long as a serial one. As `tritonmoe bench overlap --emulate RANKS --compute-ratio 1` does.

    Returns:
        What summarize_overlap says, "speed_up" of the best schedule over the best serial one, the link's rate, and the
        seconds of every schedule, round by round.
    """
    bench.forget()
    setting = bench.setting
    workload = Workload(model, num_tokens, "uniform", setting.dtype_name)
    peers = ReplayedPeers(num_ranks, LinkModel(FIRST_GB_PER_S))
    measured: list[RankMeasurement] = []

    def on_rank(transport: Transport) -> None:
        if transport.rank > 0:
            layer = MeasuredLayer(transport, workload, setting.device, Link())
            peers.serve(transport.rank, layer.record)
            return
        link = Link(set_rate=lambda bits: setattr(peers.port, "link", LinkModel(bits / 8e9)), peers=peers)
        with peers:
            measured.append(
                measure_rank(
                    *(transport, workload, chunks, setting.rounds),
                    link=link,
                    compute_ratio=COMPUTE_RATIO,
                    device=setting.device,
                )
            )

    run_on_emulated_ranks(on_rank, num_ranks, device=setting.device, timeout_s=TIMEOUT_S)
    (rank,) = measured
    summary = summarize_overlap(rank)
    return {
        "speed_up": summary["overlapped"]["speed_up"],
        "rate_bits_per_s": rank.rate,
        "summary": summary,
        "samples_s": rank.seconds,
        "medians_s": {name: statistics.median(seconds) for name, seconds in rank.seconds.items()},
    }
