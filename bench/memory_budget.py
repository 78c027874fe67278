"""`python -m bench.memory_budget`: what ranks hold, and how long steps take, with a memory budget and without.

Four gloo processes on this machine, four layers through expert_parallel_mlp, forward and backward, under routings from
uniform to all pairs on one rank. Each routing runs without a budget, in four chunks, and with one, in turn. What a rank
holds is what Linux counts as resident at its peak, above what it had before the step. Beside it stands what is
expected: peak_bytes() of the pairs that each expert has in the step, and the caller's tensors.
"""

import argparse
import ctypes
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

import tritonmoe as tm
from bench.quantized import forget_peak, resident_mb
from tritonmoe.runtime.cpu_memory import recycled
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import positive
from tritonmoe.tools.benchmarks.timing import add_arguments, write_json

__all__ = ["ROUTINGS", "main"]

Routing = Callable[[int, int, "argparse.Namespace"], Tensor]
"""The popularities (T, E) of the experts for the tokens of a rank in a step."""


def _uniform(rank: int, step: int, of: argparse.Namespace) -> Tensor:
    return torch.ones(of.tokens, of.experts)


def _raised(factor: float, first: int = 0, last: int | None = None) -> Routing:
    """Return a routing in which experts `first` to `last`, by default those of rank 0, are so much more popular."""

    def routing(rank: int, step: int, of: argparse.Namespace) -> Tensor:
        popularity = torch.ones(of.tokens, of.experts)
        popularity[:, first : of.experts // of.ranks if last is None else last] *= factor
        return popularity

    return routing


def _zipf(rank: int, step: int, of: argparse.Namespace) -> Tensor:
    return (1.0 / torch.arange(1, of.experts + 1)).expand(of.tokens, -1)


def _in_turn(rank: int, step: int, of: argparse.Namespace) -> Tensor:
    """Return a routing that sends each quarter of the tokens to the experts of another rank."""
    share, own = of.tokens // of.ranks, of.experts // of.ranks
    popularity = torch.ones(of.tokens, of.experts)
    for number in range(of.ranks):
        popularity[number * share : (number + 1) * share, number * own : (number + 1) * own] *= 1e6
    return popularity


def _changing(rank: int, step: int, of: argparse.Namespace) -> Tensor:
    own, hot = of.experts // of.ranks, step % of.ranks
    return _raised(1e6, hot * own, (hot + 1) * own)(rank, step, of)


ROUTINGS: dict[str, Routing] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "twice on rank 0": _raised(3.0),
    "one hot expert": _raised(1e6, 0, 1),
    "most on rank 0": _raised(20.0),
    "all on two ranks": lambda rank, step, of: _raised(1e6, 0, of.experts // 2)(rank, step, of),
    "each quarter to another rank": _in_turn,
    "all on rank 0": _raised(1e6),
    "all on another rank in every step": _changing,
}


class _Layers:
    """The layers of one rank, and one step through them."""

    def __init__(self, transport: tm.transports.Transport, given: argparse.Namespace) -> None:
        self.transport, self.given = transport, given
        generator = torch.Generator().manual_seed(transport.rank)
        own, width, inner = given.experts // given.ranks, given.hidden, given.intermediate
        self.weights = [
            tuple(
                (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).requires_grad_()
                for shape in ((own, 2 * inner, width), (own, width, inner))
            )
            for _ in range(given.layers)
        ]
        self.x = torch.randn(given.tokens, width, generator=generator)
        self.topk_weights = torch.rand(given.tokens, given.top_k, generator=generator)
        self.caller_bytes = sum(weight.nbytes for pair in self.weights for weight in pair)
        """Of gradients of all weights, inputs and outputs of layers, and gradients of the latter: of two at a time."""
        self.caller_bytes += (given.layers + 2) * self.x.nbytes

    def step(self, topk_ids: Tensor, overlap: tm.OverlapConfig) -> None:
        h = self.x.detach().requires_grad_()
        topk_weights = self.topk_weights.detach().requires_grad_()
        for gate_up_proj, down_proj in self.weights:
            h = h + tm.expert_parallel_mlp(
                h,
                topk_ids,
                topk_weights,
                gate_up_proj,
                down_proj,
                num_experts=self.given.experts,
                transport=self.transport,
                overlap=overlap,
            )
        h.square().mean().backward()
        for pair in self.weights:
            for weight in pair:
                weight.grad = None


def _draw(popularity: Tensor, top_k: int, generator: torch.Generator) -> Tensor:
    """Return topk_ids (T, K): K different experts for each token, by popularity (Gumbel's way)."""
    noise = -torch.rand(popularity.shape, generator=generator).clamp(min=1e-9).log()
    return (popularity / noise).topk(top_k, dim=1)[1]


def _run_rank(rank: int, given: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=given.ranks)
    layers = _Layers(tm.transports.ProcessGroupTransport(dist.group.WORLD), given)
    budget = tm.OverlapConfig(memory_budget_bytes=int(given.budget_mb * 1e6))
    variants = {"without": tm.OverlapConfig(num_chunks=4), "with": budget}
    config = tm.MoEConfig(given.hidden, given.intermediate, given.experts, given.top_k)
    alike = {name: tm.GroupedExperts(config, layers.transport, overlap) for name, overlap in variants.items()}
    give_back = ctypes.CDLL(None).malloc_trim
    generator = torch.Generator().manual_seed(100 + rank)
    results: list[Json] = []
    layers.step(_draw(_uniform(rank, 0, given), given.top_k, generator), variants["without"])
    for name in given.routings:
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        peaks: dict[str, list[float]] = {variant: [] for variant in variants}
        expected: dict[str, list[float]] = {variant: [] for variant in variants}
        for step in range(given.rounds):
            topk_ids = _draw(ROUTINGS[name](rank, step, given), given.top_k, generator)
            load = topk_ids.flatten().bincount(minlength=given.experts)
            dist.all_reduce(load)
            for variant, overlap in variants.items():
                of_calls = alike[variant].peak_bytes(given.tokens, routing=load, num_layers=given.layers)
                expected[variant].append((of_calls + layers.caller_bytes) / 1e6)
                gc.collect()
                recycled.clear()
                give_back(0)
                dist.barrier()
                before_mb = resident_mb("VmRSS")
                forget_peak()
                started = time.perf_counter()
                layers.step(topk_ids, overlap)
                times[variant].append(time.perf_counter() - started)
                peaks[variant].append(resident_mb("VmHWM") - before_mb)
        of_ranks: list[Json] = [{} for _ in range(given.ranks)]
        dist.all_gather_object(of_ranks, {"times": times, "peaks": peaks})
        result: Json = {"routing": name}
        for variant in variants:
            result[f"{variant}_mb"] = round(max(max(one["peaks"][variant]) for one in of_ranks), 1)
            result[f"{variant}_expected_mb"] = round(max(expected[variant]), 1)
            result[f"{variant}_s"] = round(statistics.median(of_ranks[0]["times"][variant]), 3)
        ratios = [mine / other for mine, other in zip(times["with"], times["without"], strict=True)]
        result["ratio"] = round(statistics.median(ratios), 3)
        result["ratios"] = [round(min(ratios), 3), round(max(ratios), 3)]
        results.append(result)
        if rank == 0:
            print(json.dumps(result), flush=True)
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory_budget", description=__doc__)
    parser.add_argument("--ranks", type=positive, default=4, help="gloo processes (default 4)")
    parser.add_argument("--tokens", type=positive, default=4096, help="of each rank (default 4096)")
    parser.add_argument("--hidden", type=positive, default=512, help="D (default 512)")
    parser.add_argument("--intermediate", type=positive, default=512, help="F (default 512)")
    parser.add_argument("--experts", type=positive, default=32, help="E (default 32)")
    parser.add_argument("--top-k", type=positive, default=4, help="K (default 4)")
    parser.add_argument("--layers", type=positive, default=4, help="MoE layers (default 4)")
    parser.add_argument("--budget-mb", type=float, default=600.0, help="of each rank, in 1e6 bytes (default 600)")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="default: all")
    add_arguments(parser, rounds=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_rank, (arguments, folder), nprocs=arguments.ranks)
        results = json.loads((Path(folder) / "results.json").read_text())
    given = {name: value for name, value in vars(arguments).items() if name not in ("json", "routings")}
    write_json(arguments.json, "memory_budget", {**given, "routings": results})


if __name__ == "__main__":
    main()
