"""Train a layer whose router sends most tokens to two experts of one rank; tm.rebalance moves experts apart.

    torchrun --standalone --nproc-per-node 2 examples/train_rebalanced.py

Halfway other experts become the hot ones, and experts move once more. The losses are those without tm.rebalance, which
`--every 0` leaves out, and a checkpoint has the model's order wherever its experts stand.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import tritonmoe as tm

CONFIG = tm.MoEConfig(hidden_size=64, intermediate_size=96, num_experts=8, top_k=2)
HOT = ((0, 1), (1, 4))
"""The experts that most tokens need, in the first and in the second half of the training."""


def heat(router: tm.TopKRouter, hot: tuple[int, ...]) -> None:
    """Let these experts have the largest scores of nearly all tokens, whose first column is about 1."""
    with torch.no_grad():
        router.weight.mul_(0.2)
        router.weight[:, 0] = 0.0
        router.weight[list(hot), 0] = 4.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--every", type=int, default=4, help="steps between two looks at the load, 0 for none")
    arguments = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/train_rebalanced.py")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    layer = tm.MoELayer(CONFIG, dist.group.WORLD, generator=torch.Generator().manual_seed(0))
    layer.router.weight.requires_grad_(False)  # it stays as skewed as it is made here
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.LayerNorm(CONFIG.hidden_size), layer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rebalancer = tm.rebalance(model, optimizer, every=arguments.every) if arguments.every else None

    generator = torch.Generator().manual_seed(1 + rank)
    x = torch.randn(arguments.tokens, CONFIG.hidden_size, generator=generator)
    x[:, 0] = 20.0  # the largest of its row: about 1 behind the norm, scaled
    target = torch.roll(x, 1, dims=1).tanh()
    for step in range(arguments.steps):
        heat(layer.router, HOT[2 * step // arguments.steps])
        loss = F.mse_loss(model(x), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decided = None if rebalancer is None else rebalancer.step()
        mean_loss = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean_loss)
        if rank == 0:
            print(f"step {step} loss {mean_loss.item():.6f}", flush=True)
            if decided is not None:
                print(decided, flush=True)
    whole = layer.experts.state_dict()[
        "down_proj"
    ].full_tensor()  # every rank calls it: (E, D, F), in the model's order
    if rank == 0:
        print(f"experts of rank 0: {layer.experts.expert_ids}; in a state dict {len(whole)}, in the model's order")
        print(f"sum of expert 4: {whole[4].double().sum().item():.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
