"""`python -m bench.balance_simulated`: what copies of hot experts gain in the simulator: published models, three links.

Nothing is measured on a network or a GPU: compute takes 18 D F operations a pair at a given rate, links are ports of a
given rate, and a call with copies takes another half a millisecond for its exchanges, beside being planned. The planner
sees counts of sampled tokens, as in a call; rows and pairs are then counted from the same tokens, with its copies and
without. How long it takes to plan is measured, the shortest of 15 times on one thread of this machine.
"""

import argparse
import time

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan, equal_sizes, most_copies
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.expert_parallel.plans.copies.copy_planner import CopyCosts, is_uneven, plan_copies
from tritonmoe.ops.backends.pair_work import BACKWARD, FORWARD, WEIGHT_GRADS, pair_work, products_and_elements
from tritonmoe.overlap.simulation.cost_model import CopyWork, LayerWork, LinkCosts, StepCosts, gradient_parts
from tritonmoe.overlap.simulation.simulator import simulate_layer
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import positive
from tritonmoe.tools.benchmarks.timing import add_arguments, write_json

__all__ = ["main"]

MODELS = {"Qwen3-30B": (2048, 768, 128, 8), "DeepSeek-V3": (7168, 2048, 256, 8), "Mixtral 8x7B": (4096, 14336, 8, 2)}
"""D, F, E and K."""
RANKS = {"Qwen3-30B": (16, 64), "DeepSeek-V3": (16, 64, 256), "Mixtral 8x7B": (8,)}
RATES_GB_PER_S = (12.5, 50.0, 400.0)
SKEWS = {"hot rank": 2.6, "hot experts": 2.6}
"""By how much the busiest rank has more pairs than the mean."""
FLOPS, BYTES, PLANNING_S = 4e14, 2, 5e-4
CHUNKS = (1, 2, 4)
PLANNINGS = 15


