"""moe_mlp on one device against transformers' own experts implementations, forward and forward + backward.

Beside them stand dense products of the same FLOPs: all rows by one matrix, which no mixture of experts can reach.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.integrations.transformers.bench_model import experts_function
from tritonmoe.tools.benchmarks.argument_types import positive
from tritonmoe.tools.benchmarks.timing import add_arguments, interleave, ratio, summarize, write_json
from tritonmoe.tools.benchmarks.workload import DTYPES

__all__ = ["main"]

SHAPES = {"E8-K2": (8, 2, 512, 1024), "E64-K8": (64, 8, 512, 256), "E96-K3": (96, 3, 768, 384)}
"""(E, K, D, F)."""
DENSE = "dense products"
PLACEMENTS = 3
"""How often a case's tensors are made anew: where they lie in memory moves a short call's time by some per cent."""
BATCHED_MM_LARGEST_T = 64
"""batched_mm copies the weights for every pair: 26 GB at T=2048."""


def build(
    shape: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype, implementations: list[str], backward: bool
) -> dict[str, Callable[[], None]]:
    """Return a function for each implementation, all on the same input, weights and routing."""
    num_experts, top_k, model_width, inner = shape
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    w1 = torch.nn.Parameter(draw(num_experts, 2 * inner, model_width, scale=0.02))
    w2 = torch.nn.Parameter(draw(num_experts, model_width, inner, scale=0.02))
    x, dout = draw(num_tokens, model_width).requires_grad_(), draw(num_tokens, model_width)
    scores = torch.randn(num_tokens, num_experts, generator=generator).softmax(1).to(device)
    weights, ids = scores.topk(top_k)
    weights = (weights / weights.sum(1, keepdim=True)).to(dtype).requires_grad_()
    num_pairs = num_tokens * top_k
    rows, hidden, gated = (draw(num_pairs, columns) for columns in (model_width, 2 * inner, inner))
    dense_w1, dense_w2 = draw(2 * inner, model_width), draw(model_width, inner)

    def dense() -> None:
        torch.mm(rows, dense_w1.mT)
        torch.mm(gated, dense_w2.mT)
        if backward:
            torch.mm(rows, dense_w2)
            torch.mm(hidden, dense_w1)
            torch.mm(hidden.mT, rows)
            torch.mm(rows.mT, gated)

    def make(implementation: str) -> Callable[[], None]:
        if implementation == DENSE:
            return dense
        if implementation == "tritonmoe":

            def forward() -> torch.Tensor:
                return moe_mlp(x, ids, weights, w1, w2)
        else:
            peer = experts_function(implementation, w1, w2)

            def forward() -> torch.Tensor:
                return peer(x, ids, weights)

        def run() -> None:
            if not backward:
                with torch.no_grad():
                    forward()
                return
            forward().backward(dout)
            for leaf in (x, weights, w1, w2):
                leaf.grad = None

        return run

    return {name: make(name) for name in implementations}


def main(argv: list[str] | None = None) -> None:
    """Print one line per case; ratio is the best peer's median over ours, dense that of the products over ours."""
    parser = argparse.ArgumentParser(prog="python -m bench.moe_mlp", description=__doc__)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[2048, 64])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    add_arguments(parser, rounds=11)
    arguments = parser.parse_args(argv)
    results = []
    for name in arguments.shapes:
        for num_tokens in arguments.tokens:
            for dtype in arguments.dtypes:
                for backward in (False, True):
                    peers = ["grouped_mm", "eager"]
                    if num_tokens <= BATCHED_MM_LARGEST_T:
                        peers.append("batched_mm")
                    names = ["tritonmoe", *peers, DENSE]
                    placements, parts = [], []  # all kept, so that none gets the memory of an earlier one
                    for _ in range(PLACEMENTS):
                        placements.append(build(SHAPES[name], num_tokens, DTYPES[dtype], names, backward))
                        rounds, seconds = -(-arguments.rounds // PLACEMENTS), arguments.seconds / PLACEMENTS
                        parts.append(interleave(placements[-1], rounds, seconds=seconds, bounds=[DENSE]))
                    samples = {variant: [time for part in parts for time in part[variant]] for variant in names}
                    best = min(peers, key=lambda peer: statistics.median(samples[peer]))
                    summaries = {variant: summarize(times) for variant, times in samples.items()}
                    over_best = ratio(summaries[best], summaries["tritonmoe"], 3)
                    case = {
                        "shape": name,
                        "E_K_D_F": SHAPES[name],
                        "T": num_tokens,
                        "dtype": dtype,
                        "pass": "forward+backward" if backward else "forward",
                        "times": summaries,
                        "best_other": best,
                        "ratio": over_best,
                        "dense": ratio(summaries[DENSE], summaries["tritonmoe"], 3),
                    }
                    results.append(case)
                    times = "  ".join(f"{v} {case['times'][v]['median_ms']:.1f}" for v in samples)
                    print(
                        f"{name} T={num_tokens} {dtype} {case['pass']}: ratio {over_best:.2f} over {best}, "
                        f"{case['dense']:.2f} of dense products  "
                        f"(ms: {times})",
                        flush=True,
                    )
    write_json(arguments.json, "moe_mlp", results, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
