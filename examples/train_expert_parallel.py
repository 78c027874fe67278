"""Train one MoE layer on several processes, with overlap; the losses are those of one process.

    torchrun --nproc-per-node 2 examples/train_expert_parallel.py

Uses NCCL where every process has a GPU of its own, gloo on a CPU otherwise. Each process holds its share of the
experts and of the batch. DistributedDataParallel averages the gradients of dense parameters (the router) and leaves the
experts alone, whose gradients the layer averages itself.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import tritonmoe as tm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the whole batch, all ranks together")
    parser.add_argument("--chunks", type=int, default=2)
    arguments = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/train_expert_parallel.py")

    local_rank = int(os.environ["LOCAL_RANK"])
    use_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if use_cuda else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()

    config = tm.MoEConfig(hidden_size=64, intermediate_size=96, num_experts=8, top_k=2)
    layer = tm.MoELayer(
        config,
        transport=dist.group.WORLD,
        overlap=tm.OverlapConfig(num_chunks=arguments.chunks),
        generator=torch.Generator().manual_seed(0),
        device=device,
    )
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(arguments.tokens, config.hidden_size, generator=generator)
    targets = torch.roll(inputs, 1, dims=1).tanh()
    own = slice(arguments.tokens * rank // size, arguments.tokens * (rank + 1) // size)
    x, target = inputs[own].to(device), targets[own].to(device)

    for step in range(arguments.steps):
        # Summed here and divided by the whole batch, so that ranks with fewer tokens weigh less.
        loss = F.mse_loss(model(x), target, reduction="sum") / (arguments.tokens * config.hidden_size) * size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean_loss = loss.detach() / size
        dist.all_reduce(mean_loss)
        if rank == 0:
            print(f"step {step} loss {mean_loss.item():.6f}", flush=True)

    report = layer.last_report
    assert report is not None
    if rank == 0:
        print(f"rows that rank i (line) sends to rank k (column): {report.traffic_rows.tolist()}")
        print(
            f"rank 0 forward: {report.forward.total_s * 1e3:.2f} ms, "
            f"of which {report.forward.exposed_communication_s * 1e3:.2f} ms waiting for exchanges"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
