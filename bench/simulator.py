"""The simulator against emulated ranks whose experts have a fixed duration, and its own time for thousands of ranks."""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch

from bench.fixed_experts import MODEL_WIDTH, NUM_EXPERTS, NUM_TOKENS
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, equal_sizes, ramp_sizes
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.schedule import build_forward
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import simulate, simulate_layer
from tritonmoe.overlap.tuning.measured_calls import layer_costs, layer_work
from tritonmoe.overlap.tuning.search import fixed_plan
from tritonmoe.tools.benchmarks.argument_types import positive
from tritonmoe.tools.benchmarks.stand_ins import FixedExperts, run_passes
from tritonmoe.tools.benchmarks.timing import add_arguments, write_json
from tritonmoe.transports import LinkModel, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks

__all__ = ["main"]

ROW_BYTES = 4 * MODEL_WIDTH


def forward_report(transport: Transport, experts_s: float, config: OverlapConfig) -> LayerReport:
    """Run one forward on this rank, all ranks starting together; every token needs one of the W ranks."""
    assert isinstance(config.num_chunks, int)
    generator = torch.Generator().manual_seed(transport.rank)
    topk_ids = torch.randint(NUM_EXPERTS, (NUM_TOKENS, 1), generator=generator)
    x = torch.randn(NUM_TOKENS, MODEL_WIDTH, generator=generator)
    overlap = fixed_plan(config, config.num_chunks, transport.size)
    plans: list[DispatchPlan] = []

    def make_experts(rows: torch.Tensor, plan: DispatchPlan) -> FixedExperts:
        plans.append(plan)
        return FixedExperts(experts_s, plan.receive_offsets, rows, top_k=1)

    transport.barrier()
    weights = torch.ones(NUM_TOKENS, 1)
    (timings,) = run_passes(transport, overlap, x, topk_ids, weights, NUM_EXPERTS, make_experts).reports
    (plan,) = plans
    offsets = plan.send_offsets, plan.return_offsets, plan.pair_offsets
    return LayerReport(plan.rank, plan.traffic, plan.traffic_pairs, ROW_BYTES, overlap, 1, *offsets, forward=timings)


def compare(experts_s: float, communication_s: float, rounds: int) -> list[dict[str, Any]]:
    """Return predicted and measured seconds of several chunk counts, overlapped and serial, and with all rows sent.

    The link is known; what steps cost is fitted to the calls with one and two chunks, as the tuner does it.
    """
    link = LinkModel(NUM_TOKENS * ROW_BYTES / communication_s / 1e9, latency_us=100)
    assert link.bandwidth_gb_per_s is not None
    link_costs = LinkCosts(link.latency_us * 1e-6, link.bandwidth_gb_per_s * 1e9)
    configs = [
        OverlapConfig(num_chunks, local_first, serial)
        for num_chunks in (1, 2, 4, 8)
        for local_first, serial in ((True, False), (False, False), (True, True))
    ]
    reports: list[list[list[LayerReport]]] = [[] for _ in configs]
    for _ in range(rounds):
        for config, own in zip(configs, reports, strict=True):
            run = partial(forward_report, experts_s=experts_s, config=config)
            own.append(run_on_emulated_ranks(run, 2, link=link))
    few_chunks = [report for own in reports for ranks in own for report in ranks if report.num_chunks <= 2]
    costs = layer_costs(few_chunks)
    results = []
    for own in reports:
        overlap = own[0][0].overlap
        predicted = simulate(build_forward(overlap), overlap, layer_work(own[0][0]), costs, link_costs).total_s
        measured = statistics.median(max(report.forward.total_s for report in ranks) for ranks in own)
        results.append(
            {
                "plan": str(overlap),
                "experts_ms": round(experts_s * 1e3, 3),
                "communication_ms": round(communication_s * 1e3, 3),
                "predicted_ms": round(predicted * 1e3, 3),
                "measured_ms": round(measured * 1e3, 3),
                "error": round(predicted / measured - 1, 4),
            }
        )
    return results


def time_of_many_ranks(num_ranks: int) -> list[dict[str, Any]]:
    """Return the simulator's own seconds for forward and backward of num_ranks ranks with an S_ik of their own each."""
    rows = torch.randint(0, 20, (num_ranks, num_ranks), generator=torch.Generator().manual_seed(0))
    work = LayerWork.of(rows, 1.5, 14336, 8)
    costs = StepCosts({}, {"experts": 1e-6, "experts_backward": 1e-6, "weight_grad": 1e-6})
    results = []
    for is_shared in (False, True):
        link = LinkCosts(1e-5, 4e11, is_shared, node_size=8, inter_bytes_per_s=5e10)
        for overlap in (OverlapPlan(equal_sizes(8)), OverlapPlan(ramp_sizes(8), window=2)):
            started = time.perf_counter()
            passes = simulate_layer(overlap, work, costs, link, backward=True)
            seconds = time.perf_counter() - started
            results.append(
                {
                    "plan": str(overlap),
                    "ranks": num_ranks,
                    "is_shared": is_shared,
                    "simulated_ms": round(sum(p.total_s for p in passes) * 1e3, 3),
                    "seconds": round(seconds, 3),
                }
            )
    return results


def main(argv: list[str] | None = None) -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulator", description=__doc__)
    parser.add_argument("--ranks", type=positive, default=4096, help="ranks of the large simulation (default 4096)")
    add_arguments(parser, rounds=5)
    arguments = parser.parse_args(argv)
    compared = [
        case
        for experts_s, communication_s in ((0.1, 0.1), (0.1, 0.04), (0.04, 0.1))
        for case in compare(experts_s, communication_s, arguments.rounds)
    ]
    for case in compared:
        print(
            f"experts {case['experts_ms']:.0f} ms, exchanges {case['communication_ms']:.0f} ms, {case['plan']}: "
            f"predicted {case['predicted_ms']:.1f}, measured {case['measured_ms']:.1f} ms ({case['error']:+.1%})"
        )
    errors = sorted(abs(case["error"]) for case in compared)
    print(f"error: median {statistics.median(errors):.1%}, largest {errors[-1]:.1%}")
    large = time_of_many_ranks(arguments.ranks)
    for case in large:
        link = "a shared link" if case["is_shared"] else "exchanges in turn"
        print(f"{case['ranks']} ranks, {link}, {case['plan']}: {case['seconds']:.1f} s to simulate")
    write_json(arguments.json, "simulator", {"compared": compared, "many_ranks": large})


if __name__ == "__main__":
    main()
