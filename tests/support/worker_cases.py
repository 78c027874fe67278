"""The cases that a worker's ranks run over gloo, as torchrun starts them."""

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["run_cases"]


def run_cases(run: Callable[[str], None], names: Sequence[str], timeout: timedelta | None = None) -> None:
    """Make the group, run each case on all ranks, and let rank 0 print "passed NAME" once all have ended it.

    timeout: of gloo's exchanges; None for PyTorch's own.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timeout)
    for name in names:
        run(name)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"passed {name}", flush=True)
    dist.destroy_process_group()
