"""The trainers of `python -m bench.foreign_traces`: each makes a model for a job, and gives what one step does."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.foreign_job import ATTENTION_S, ROW_S, ROWS, WIDTH, Job, Layer
from bench.foreign_scenarios import NODE_SIZE, Scenario

__all__ = ["MAKE"]

Step = Callable[[], None]
HIDDEN, SEQUENCE, EXPERTS_OF_RANK = 256, 64, 2
INSIDE = 1 << 16
"""Numbers that the ranks of a host sum."""
NUM_BATCHES = 4
"""Micro-batches of the pipeline."""


def ddp(scenario: Scenario) -> tuple[Job, Step]:
    """Plain layers under DistributedDataParallel."""
    job = Job(scenario)
    model = DistributedDataParallel(nn.Sequential(*[Layer(job, index) for index in range(scenario.num_layers)]))
    return job, _step_of(model)


def fsdp2(scenario: Scenario) -> tuple[Job, Step]:
    """Plain layers, each sharded by fully_shard."""
    from torch.distributed.fsdp import fully_shard

    job = Job(scenario)
    model = nn.Sequential(*[Layer(job, index) for index in range(scenario.num_layers)])
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return job, _step_of(model)


def _step_of(model: nn.Module) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        loss = model(torch.randn(ROWS, WIDTH)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def pipeline(scenario: Scenario) -> tuple[Job, Step]:
    """Two stages of torch.distributed.pipelining, 1F1B; the ranks of a stage share its experts and its gradients."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    size, rank = dist.get_world_size(), dist.get_rank()
    width = size // 2
    stages = [dist.new_group([stage * width + one for one in range(width)]) for stage in range(2)]
    lines = [dist.new_group([one, one + width]) for one in range(width)]
    stage, group = rank // width, stages[rank // width]
    job = Job(scenario, NUM_BATCHES)
    rows = ROWS // 2
    model = nn.Sequential(*[Layer(job, index, group, rows) for index in range(scenario.num_layers)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    schedule = Schedule1F1B(
        PipelineStage(model, stage, 2, torch.device("cpu"), group=lines[rank % width]), NUM_BATCHES,
        loss_fn=lambda output, target: (output - target).square().mean(),
    )  # fmt: skip

    def step() -> None:
        if stage == 0:
            schedule.step(torch.randn(NUM_BATCHES * rows, WIDTH))
        else:
            schedule.step(target=torch.zeros(NUM_BATCHES * rows, WIDTH))
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        optimizer.zero_grad()

    return job, step


def transformers(scenario: Scenario) -> tuple[Job, Step]:
    """A small Mixtral under transformers' own expert parallelism ("all_to_all"), its dense weights under FSDP2."""
    import transformers as of
    from transformers.distributed import DistributedConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    job, size = Job(scenario), dist.get_world_size()
    current = [0]
    nodes = [list(range(first, first + NODE_SIZE)) for first in range(0, size, NODE_SIZE)]
    of_host, _ = dist.new_subgroups_by_enumeration(nodes) if scenario.num_hosts > 1 else (None, None)

    def experts(module: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = _experts(module, x, top_k_index, top_k_weights)
        return job.work(y, current[0], ROW_S * x.shape[0] / scenario.top_k)

    def attention(module: Any, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        y, _ = sdpa_attention_forward(module, *arguments, **options)
        return job.work(y, module.layer_idx, ATTENTION_S), None

    ALL_EXPERTS_FUNCTIONS.register("timed", experts)
    ALL_ATTENTION_FUNCTIONS.register("timed", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("timed", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config = of.MixtralConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=scenario.num_layers,
        num_attention_heads=4, num_key_value_heads=1, num_local_experts=EXPERTS_OF_RANK * size,
        num_experts_per_tok=scenario.top_k, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    folder = [tempfile.mkdtemp() if job.rank == 0 else ""]
    dist.broadcast_object_list(folder)
    if job.rank == 0:
        of.AutoModelForCausalLM.from_config(config).save_pretrained(Path(folder[0]))
    dist.barrier()
    model = of.AutoModelForCausalLM.from_pretrained(
        folder[0], experts_implementation="timed", attn_implementation="timed",
        distributed_config=DistributedConfig(fsdp_size=size, ep_size=size, ep_implementation="all_to_all"),
    ).train()  # fmt: skip
    _arrange(model, job, current, of_host)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        ids = torch.randint(2, 64, (4, SEQUENCE))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return job, step


def _experts(module: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run each expert on its rows: as transformers' "eager" does, for one expert of each row."""
    y = x * 0.0
    for expert in range(module.num_experts):
        (rows,) = torch.where(top_k_index[:, 0] == expert)
        gate, up = nn.functional.linear(x[rows], module.gate_up_proj[expert]).chunk(2, dim=-1)
        z = nn.functional.linear(module.act_fn(gate) * up, module.down_proj[expert])
        y = y.index_add(0, rows, z * top_k_weights[rows])
    return y


def _arrange(model: Any, job: Job, current: list[int], of_host: Any) -> None:
    """Make the job decide where tokens go, and when a layer comes late.

    of_host: a group of the ranks of this host, which sum something before each layer as tensor parallelism does.
    """
    ranks = list(range(job.size))

    def route(module: nn.Module, arguments: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, weights, index = output
        shares = torch.tensor(job.shares(ranks)).repeat_interleave(EXPERTS_OF_RANK) / EXPERTS_OF_RANK
        return logits, weights, torch.multinomial(shares.expand(len(index), -1), job.scenario.top_k)

    def before(index: int) -> Callable:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
            current[0] = index
            if of_host is not None:
                dist.all_reduce(torch.zeros(INSIDE), group=of_host)
            if arguments:
                return (job.nap(arguments[0], index), *arguments[1:]), options
            return arguments, {**options, "hidden_states": job.nap(options["hidden_states"], index)}

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(before(index), with_kwargs=True)
        layer.mlp.gate.register_forward_hook(route)


MAKE = {"ddp": ddp, "fsdp2": fsdp2, "pipeline": pipeline, "transformers": transformers}
