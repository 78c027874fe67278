"""`tritonmoe bench auto`: num_chunks="auto" against a sweep's fastest plan, the simulator against the sweep's times.

A case is a rate of the link, a model and a routing. In its first run, every plan of the sweep is measured in
interleaved rounds, and the simulator predicts each. In its second run, the sweep's fastest overlapped plan and its
fastest without overlap are measured again beside "auto", in more rounds, so that a plan which was fast by luck in the
first run has no advantage. Ranks are those of torchrun, or processes in network namespaces that --netns makes on this
machine (one core and one thread each).
"""

import argparse
import itertools
import os
import statistics
import sys

import torch

from tritonmoe.errors import TransportError
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import add_chunks, output_file, positive, positive_number
from tritonmoe.tools.benchmarks.measured_layer import Link, MeasuredLayer
from tritonmoe.tools.benchmarks.namespaces import Namespaces, ask, check_start, parse_rate
from tritonmoe.tools.benchmarks.overlap_rank import predict, run_rounds
from tritonmoe.tools.benchmarks.overlap_variants import Variant, best, overlapped_variants
from tritonmoe.tools.benchmarks.ranks import device_and_backend, gather, slowest
from tritonmoe.tools.benchmarks.timing import Samples, ratio, summarize, write_json
from tritonmoe.tools.benchmarks.workload import DTYPES, MODELS, Workload
from tritonmoe.tools.report.terminal import refused
from tritonmoe.transports import ProcessGroupTransport, Transport
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["main", "summarize_cases", "sweep_variants"]

