"""Train one MoE layer on several processes, with overlap and checkpoints; the losses are those of one process.

    torchrun --standalone --nproc-per-node 4 --max-restarts 3 examples/train_expert_parallel.py --checkpoints DIRECTORY

Uses NCCL where every process has a GPU of its own, gloo on a CPU otherwise. Each process holds its share of the
experts and of the batch. DistributedDataParallel averages the gradients of dense parameters (the router) and leaves the
experts alone, whose gradients the layer averages itself.

A rank that dies ends the exchanges of the others with an error, and torchrun starts all of them again: they go on from
the newest whole checkpoint, with the numbers that they would have had. Started again with another number of processes,
the same checkpoint is read into other shards.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import tritonmoe as tm

CONFIG = tm.MoEConfig(hidden_size=64, intermediate_size=96, num_experts=8, top_k=2)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint that is whole; its .metadata is written last, when all ranks have written theirs."""
    whole = [path.parent for path in directory.glob("step-*/.metadata")]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save(directory: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write what the training goes on from after `step` steps; every rank writes its experts."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(step)}
    dcp.save(state, checkpoint_id=str(directory / f"step-{step}"))


def load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint of any number of ranks; give the number of steps before it."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=str(path))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10, help="of the whole training, those before a restart included")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the whole batch, all ranks together")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--checkpoints", type=Path, help="directory for checkpoints; without one, none are made")
    parser.add_argument("--save-every", type=int, default=2, metavar="STEPS")
    arguments = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/train_expert_parallel.py")

    local_rank = int(os.environ["LOCAL_RANK"])
    use_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    # A store of this attempt's own: torchrun keeps one for all restarts, in which gloo finds addresses of dead ranks.
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=2)))
    store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # NCCL for rows, gloo for counts and for checkpoints' plans.
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=2))

    layer = tm.MoELayer(
        CONFIG,
        transport=dist.group.WORLD,
        overlap=tm.OverlapConfig(num_chunks=arguments.chunks),
        generator=torch.Generator().manual_seed(0),
        device=device,
    )
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first_step = 0
    if arguments.checkpoints is not None and (path := newest_checkpoint(arguments.checkpoints)) is not None:
        first_step = load(path, model, optimizer)
        if rank == 0:
            print(f"goes on from {path}", flush=True)

    for step in range(first_step, arguments.steps):
        # What a step learns from follows from its number alone, so that a restart goes on with the same numbers.
        generator = torch.Generator().manual_seed(1 + step % 4)
        inputs = torch.randn(arguments.tokens, CONFIG.hidden_size, generator=generator)
        targets = torch.roll(inputs, 1, dims=1).tanh()
        own = slice(arguments.tokens * rank // size, arguments.tokens * (rank + 1) // size)
        x, target = inputs[own].to(device), targets[own].to(device)
        # Summed here and divided by the whole batch, so that ranks with fewer tokens weigh less.
        loss = F.mse_loss(model(x), target, reduction="sum") / (arguments.tokens * CONFIG.hidden_size) * size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean_loss = loss.detach() / size
        dist.all_reduce(mean_loss)
        if rank == 0:
            print(f"step {step} loss {mean_loss.item():.6f}", flush=True)
        is_last = step + 1 == arguments.steps
        if arguments.checkpoints is not None and (is_last or (step + 1) % arguments.save_every == 0):
            save(arguments.checkpoints, step + 1, model, optimizer)

    report = layer.last_report
    if rank == 0 and report is not None:
        print(f"rows that rank i (line) sends to rank k (column): {report.traffic_rows.tolist()}")
        print(
            f"rank 0 forward: {report.forward.total_s * 1e3:.2f} ms, "
            f"of which {report.forward.exposed_communication_s * 1e3:.2f} ms waiting for exchanges"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
