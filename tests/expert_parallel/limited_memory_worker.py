"""Steps of two gloo ranks that all choose experts of rank 0, in processes of limited memory; argv: a budget, or 0."""

import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tritonmoe as tm

NUM_TOKENS, HIDDEN, EXPERTS, TOP_K, LAYERS = 6144, 256, 8, 2, 4
ROOM_BYTES = 140_000_000
"""Beside what the process has after an even step, and keeps for the next: less than uneven steps hold."""


def limit_memory() -> None:
    """Let this process take only so many bytes more than it has now."""
    status = Path("/proc/self/status").read_text()
    now_kb = int(status.partition("VmData:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (now_kb * 1024 + ROOM_BYTES,) * 2)


def main() -> None:
    budget = int(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    overlap = tm.OverlapConfig(memory_budget_bytes=budget) if budget else tm.OverlapConfig(num_chunks=2)
    generator = torch.Generator().manual_seed(rank)
    config = tm.MoEConfig(HIDDEN, HIDDEN, EXPERTS, TOP_K)
    layers = [tm.GroupedExperts(config, dist.group.WORLD, overlap, generator=torch.Generator()) for _ in range(LAYERS)]
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    topk_weights = torch.rand(NUM_TOKENS, TOP_K, generator=generator)

    def step(num_hot: int) -> None:
        topk_ids = torch.rand(NUM_TOKENS, num_hot, generator=generator).topk(TOP_K)[1]
        h = x.clone().requires_grad_()
        for layer in layers:
            h = h + layer(h, topk_ids, topk_weights)
        h.square().mean().backward()

    step(EXPERTS)
    limit_memory()
    step(EXPERTS)
    print(f"rank {rank}: an even step", flush=True)
    for _ in range(2):
        step(EXPERTS // 2)
    print(f"rank {rank}: uneven steps, in {len(layers[0].last_report.parts)} parts", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
