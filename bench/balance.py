"""`python -m bench.balance`: a layer whose routing is skewed, with copies of hot experts and without.

Forward and backward of one layer's experts, all ranks beginning together; a call takes as long as its slowest rank.
Variants run in interleaved rounds, each twice in a row, of which the second call is timed: as in a training, the call
before it needed the same memory. They are: without copies, with OverlapConfig(balance="auto") and "always", and the
ideal: the same routing with the hot experts spread evenly over the ranks from the start, by an ExpertPlacement. With
--netns 2 the ranks are processes in network namespaces of this machine, with links of the given rates, one core and one
thread each.
Without it they are emulated in this process, and their experts take time by sleeping, a fixed time for each pair
(tools/benchmarks/stand_ins.py): the ideal is then routing to uniformly drawn experts, since every pair takes as long.

Beside the times stands what the simulator predicts of the passes, by the steps of calls without copies; what the host
does before and between them is added as measured.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.call import listeners
from tritonmoe.expert_parallel.expert_parallel_mlp import expert_parallel_mlp
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.simulation.simulator import simulate_layer
from tritonmoe.overlap.tuning.measured_calls import layer_costs, layer_work, link_costs
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import positive, positive_number
from tritonmoe.tools.benchmarks.namespaces import Namespaces, ask, check_start, is_inside, parse_rate
from tritonmoe.tools.benchmarks.ranks import gather, slowest
from tritonmoe.tools.benchmarks.stand_ins import sleeping_experts
from tritonmoe.tools.benchmarks.timing import Samples, add_arguments, summarize, write_json
from tritonmoe.transports import LinkModel, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["main"]

UNSHAPED = "40gbit"
HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 512, 256, 64, 8
SETTLED = 6
"""Rounds that are not counted. "auto" knows what calls cost behind the second call, what they take without copies
behind the fourth, and in the next eight what they take with copies."""

PREDICTED = ("without", "auto", "always")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.balance", description=__doc__)
    parser.add_argument("--netns", type=positive, metavar="N", help="N network namespaces (default: emulated ranks)")
    parser.add_argument("--ranks", type=positive, default=8, help="emulated ranks (default 8)")
    parser.add_argument("--rates", nargs="+", help="of links (default: 12gbit and 1gbit, in namespaces 1gbit, 400mbit)")
    parser.add_argument("--tokens", type=positive, default=1024, help="of each rank (default 1024)")
    parser.add_argument(
        "--hot", type=int, nargs="+", default=[2], help="hot experts on rank 0, a case each (default 2)"
    )
    parser.add_argument("--share", type=positive_number, default=1.0, help="of tokens that need each hot expert")
    parser.add_argument(
        "--max-copies",
        type=lambda text: text if text == "auto" else positive(text),
        default="auto",
        help="on a rank (default: auto)",
    )
    parser.add_argument("--chunks", type=positive, default=2)
    parser.add_argument("--pair-us", type=positive_number, default=13.0, help="that a sleeping expert takes, thrice")
    parser.add_argument("--timeout-s", type=positive_number, default=120.0, help="of every exchange (default 120)")
    add_arguments(parser, rounds=5)
    return parser


def draw(num_tokens: int, num_hot: int, share: float, generator: torch.Generator) -> Tensor:
    """Return topk_ids (T, K): each of the first num_hot experts for a share of the tokens, then others, all alike."""
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    is_hot = torch.rand(num_tokens, num_hot, generator=generator) < share
    scores[:, :num_hot] += torch.where(is_hot, 1.0, -1.0)
    return scores.topk(TOP_K, dim=1)[1]


def spread(num_hot: int, size: int) -> ExpertPlacement:
    """Return a placement that deals the hot experts out over the ranks, and then the others."""
    local = NUM_EXPERTS // size
    held: list[list[int]] = [[] for _ in range(size)]
    for expert in range(num_hot):
        held[expert % size].append(expert)
    others = iter(range(num_hot, NUM_EXPERTS))
    for own in held:
        own += [next(others) for _ in range(local - len(own))]
    return ExpertPlacement(tuple(map(tuple, held)))


class Case:
    """The calls of one rank, a variant each."""

    def __init__(self, transport: Transport, arguments: argparse.Namespace, num_hot: int) -> None:
        self.transport, self.arguments = transport, arguments
        generator = torch.Generator().manual_seed(transport.rank)
        tokens = arguments.tokens
        self.x = torch.randn(tokens, HIDDEN, generator=generator, requires_grad=True)
        self.ids = draw(tokens, num_hot, arguments.share, generator)
        self.even = draw(tokens, 0, 0.0, generator)
        self.topk_weights = torch.rand(tokens, TOP_K, generator=generator, requires_grad=True)
        self.dout = torch.randn(tokens, HIDDEN, generator=generator)
        weights = torch.Generator().manual_seed(0)
        self.gate_up = torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=weights) * HIDDEN**-0.5
        self.down = torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, generator=weights) * INTERMEDIATE**-0.5
        placement = spread(num_hot, transport.size)
        is_ideal = arguments.netns is not None
        self.variants: dict[str, Callable[[], Tensor]] = {
            "without": self._variant(self.ids),
            "auto": self._variant(self.ids, balance="auto"),
            "always": self._variant(self.ids, balance="always"),
            "ideal": self._variant(self.ids, placement) if is_ideal else self._variant(self.even),
            "even": self._variant(self.even),
            "even, auto": self._variant(self.even, balance="auto"),
        }

    def _variant(
        self, ids: Tensor, placement: ExpertPlacement | None = None, balance: Literal["auto", "always"] | None = None
    ) -> Callable[[], Tensor]:
        size, rank = self.transport.size, self.transport.rank
        held = (placement or ExpertPlacement.contiguous(NUM_EXPERTS, size)).experts_of_rank[rank]
        gate_up_proj = self.gate_up[list(held)].requires_grad_()
        down_proj = self.down[list(held)].requires_grad_()
        overlap = OverlapConfig(
            self.arguments.chunks, chunk_by="tokens", balance=balance, max_copies=self.arguments.max_copies
        )

        def call() -> Tensor:
            for tensor in (self.x, self.topk_weights, gate_up_proj, down_proj):
                tensor.grad = None
            y = expert_parallel_mlp(
                self.x,
                ids,
                self.topk_weights,
                gate_up_proj,
                down_proj,
                num_experts=NUM_EXPERTS,
                transport=self.transport,
                overlap=overlap,
                placement=placement,
            )
            y.backward(self.dout)
            return y.detach()

        return call

    def measure(self, rounds: int) -> Json:
        """Return what every variant takes, and what "auto" did."""
        reports: dict[str, list[LayerReport]] = {name: [] for name in self.variants}
        current = ""
        transport = self.transport

        class Listener:
            def before_forward(self, *_: object) -> None: ...
            def after_backward(self, *_: object) -> None: ...
            def after_forward(self, of: Transport, header: object, report: LayerReport, grouping: object) -> None:
                if of is transport:
                    reports[current].append(report)

        listener = Listener()
        listeners.append(listener)
        samples: Samples = {name: [] for name in self.variants}
        try:
            for number in range(SETTLED + rounds):
                for current, call in self.variants.items():
                    for _ in range(2):
                        transport.barrier()
                        started = time.perf_counter()
                        call()
                        seconds = time.perf_counter() - started
                    if number >= SETTLED:
                        samples[current].append(seconds)
        finally:
            listeners.remove(listener)
        reports = {name: of[-2 * rounds :][1::2] for name, of in reports.items()}
        around = {
            name: [seconds - _passes_s(report) for seconds, report in zip(of, reports[name], strict=True)]
            for name, of in samples.items()
        }
        predicted = {
            name: self._predicted(reports, name) + statistics.median(gather(transport, statistics.median(around[name])))
            for name in PREDICTED
        }
        samples = {name: slowest(transport, of) for name, of in samples.items()}
        return _summary(samples, {name: of[-1] for name, of in reports.items()}, predicted)

    def _predicted(self, reports: Mapping[str, Sequence[LayerReport]], name: str) -> float:
        """Return what the simulator says the passes of a call take, by what steps of calls without copies have taken.

        Copies are taken to cost for their pairs what own experts do.
        """
        without = [*reports["even"], *reports["without"]]
        costs, link = layer_costs(without), link_costs(reports["even"], False)
        report = reports[name][-1]
        passes = simulate_layer(report.overlap, layer_work(report), costs.with_copies(), link, backward=True)
        return statistics.median(gather(self.transport, sum(of.total_s for of in passes)))


def _passes_s(report: LayerReport) -> float:
    """Return how long a call's passes took: all else is the host's, before and between them."""
    return report.forward.total_s + (0.0 if report.backward is None else report.backward.total_s)


def _num_copies(report: LayerReport) -> int:
    said = report.copies
    return 0 if said is None or said.planned is None else len(said.planned.copies)


def _summary(samples: Samples, reports: dict[str, LayerReport], predicted: dict[str, float]) -> Json:
    medians = {name: statistics.median(of) for name, of in samples.items()}
    auto, always = reports["auto"], reports["always"]
    return {
        "calls": {name: summarize(of) for name, of in samples.items()},
        "imbalance": round(auto.imbalance_without_copies, 3),
        "imbalance_auto": round(auto.imbalance, 3),
        "imbalance_always": round(always.imbalance, 3),
        "copies_auto": _num_copies(auto),
        "copies_always": _num_copies(always),
        "without_over_ideal": round(medians["without"] / medians["ideal"], 3),
        "auto_over_ideal": round(medians["auto"] / medians["ideal"], 3),
        "always_over_ideal": round(medians["always"] / medians["ideal"], 3),
        "auto_over_without": round(medians["auto"] / medians["without"], 3),
        "even_auto_over_even": round(medians["even, auto"] / medians["even"], 3),
        "predicted_ms": {name: round(1e3 * of, 1) for name, of in predicted.items()},
        "predicted_over_measured": {name: round(of / medians[name], 3) for name, of in predicted.items()},
        "choice": auto.balance,
    }


def print_error(results: list[Json]) -> None:
    """Print by how much the predictions miss the times, in the median."""
    errors = [abs(ratio - 1) for result in results for ratio in result["predicted_over_measured"].values()]
    print(f"predicted against measured: {statistics.median(errors):.1%} in the median of {len(errors)}")


def as_line(rate: str, num_hot: int, result: Json) -> str:
    times = ", ".join(f"{name} {of['median_ms']:.0f}" for name, of in result["calls"].items())
    others = {name: value for name, value in result.items() if name not in ("calls", "choice")}
    return f"{rate:>8}, {num_hot} hot: {times} ms; {others}; {result['choice']}"


def run_rank(arguments: argparse.Namespace) -> None:
    """Measure on this process, one of the ranks; the first one prints and writes."""
    torch.set_num_threads(1)
    results: list[Json] = []
    with torchrun_ranks(timeout_s=arguments.timeout_s) as transport:
        for rate in arguments.rates:
            if transport.rank == 0:
                ask(f"rate {parse_rate(rate)}")
            transport.barrier()
            for num_hot in arguments.hot:
                results.append(
                    {"rate": rate, "hot": num_hot, **Case(transport, arguments, num_hot).measure(arguments.rounds)}
                )
                if transport.rank == 0:
                    print(as_line(rate, num_hot, results[-1]), flush=True)
        if transport.rank == 0:
            print_error(results)
            write_json(arguments.json, "balance", {"arguments": _described(arguments), "results": results})


def run_emulated(arguments: argparse.Namespace) -> None:
    """Measure on emulated ranks, whose experts sleep."""
    results: list[Json] = []
    for rate in arguments.rates:
        link = LinkModel(bandwidth_gb_per_s=parse_rate(rate) / 8e9)
        for num_hot in arguments.hot:

            def on_rank(transport: Transport, num_hot: int = num_hot) -> Json:
                return Case(transport, arguments, num_hot).measure(arguments.rounds)

            with sleeping_experts(arguments.pair_us / 1e6) if arguments.pair_us else nullcontext():
                of_ranks = run_on_emulated_ranks(on_rank, arguments.ranks, link=link, timeout_s=arguments.timeout_s)
            results.append({"rate": rate, "hot": num_hot, **of_ranks[0]})
            print(as_line(rate, num_hot, results[-1]), flush=True)
    print_error(results)
    write_json(arguments.json, "balance", {"arguments": _described(arguments), "results": results})


def _described(arguments: argparse.Namespace) -> Json:
    return {name: value for name, value in vars(arguments).items() if name != "json"}


def main() -> int:
    """Start the ranks, or be one of them."""
    arguments = make_parser().parse_args()
    if arguments.rates is None:
        arguments.rates = ["12gbit", "1gbit"] if arguments.netns is None else [UNSHAPED, "1gbit", "400mbit"]
    for rate in arguments.rates:
        parse_rate(rate)
    if arguments.netns is None:
        run_emulated(arguments)
        return 0
    check_start(arguments.netns, {})
    if is_inside():
        run_rank(arguments)
        return 0
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "bench.balance", *sys.argv[1:]]
    with Namespaces(command, arguments.netns, parse_rate(UNSHAPED)) as namespaces:
        return namespaces.run(arguments.timeout_s)


if __name__ == "__main__":
    sys.exit(main())
