"""The planner against this package on real links: a model's step predicted from `probe`, and then run.

N processes in network namespaces (Linux, root), one thread each. For every rate of the links all ranks first probe,
then predict forward and backward with several schedules, and then run them, in interleaved rounds. The planner is told
how many pairs each expert gets, as `tritonmoe plan --routing` tells it: an untrained router prefers some.
"""

import argparse
import itertools
import os
import random
import statistics
import sys
import time
from typing import Any

import torch

from tritonmoe.config.overlap import OverlapPlan, equal_sizes
from tritonmoe.integrations.transformers.bench_model import qwen3_moe_model
from tritonmoe.integrations.transformers.parallelize_model import parallelize
from tritonmoe.integrations.transformers.routed_experts import collect_statistics
from tritonmoe.tools.benchmarks.argument_types import output_file, positive
from tritonmoe.tools.benchmarks.model_sizes import add_model_sizes, check_model_sizes, model_sizes
from tritonmoe.tools.benchmarks.namespaces import Namespaces, ask, check_start, is_inside, parse_rate
from tritonmoe.tools.benchmarks.ranks import slowest
from tritonmoe.tools.benchmarks.timing import summarize, write_json
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.cluster_probe import probe_cluster
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.model_config import model_of_config
from tritonmoe.tools.planner.step import step_time
from tritonmoe.transports import Transport
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["main"]

PLANS = {
    "serial": OverlapPlan((1,), local_first=False, serial=True),
    **{f"{count} chunks": OverlapPlan(equal_sizes(count)) for count in (1, 2, 4, 8)},
}
TELLING = 0.05
"""Of two schedules whose measured times differ by more than this share, the prediction should know the faster."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.plan_ourselves", description=__doc__)
    parser.add_argument("--netns", type=positive, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--rates", nargs="+", default=["200mbit", "500mbit", "2gbit"], help="of every rank's link")
    parser.add_argument("--tokens", type=positive, default=1024, help="T of each rank (default 1024)")
    add_model_sizes(parser)
    parser.add_argument("--rounds", type=positive, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--timeout-s", type=positive, default=120)
    parser.add_argument("--json", type=output_file, help="also write the figures to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print one line per rate and schedule, then the errors; gives the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(argv)
    check_model_sizes(arguments)
    rates = [parse_rate(rate) for rate in arguments.rates]
    check_start(arguments.netns, {})
    if is_inside():
        return _run_rank(arguments, rates)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with Namespaces([sys.executable, "-m", "bench.plan_ourselves", *argv], arguments.netns, rates[0]) as namespaces:
        return namespaces.run(arguments.timeout_s)


def _run_rank(arguments: argparse.Namespace, rates: list[float]) -> int:
    torch.set_num_threads(1)
    with torchrun_ranks(timeout_s=arguments.timeout_s) as ranks:
        models = {}
        for name, overlap in PLANS.items():
            models[name] = qwen3_moe_model(model_sizes(arguments))
            parallelize(models[name], ranks.group, overlap)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(ranks.rank)
        ids = torch.randint(2, 2048, (1, arguments.tokens), generator=generator)
        results = []
        for text, rate in zip(arguments.rates, rates, strict=True):
            if ranks.rank == 0:
                ask(f"rate {rate}")
            ranks.barrier()
            predicted = _predict(arguments, ranks, models["serial"], ids)
            measured = _measure(ranks, models, ids, arguments.rounds)
            results += [
                {
                    "rate": text,
                    "plan": name,
                    "predicted_ms": round(1e3 * predicted[name], 2),
                    "measured": summarize(seconds),
                    "error": round(predicted[name] / statistics.median(seconds) - 1, 4),
                }
                for name, seconds in measured.items()
            ]
        if ranks.rank == 0:
            _show(results)
            write_json(arguments.json, "plan_ourselves", {"ranks": ranks.size, "cases": results})
    return 0


def _predict(arguments: argparse.Namespace, ranks: Transport, model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Return the seconds of forward and backward with every schedule, from what was probed just now."""
    sizes = model_of_config(model.config.to_dict(), "the model of tritonmoe bench expert_parallel")
    job = Job(sizes, sequence=arguments.tokens, ep=ranks.size, dtype="fp32", load=_typical_load(ranks, model, ids))
    say = print if ranks.rank == 0 else lambda text: None
    cluster = probe_cluster(job, CLUSTERS["H100"], ranks, torch.device("cpu"), say, node_size=1)
    return {name: step_time(job, cluster, 1, overlap).forward_backward_s for name, overlap in PLANS.items()}


def _typical_load(ranks: Transport, model: Any, ids: torch.Tensor) -> tuple[float, ...]:
    """Return the share of each expert of all ranks' pairs, in the layer whose busiest rank is in the middle."""
    with collect_statistics(model) as statistics, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    loads = torch.stack([torch.tensor(load, dtype=torch.float64) for load in statistics.loads.values()])
    ranks.all_reduce(loads)
    busiest = loads.unflatten(1, (ranks.size, -1)).sum(2).amax(1)
    typical = loads[busiest.argsort()[len(busiest) // 2]]
    return tuple((typical / typical.sum()).tolist())


def _measure(ranks: Transport, models: dict[str, Any], ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the slowest rank's seconds of every schedule, round by round; the first round is dropped."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    order, shuffle = list(models), random.Random(0).shuffle  # the same order on every rank
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            models[name].zero_grad(set_to_none=True)
            ranks.barrier()
            started = time.perf_counter()
            models[name](input_ids=ids, labels=ids, use_cache=False).loss.backward()
            (seconds,) = slowest(ranks, [time.perf_counter() - started])
            if number:
                samples[name].append(seconds)
    return samples


def _show(results: list[dict[str, Any]]) -> None:
    for case in results:
        median_ms = case["measured"]["median_ms"]
        print(
            f"{case['rate']:>8} {case['plan']:<9} predicted {case['predicted_ms']:8.0f}, measured {median_ms:8.0f} ms "
            f"({case['error']:+.1%})"
        )
    errors = [abs(case["error"]) for case in results]
    print(f"error: median {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    right, pairs = rank_pairs(results)
    print(f"of pairs whose times differ by {TELLING:.0%}: {right} of {pairs} in the right order")


def rank_pairs(results: list[dict[str, Any]]) -> tuple[int, int]:
    """Return how many pairs of schedules at one rate are predicted in the right order, of those that differ enough."""
    right = pairs = 0
    for one, other in itertools.combinations(results, 2):
        if one["rate"] == other["rate"]:
            times = [case["measured"]["median_ms"] for case in (one, other)]
            if max(times) > (1 + TELLING) * min(times):
                pairs += 1
                right += (one["predicted_ms"] < other["predicted_ms"]) == (times[0] < times[1])
    return right, pairs


if __name__ == "__main__":
    sys.exit(main())
