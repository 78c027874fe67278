"""Train a small Mixtral of transformers on several processes, with overlap; the losses are those of one process.

    torchrun --nproc-per-node 2 examples/train_mixtral_expert_parallel.py

Each process holds its share of every layer's experts and of the batch; all other parameters are averaged as in data
parallelism. Uses gloo on a CPU.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, MixtralConfig

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=8, help="of the whole batch, divisible by the processes")
    parser.add_argument("--chunks", type=int, default=2)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights everywhere
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    tmt.parallelize(model, dist.group.WORLD, tm.OverlapConfig(num_chunks=arguments.chunks))
    experts = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    others = [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": experts}], lr=3e-3)

    starts = torch.arange(arguments.sequences)[:, None]
    batch = (starts * 7 + 3 * torch.arange(32)) % 128  # to be learnt: each token is the last plus three
    share = arguments.sequences // size
    own = batch[rank * share : (rank + 1) * share]
    for step in range(arguments.steps):
        loss = model(input_ids=own, labels=own).loss
        optimizer.zero_grad()
        loss.backward()
        for parameter in others:
            dist.all_reduce(parameter.grad)
            parameter.grad /= size
        optimizer.step()
        mean_loss = loss.detach() / size
        dist.all_reduce(mean_loss)
        if rank == 0:
            print(f"step {step} loss {mean_loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
