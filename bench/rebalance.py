"""`python -m bench.rebalance`: a layer of which one rank has the hot experts, whose experts move by tm.rebalance.

Emulated ranks whose experts take time by sleeping, a fixed time for each pair (tools/benchmarks/stand_ins.py): a step
takes as long as its busiest rank, whatever this machine is. Tokens are drawn anew in every step, from popularities that
stay. Behind the first steps, of which tm.rebalance sees each, steps of three layers are timed in interleaved rounds:
one whose experts stay, the one whose experts have moved, and one with the best placement that a long search finds for
the popularities: exchanges of two experts from many random placements, until none relieves the busiest rank.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from tritonmoe import ExpertPlacement, GroupedExperts, MoEConfig, OverlapConfig, Rebalanced, rebalance
from tritonmoe.layer.rebalancing.better_placement import better_placements, busiest
from tritonmoe.tools.benchmarks.argument_types import positive, positive_number
from tritonmoe.tools.benchmarks.namespaces import parse_rate
from tritonmoe.tools.benchmarks.stand_ins import sleeping_experts
from tritonmoe.tools.benchmarks.timing import Samples, add_arguments, summarize, write_json
from tritonmoe.transports import LinkModel, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks

__all__ = ["main"]

CONFIG = MoEConfig(hidden_size=512, intermediate_size=256, num_experts=64, top_k=8)
SEARCHED = 2_000_000
"""Of so many drawn pairs the long search knows the load."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.rebalance", description=__doc__)
    parser.add_argument("--ranks", type=positive, default=4, help="emulated ranks (default 4)")
    parser.add_argument("--skew", type=positive_number, default=2.6, help="pairs of rank 0 over the mean (default 2.6)")
    parser.add_argument("--steps", type=positive, default=20, help="before the timed ones (default 20)")
    parser.add_argument("--every", type=positive, default=5, help="of tm.rebalance (default 5)")
    parser.add_argument("--tokens", type=positive, default=512, help="of each rank (default 512)")
    parser.add_argument("--pair-us", type=positive_number, default=20.0, help="that a sleeping expert takes, thrice")
    parser.add_argument("--rate", default="12gbit", help="of each rank's link (default 12gbit)")
    parser.add_argument("--searches", type=positive, default=200, help="random placements to begin from (default 200)")
    add_arguments(parser, rounds=10)
    return parser