DEFAULT_RATES = ["400mbit", "1gbit", "2500mbit"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tritonmoe bench auto", description=__doc__)
    parser.add_argument("--netns", type=int, metavar="N", help="N processes in network namespaces (Linux, root)")
    parser.add_argument(
        "--rates",
        nargs="+",
        help="with --netns: the rates of every rank's link to try, each way (default 400mbit 1gbit 2500mbit)",
    )
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["coarse", "fine"])
    parser.add_argument("--routings", nargs="+", default=["uniform", "zipf:1.2"])
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens of each rank (default 1024)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--forward-only", action="store_true", help="measure the forward without a backward")
    add_chunks(parser)
    parser.add_argument("--sweep-rounds", type=positive, default=5, help="rounds of the first run (default 5)")
    parser.add_argument("--rounds", type=positive, default=21, help="rounds of the second run (default 21)")
    parser.add_argument(
        "--timeout-s", type=positive_number, default=60.0, help="seconds that an exchange may take (default 60)"
    )
    parser.add_argument("--json", type=output_file, help="also write the figures to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; gives the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        return _run(arguments, sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        return refused("bench auto", error)
    except TransportError as error:
        print(f"tritonmoe bench auto: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    check_start(arguments.netns, {"--rates": arguments.rates})
    arguments.rates = arguments.rates or DEFAULT_RATES
    for option in ("rates", "models", "routings", "chunks"):
        values = getattr(arguments, option)
        if len(set(values)) < len(values):
            raise ValueError(f"--{option} must differ from each other, got {' '.join(map(str, values))}")
    rates = [parse_rate(rate) for rate in arguments.rates]
    if "RANK" in os.environ:
        return _run_rank(arguments)
    if arguments.netns is None:
        raise ValueError(
            "start it with --netns N, or under torchrun: torchrun --nproc-per-node 2 -m tritonmoe bench auto"
        )
    for model in arguments.models:
        if arguments.netns < 2 or MODELS[model][0] % arguments.netns:
            raise ValueError(
                f"--netns must be 2 or more and divide the {MODELS[model][0]} experts of {model}, got {arguments.netns}"
            )
    command = [sys.executable, "-m", "tritonmoe", "bench", "auto", *argv]
    with Namespaces(command, arguments.netns, rates[0]) as namespaces:
        return namespaces.run(arguments.timeout_s)


def sweep_variants(chunks: list[int], num_local_experts: int) -> list[Variant]:
    """Return every overlapped and serial plan of the sweep."""
    serial = [Variant("serial", num_chunks) for num_chunks in chunks]
    return [Variant("compute", 1), *serial, *overlapped_variants(chunks, num_local_experts)]


def _run_rank(arguments: argparse.Namespace) -> int:
    cases = []
    with torchrun_ranks(timeout_s=arguments.timeout_s) as ranks:
        device, backend = device_and_backend()
        where, rates = f"{ranks.size} processes, {backend}", ["as it is"]
        if arguments.netns is not None:
            torch.set_num_threads(1)
            device, where, rates = "cpu", f"{ranks.size} network namespaces, gloo", arguments.rates
        for rate, model, routing in itertools.product(rates, arguments.models, arguments.routings):
            if arguments.netns is not None and ranks.rank == 0:
                ask(f"rate {parse_rate(rate)}")
            ranks.barrier()
            workload = Workload(model, arguments.tokens, routing, arguments.dtype, not arguments.forward_only)
            transport = ProcessGroupTransport(timeout_s=arguments.timeout_s)  # a new one has learnt nothing yet
            case = {"rate": rate, **measure_case(transport, workload, device, arguments)}
            cases.append(case)
            if ranks.rank == 0:
                print(_as_line(case), flush=True)
        if ranks.rank == 0:
            results = {
                "link": where,
                "ranks": ranks.size,
                "tokens": arguments.tokens,
                "dtype": arguments.dtype,
                "pass": "forward" if arguments.forward_only else "forward+backward",
                **summarize_cases(cases),
                "cases": cases,
            }
            print(_as_words(results))
            write_json(arguments.json, "auto", results, device)
    return 0


def measure_case(transport: Transport, workload: Workload, device: str, arguments: argparse.Namespace) -> Json:
    """Measure one case in two runs; every rank makes the same call and gives the same result."""
    rank = MeasuredLayer(transport, workload, torch.device(device), Link())
    num_local_experts = workload.shape[0] // transport.size
    variants = sweep_variants(arguments.chunks, num_local_experts)
    first = run_rounds(rank, variants, arguments.sweep_rounds)
    predicted = predict(rank, variants, first.seconds, first.reports)
    sweep: Samples = {name: slowest(transport, seconds) for name, seconds in first.seconds.items()}
    everybody = gather(transport, {name: seconds for name, (seconds, _) in predicted.items()})
    predicted_s = {name: max(of_rank[name] for of_rank in everybody) for name in predicted}
    by_name = {str(variant): variant for variant in variants}
    winner, serial = best(sweep, "overlapped"), best(sweep, "serial")
    again = [by_name[winner], by_name[serial], Variant("auto")]
    second = run_rounds(rank, again, arguments.rounds)
    seconds = {name: slowest(transport, values) for name, values in second.seconds.items()}
    chosen = second.reports["auto"][-1]
    again_ms = {name: summarize(values) for name, values in seconds.items()}
    return {
        "model": workload.model,
        "E_K_D_F": list(workload.shape),
        "routing": workload.routing,
        "sweep_ms": {name: summarize(values) for name, values in sweep.items()},
        "predicted_ms": {name: round(1e3 * value, 3) for name, value in predicted_s.items()},
        "errors": {
            name: round(predicted_s[name] / statistics.median(sweep[name]) - 1, 4)
            for name in predicted_s
            if name.startswith("overlapped")
        },
        "winner": winner,
        "serial": serial,
        "auto": chosen.choice,
        "again_ms": again_ms,
        "auto_over_winner": ratio(again_ms["auto"], again_ms[winner]),
        "auto_over_serial": ratio(again_ms["auto"], again_ms[serial]),
    }


def summarize_cases(cases: list[Json]) -> Json:
    """Return the median and the worst of all cases: auto over the sweep's winner and no overlap, the simulator."""
    excess = [case["auto_over_winner"] - 1 for case in cases]
    errors = [abs(error) for case in cases for error in case["errors"].values()]
    return {
        "auto_excess_median": round(statistics.median(excess), 4),
        "auto_excess_largest": round(max(excess), 4),
        "auto_over_serial_largest": round(max(case["auto_over_serial"] for case in cases), 4),
        "simulator_error_median": round(statistics.median(errors), 4),
        "simulator_error_largest": round(max(errors), 4),
    }


def _as_line(case: Json) -> str:
    again, winner = case["again_ms"], case["winner"]
    errors = [abs(error) for error in case["errors"].values()]
    return (
        f"{case['rate']:>9} {case['model']:<7} {case['routing']:<9} auto {again['auto']['median_ms']:7.1f} ms, "
        f"{winner} {again[winner]['median_ms']:7.1f} ms: {case['auto_over_winner'] - 1:+.1%}; "
        f"over {case['serial']} {case['auto_over_serial'] - 1:+.1%}; simulator's error: median "
        f"{statistics.median(errors):.1%}, largest {max(errors):.1%}\n          {case['auto']}"
    )


def _as_words(results: Json) -> str:
    return (
        f"{len(results['cases'])} cases: auto against the sweep's winner {results['auto_excess_median']:+.1%} in the "
        f"median, {results['auto_excess_largest']:+.1%} at worst; against no overlap "
        f"{results['auto_over_serial_largest'] - 1:+.1%} at worst; the simulator's error "
        f"{results['simulator_error_median']:.1%} in the median, {results['simulator_error_largest']:.1%} at worst"
    )