def draw(size: int, num_tokens: int, num_experts: int, top_k: int, kind: str, boost: float) -> Tensor:
    """Return topk_ids (W, T, K), all experts of a token different; boost: of the logits of hot experts."""
    generator = torch.Generator().manual_seed(0)
    noise = -torch.log(-torch.log(torch.rand(size, num_tokens, num_experts, generator=generator)))
    logits = torch.zeros(num_experts)
    if kind == "hot rank":
        logits[: max(1, num_experts // size)] = boost
    else:  # every expert has its own popularity, of a power law in drawn order
        order = torch.randperm(num_experts, generator=generator)
        logits[order] = -boost * torch.log1p(torch.arange(num_experts, dtype=torch.float32))
    return (noise + logits).topk(top_k, dim=2)[1]


def skewed(size: int, num_tokens: int, num_experts: int, top_k: int, kind: str) -> Tensor:
    """Return routing in which the busiest rank has about the wanted multiple of the mean, or as much as can be."""
    low, high = 0.0, 8.0
    for _ in range(10):
        middle = (low + high) / 2
        ids = draw(size, max(16, num_tokens // 8), num_experts, top_k, kind, middle)
        pairs = torch.bincount(ids.flatten(), minlength=num_experts).view(size, -1).sum(1)
        low, high = (middle, high) if float(pairs.max() * size / pairs.sum()) < SKEWS[kind] else (low, middle)
    return draw(size, num_tokens, num_experts, top_k, kind, high)


def traffic(slots: Tensor, num_slots: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the rows and the pairs (W, W) that slots (W, T, K) make."""
    owner = slots // (num_slots // size)
    pairs = torch.stack([torch.bincount(of.flatten(), minlength=size) for of in owner])
    needs = torch.zeros(*slots.shape[:2], size, dtype=torch.bool).scatter_(2, owner, True)
    return needs.sum(1), pairs


def simulate(model: str, size: int, kind: str, rate: float, arguments: argparse.Namespace) -> Json:
    """Return what one case takes without copies and with those that the planner finds."""
    width, inner, num_experts, top_k = MODELS[model]
    sampled, scale = arguments.sampled, arguments.tokens // arguments.sampled
    ids = skewed(size, sampled, num_experts, top_k, kind)
    counts = torch.stack([torch.bincount(of.flatten(), minlength=num_experts) for of in ids])
    rows, pairs = traffic(ids, num_experts, size)
    flops, _ = products_and_elements(pair_work(width, inner), (*FORWARD, *BACKWARD, *WEIGHT_GRADS))
    held = most_copies(arguments.max_copies, num_experts // size)
    expert_bytes, row_bytes, pair_s = 3 * width * inner * BYTES, width * BYTES, flops / FLOPS
    costs = CopyCosts(
        int(pair_s / 3 * 1e15 * scale), int(pair_s * 2 / 3 * 1e15 * scale), int(1e6 / rate), int(PLANNING_S * 1e15),
        row_bytes * scale, row_bytes * scale, row_bytes * scale, expert_bytes, expert_bytes,
    )  # fmt: skip
    found, planning_s = None, []
    for _ in range(PLANNINGS if is_uneven(pairs.sum(0).tolist()) else 0):
        began = time.perf_counter()
        found = plan_copies(counts, rows, top_k, held, costs).copies
        planning_s.append(time.perf_counter() - began)
    planned_s = min(planning_s) if planning_s else 0.0
    steps = StepCosts({}, dict.fromkeys(("experts", "experts_backward", "weight_grad"), pair_s / 3)).with_copies()
    link = LinkCosts(2e-5, rate * 1e9)

    def seconds(rows: Tensor, pairs: Tensor, copies: ExpertCopies | None) -> float:
        copied = None
        if copies is not None:
            of_ranks = torch.tensor(copies.copy_pairs, dtype=torch.float64) * scale
            copied = CopyWork(
                torch.tensor(copies.sent_copies, dtype=torch.float64),
                of_ranks,
                expert_bytes,
                gradient_parts(expert_bytes),
                relayed=copies.relayed if copies.are_relayed else None,
            )
        work = LayerWork(rows.double() * scale, pairs.double() * scale, row_bytes, top_k, copies=copied)
        plans = [OverlapPlan(equal_sizes(chunks)) for chunks in CHUNKS]
        passes = [simulate_layer(plan, work, steps, link, backward=True) for plan in plans]
        return min(sum(of.total_s for of in both) for both in passes) + (PLANNING_S + planned_s) * (copies is not None)

    without_s = with_s = seconds(rows, pairs, None)
    load = after = pairs.sum(0)
    if found is not None:
        slots = torch.stack([found.slots(of, rank, OverlapPlan()) for rank, of in enumerate(ids)])
        rows, pairs = traffic(slots, found.num_slots, size)
        with_s, after = seconds(rows, pairs, found), pairs.sum(0)
    return {
        "model": model,
        "ranks": size,
        "skew": kind,
        "gb_per_s": rate,
        "imbalance": round(float(load.max() * size / load.sum()), 2),
        "imbalance_with_copies": round(float(after.max() * size / after.sum()), 2),
        "planning_ms": round(1e3 * planned_s, 2),
        "copies": 0 if found is None else len(found.copies),
        "without_ms": round(1e3 * without_s, 2),
        "with_ms": round(1e3 * with_s, 2),
        "gain": round(without_s / with_s, 3),
    }


def main() -> None:
    """Print a line for each model, number of ranks, skew and link."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m bench.balance_simulated", description=__doc__)
    parser.add_argument("--tokens", type=positive, default=8192, help="of each rank (default 8192)")
    parser.add_argument(
        "--sampled", type=positive, default=256, help="of them drawn; all counts are scaled (default 256)"
    )
    parser.add_argument(
        "--max-copies",
        type=lambda text: text if text == "auto" else positive(text),
        default="auto",
        help="on a rank (default: auto)",
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="only these")
    add_arguments(parser, rounds=1)
    arguments = parser.parse_args()
    results = []
    for model, sizes in RANKS.items():
        for size in sizes if arguments.ranks is None else [size for size in sizes if size in arguments.ranks]:
            for kind in SKEWS:
                for rate in RATES_GB_PER_S:
                    results.append(simulate(model, size, kind, rate, arguments))
                    print(", ".join(f"{name} {value}" for name, value in results[-1].items()), flush=True)
    described = {name: value for name, value in vars(arguments).items() if name != "json"}
    write_json(arguments.json, "balance_simulated", {"arguments": described, "results": results})


if __name__ == "__main__":
    main()
