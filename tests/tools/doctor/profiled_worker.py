"""A rank of a plain job: uneven all_to_all_single under DDP, where rank 1 sleeps in every step; run by a test."""

import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tritonmoe.tools.recording import on_trace_ready

SPLITS = ([8, 24], [16, 16])


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return exchange(x, backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return exchange(gradients[0].contiguous(), backward=True)


def exchange(x: Tensor, backward: bool) -> Tensor:
    rank = dist.get_rank()
    sent, received = SPLITS[rank], [SPLITS[0][rank], SPLITS[1][rank]]
    if backward:
        sent, received = received, sent
    out = x.new_empty(sum(received), x.shape[1])
    dist.all_to_all_single(out, x, received, sent)
    return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(Exchange.apply(self.before(x)))


def main(folder: str, meet: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
    model = DistributedDataParallel(Model())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        record_shapes=True,
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=4, repeat=1),
        on_trace_ready=on_trace_ready(folder),
    ) as profile:
        for _ in range(5):
            if rank == 1:
                time.sleep(0.3)
            model(torch.randn(32, 16)).sum().backward()
            profile.step()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
