"""Train a layer of which other experts are hot in every batch; copies of them, for one call each, keep ranks even.

    python examples/train_balanced.py

Four emulated ranks, threads of this process, whose link has 1 GB/s. With `--balance none` the same training runs
without copies: the losses are the same, and one rank has most of the work in every step.
"""

import argparse

import torch
import torch.nn.functional as F

import tritonmoe as tm
from tritonmoe.transports import Transport

CONFIG = tm.MoEConfig(hidden_size=64, intermediate_size=128, num_experts=16, top_k=2)
RANKS = 4


def heat(router: tm.TopKRouter, step: int) -> None:
    """Let two experts of one rank have the largest scores of most tokens; in the next step two of the next rank."""
    first = step % RANKS * CONFIG.num_experts // RANKS
    with torch.no_grad():
        router.weight[:, 0] = 0.0
        router.weight[first : first + 2, 0] = 4.0


def train(transport: Transport, steps: int, tokens: int, balance: str | None) -> list[str]:
    """Return a line for each step, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    layer = tm.MoELayer(CONFIG, transport, tm.OverlapConfig(num_chunks=2, balance=balance), generator=generator)
    layer.router.weight.requires_grad_(False)  # it stays as skewed as it is made here
    optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1 + transport.rank)
    x = torch.randn(tokens, CONFIG.hidden_size, generator=generator)
    x[:, 0] = 1.0
    target = torch.roll(x, 1, dims=1).tanh()
    lines = []
    for step in range(steps):
        heat(layer.router, step)
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / transport.size
        transport.all_reduce(mean, "sum")
        report = layer.experts.last_report
        lines.append(
            f"step {step} loss {mean.item():.6f}, busiest rank {report.imbalance_without_copies:.2f} of the mean, "
            f"with copies {report.imbalance:.2f}: {report.balance or 'none'}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--balance", choices=("auto", "always", "none"), default="always")
    arguments = parser.parse_args()
    balance = None if arguments.balance == "none" else arguments.balance
    lines, *_ = tm.run_on_emulated_ranks(
        lambda transport: train(transport, arguments.steps, arguments.tokens, balance),
        RANKS,
        link=tm.LinkModel(bandwidth_gb_per_s=1.0),
    )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
