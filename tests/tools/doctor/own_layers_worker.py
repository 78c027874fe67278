"""A rank of a job of this package's layers under torch.profiler, DDP or FSDP2 around them; one rank sleeps.

Run by tests, as one of torchrun's processes: FOLDER WRAPPER LATE SECONDS, and the name of the case.
"""

import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.tools.recording import on_trace_ready

HIDDEN, VOCABULARY, LENGTH, STEPS = 32, 64, 4, 12


class Block(nn.Module):
    """Attention of one head, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.moe = tm.MoELayer(
            tm.MoEConfig(
                hidden_size=HIDDEN, intermediate_size=32, num_experts=16, top_k=1, load_balance_loss_weight=0.01
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.moe(self.norms[1](x))


class Gpt(nn.Module):
    """Three blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    """Return the model with DDP around it, or with its blocks sharded."""
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    ignored = set(tm.expert_parameters(model))
    for block in model.blocks:
        fully_shard(block, ignored_params=ignored)
    fully_shard(model, ignored_params=ignored)
    return model


def main(folder: str, wrapper: str, late: int, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Gpt()
    tm.parallelize(model, dist.group.WORLD, tm.OverlapConfig())
    model = wrapped(model, wrapper)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        record_shapes=True,
        schedule=torch.profiler.schedule(wait=3, warmup=2, active=STEPS, repeat=1),
        on_trace_ready=on_trace_ready(folder),
    ) as profile:
        for step in range(5 + STEPS):
            if rank == late:
                time.sleep(seconds)
            ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(100 * step + rank))
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            profile.step()
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(f"passed {wrapper}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