def draw(popularity: Tensor, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Return topk_ids (T, K): K different experts for each token, by popularity (Gumbel's way)."""
    noise = -torch.rand(num_tokens, len(popularity), generator=generator).clamp(min=1e-9).log()
    return (popularity / noise).topk(CONFIG.top_k, dim=1)[1]


def popularities(skew: float, size: int) -> Tensor:
    """Return how popular each expert is: those of rank 0 so much more that it has `skew` times the mean of pairs."""
    generator = torch.Generator().manual_seed(0)
    popularity = torch.randn(CONFIG.num_experts, generator=generator).exp()
    low, high = 1.0, 1e4
    for _ in range(25):
        factor = (low * high) ** 0.5
        scaled = popularity.clone()
        scaled[: CONFIG.num_experts // size] *= factor
        load = torch.bincount(draw(scaled, 20_000, generator).flatten(), minlength=CONFIG.num_experts)
        if float(load[: CONFIG.num_experts // size].sum()) * size / float(load.sum()) < skew:
            low = factor
        else:
            high = factor
    return scaled


def best_of(load: list[int], size: int, searches: int) -> ExpertPlacement:
    """Return the best placement of a long search."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(searches):
        order = torch.randperm(CONFIG.num_experts, generator=generator).view(size, -1).tolist()
        found += list(better_placements(load, ExpertPlacement(tuple(map(tuple, order)))))
    return min(found, key=lambda placement: busiest(load, placement))


def measure_rank(
    transport: Transport, arguments: argparse.Namespace, popularity: Tensor, best: ExpertPlacement
) -> tuple[Samples, list[Rebalanced], ExpertPlacement]:
    """Return this rank's seconds of every layer, what tm.rebalance has decided, and where the experts stand."""
    overlap = OverlapConfig(num_chunks=2)
    layers = {
        name: GroupedExperts(
            CONFIG, transport, overlap, placement=placement, generator=torch.Generator().manual_seed(0)
        )
        for name, placement in (("stay", None), ("move", None), ("best", best))
    }
    moving = layers["move"]
    optimizer = torch.optim.AdamW(moving.parameters(), lr=1e-3)
    rebalancer = rebalance(moving, optimizer, every=arguments.every)
    generator = torch.Generator().manual_seed(10 + transport.rank)
    weights = torch.full((arguments.tokens, CONFIG.top_k), 1 / CONFIG.top_k)

    def step(layer: GroupedExperts) -> None:
        x = torch.randn(arguments.tokens, CONFIG.hidden_size, generator=generator, requires_grad=True)
        layer(x, draw(popularity, arguments.tokens, generator), weights).backward(torch.ones_like(x))
        layer.zero_grad()

    decided = []
    for _ in range(arguments.steps):
        x = torch.randn(arguments.tokens, CONFIG.hidden_size, generator=generator, requires_grad=True)
        moving(x, draw(popularity, arguments.tokens, generator), weights).backward(torch.ones_like(x))
        optimizer.step()
        optimizer.zero_grad()
        found = rebalancer.step()
        decided += [found] if found is not None else []
    samples: Samples = {name: [] for name in layers}
    names = list(layers)
    for number in range(arguments.rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            transport.barrier()
            began = time.perf_counter()
            step(layers[name])
            samples[name].append(time.perf_counter() - began)
    placement = moving.placement or ExpertPlacement.contiguous(CONFIG.num_experts, transport.size)
    return samples, decided, placement


def main(argv: list[str] | None = None) -> None:
    """Print what tm.rebalance decided, and what a step takes with the experts where they were, moved, and at best."""
    arguments = make_parser().parse_args(argv)
    popularity = popularities(arguments.skew, arguments.ranks)
    drawn = draw(popularity, SEARCHED // CONFIG.top_k, torch.Generator().manual_seed(2))
    load = torch.bincount(drawn.flatten(), minlength=CONFIG.num_experts).tolist()
    best = best_of(load, arguments.ranks, arguments.searches)
    link = LinkModel(bandwidth_gb_per_s=parse_rate(arguments.rate) / 8e9)
    with sleeping_experts(arguments.pair_us * 1e-6):
        found = run_on_emulated_ranks(
            lambda transport: measure_rank(transport, arguments, popularity, best), arguments.ranks, link=link
        )
    samples: Samples = {
        name: [max(of_ranks) for of_ranks in zip(*(of[0][name] for of in found), strict=True)] for name in found[0][0]
    }
    _, decided, placement = found[0]
    mean = sum(load) / arguments.ranks
    placements = {
        "stay": ExpertPlacement.contiguous(CONFIG.num_experts, arguments.ranks),
        "move": placement,
        "best": best,
    }
    imbalance = {name: busiest(load, of) / mean for name, of in placements.items()}
    for one in decided:
        print(one)
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    for name, seconds in medians.items():
        print(
            f"{name:>5}: busiest rank {imbalance[name]:.3f} of the mean, a step {seconds * 1e3:.1f} ms, "
            f"{seconds / medians['best']:.3f} of the best placement's"
        )
    results = {
        "skew": arguments.skew,
        "ranks": arguments.ranks,
        "steps": arguments.steps,
        "every": arguments.every,
        "pair_us": arguments.pair_us,
        "rate": arguments.rate,
        "imbalance": imbalance,
        "step": {name: summarize(seconds) for name, seconds in samples.items()},
        "decided": [str(one) for one in decided],
    }
    write_json(arguments.json, "rebalance", results)


if __name__ == "__main__":
    main()
