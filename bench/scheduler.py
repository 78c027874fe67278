"""What the scheduler costs: one chunk through the executor with LocalTransport against the bare ops (moe_mlp)."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from bench.moe_mlp import SHAPES
from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.expert_parallel.expert_parallel_mlp import expert_parallel_mlp
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.tools.benchmarks.argument_types import positive
from tritonmoe.tools.benchmarks.timing import add_arguments, interleave, ratio, summarize, write_json
from tritonmoe.transports import LocalTransport

__all__ = ["main"]


def build(shape: tuple[int, int, int, int], num_tokens: int, backward: bool) -> dict[str, Callable[[], None]]:
    """Return both ways on the same fp32 input, weights and routing."""
    num_experts, top_k, model_width, inner = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, model_width, generator=generator, requires_grad=True)
    w1 = (torch.randn(num_experts, 2 * inner, model_width, generator=generator) * 0.02).requires_grad_()
    w2 = (torch.randn(num_experts, model_width, inner, generator=generator) * 0.02).requires_grad_()
    scores, ids = torch.randn(num_tokens, num_experts, generator=generator).softmax(1).topk(top_k)
    weights = scores.requires_grad_()
    dout = torch.randn(num_tokens, model_width, generator=generator)
    transport, overlap = LocalTransport(), OverlapConfig(num_chunks=1)

    def run(forward: Callable[[], torch.Tensor]) -> None:
        if backward:
            forward().backward(dout)
            for leaf in (x, weights, w1, w2):
                leaf.grad = None
        else:
            with torch.no_grad():
                forward()

    def executor() -> torch.Tensor:
        return expert_parallel_mlp(
            x, ids, weights, w1, w2, num_experts=num_experts, transport=transport, overlap=overlap
        )

    return {"bare": lambda: run(lambda: moe_mlp(x, ids, weights, w1, w2)), "executor": lambda: run(executor)}


def main(argv: list[str] | None = None) -> None:
    """Print one line per case; overhead is executor / bare - 1, of medians."""
    parser = argparse.ArgumentParser(prog="python -m bench.scheduler", description=__doc__)
    parser.add_argument("--tokens", type=positive, default=2048)
    add_arguments(parser, rounds=31)
    arguments = parser.parse_args(argv)
    results = []
    for name, shape in SHAPES.items():
        for backward in (False, True):
            variants = build(shape, arguments.tokens, backward)
            samples = interleave(variants, arguments.rounds, seconds=arguments.seconds)
            times = {variant: summarize(seconds) for variant, seconds in samples.items()}
            overhead = round(ratio(times["executor"], times["bare"]) - 1, 4)
            case: dict[str, Any] = {
                "shape": name,
                "E_K_D_F": shape,
                "T": arguments.tokens,
                "dtype": "float32",
                "pass": "forward+backward" if backward else "forward",
                "times": times,
                "overhead": overhead,
            }
            results.append(case)
            bare_ms, executor_ms = (case["times"][variant]["median_ms"] for variant in ("bare", "executor"))
            print(
                f"{name} T={arguments.tokens} float32 {case['pass']}: overhead {overhead:+.1%} "
                f"(medians: bare {bare_ms:.1f} ms, executor {executor_ms:.1f} ms)",
                flush=True,
            )
    write_json(arguments.json, "scheduler", results)


if __name__ == "__main__":
    main()
