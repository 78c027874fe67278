"""memory_gib: what a job holds on the fullest GPU; estimate_layers: what its layers with experts hold, by routing."""

from dataclasses import replace

import torch

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.overlap.simulation.memory import BufferWidths
from tritonmoe.overlap.tuning.memory_estimate import Estimate, estimate_bytes
from tritonmoe.tools.planner.cluster import Cluster
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.layer_exchange import LayerExchange
from tritonmoe.tools.planner.operation_costs import MAIN_GRAD_BYTES

__all__ = ["USABLE_MEMORY", "estimate_layers", "memory_gib"]

USABLE_MEMORY = 0.92
"""The share of a GPU's memory that a job can fill: the rest goes to the allocator, the driver and buffers of NCCL."""

OPTIMIZER_STATE_BYTES = 12


def memory_gib(job: Job, cluster: Cluster) -> float:
    """Return the memory that the fullest GPU holds, 2**30 bytes: weights, gradients, optimizer, what backward needs.

    Kept for each micro-batch under way are a layer's input, projections, attention and its result, the received rows
    and h of the experts; the first pipeline stage has pp micro-batches under way. What an allocator wastes is not in
    it.
    """
    dp = job.dp(cluster)
    expert_dp = dp * job.tp // job.ep
    of_dense, of_sparse = (_kept_bytes(job, cluster, is_dense=is_dense) for is_dense in (True, False))
    most = 0.0
    for stage, (num_dense, num_sparse) in enumerate(job.stage_layers()):
        weights, trained = job.weight_bytes(*job.rank_parameters(stage)), job.trained_parameters(stage)
        spread = trained[0] / dp + trained[1] / expert_dp
        if job.zero == 3:
            held = weights[0] / dp + weights[1] / expert_dp + spread * MAIN_GRAD_BYTES
            if job.pp > 1:  # what is spread is held whole too, from the first micro-batch to the last one
                whole = sum(weights) - weights[0] / dp - weights[1] / expert_dp
                held += whole + MAIN_GRAD_BYTES * (sum(trained) - spread)
            elif dp * job.tp > 1:  # of the rest a rank holds the layer at work and the next one
                held += 2 * sum(weights) / max(1, num_dense + num_sparse)
        else:
            held = sum(weights) + sum(trained) * MAIN_GRAD_BYTES
        held += OPTIMIZER_STATE_BYTES * spread
        kept = num_dense * of_dense + num_sparse * of_sparse
        under_way = min(
            job.micro_batches,
            job.pp - stage + (job.pp - 1) * (job.stages_in_turn > 1) / job.stages_in_turn + job.runs_batches_in_turn,
        )
        held += kept * under_way
        if stage == job.pp - 1:
            held += job.num_tokens * job.model.vocab_size * (job.dtype_bytes + 4)
        most = max(most, held)
    return most / 2**30


def estimate_layers(job: Job, routing: str, budget_bytes: int | None = None) -> Estimate:
    """Return what the ranks of the first pipeline stage hold in the buffers of their layers with experts.

    With recompute="full" one layer keeps them at a time. A call has one chunk, or with a budget what the budget asks.

    Args:
        routing: "uniform", "worst" (all tokens on rank 0), or "recorded", by job.load.
    Raises:
        ValueError: nothing is recorded; or the job has wire formats, whose memory only a layer can estimate; or a
            budget for experts in a precision, which no call takes.
    """
    if routing == "recorded" and not job.load:
        raise ValueError("no routing is recorded: give the number of pairs of each expert")
    if job.precision is not None and budget_bytes is not None:
        raise ValueError(
            f"no call of experts in {job.expert_precision} has a memory budget: leave the budget out, or the precision"
        )
    if job.wire_dtype is not None or job.dtype == "fp8":
        raise ValueError(
            "memory by routing is estimated for rows that travel in the dtype of the layer, bf16 or fp32: ask a layer, "
            "by layer.peak_bytes(num_tokens, routing=...), for others"
        )
    model = job.model
    num_layers = 1
    if job.recompute != "full":
        num_layers = job.stage_layers()[0][1] * min(job.micro_batches, job.pp)
    num_experts = model.num_experts // job.ep
    codes = num_experts * model.expert_parameters if job.precision is not None else 0  # one byte for a parameter
    widths = BufferWidths(
        model.hidden_size,
        model.expert_size,
        num_experts,
        job.dtype_bytes,
        save="input" if job.recompute == "experts" else "hidden",
        precision=job.precision,
        rounded_weight_bytes=codes,
        num_tokens=round(job.num_tokens),
    )
    return estimate_bytes(
        torch.tensor(job.load) if routing == "recorded" else routing,
        ExpertPlacement.contiguous(model.num_experts, job.ep),
        round(job.num_tokens),
        model.top_k,
        job.wires.row_bytes(model.hidden_size),
        widths,
        OverlapConfig(memory_budget_bytes=budget_bytes),
        num_layers=max(1, num_layers),
    )


def _kept_bytes(job: Job, cluster: Cluster, *, is_dense: bool) -> float:
    """Return what one layer keeps of one micro-batch for its backward."""
    model, b, tokens = job.model, job.dtype_bytes, job.num_tokens
    if job.recompute == "full":
        return tokens * model.hidden_size * b
    attention = model.attention
    columns = 4 * model.hidden_size + attention.rope_width + attention.num_heads * attention.v_dim
    columns += sum(outputs for _, outputs in attention.products(model.hidden_size)[:-1])
    if job.recompute == "selective":
        columns -= 2 * model.hidden_size
        if again := attention.up_projections(model.hidden_size):
            columns -= attention.rope_width + sum(outputs for _, outputs in again)
    width = model.dense_size if is_dense else model.shared_size
    kept = tokens * (columns + 3 * width) * b
    if is_dense:
        return kept
    exchange = LayerExchange(replace(job, two_batches=False), cluster, 1)
    received = tokens * job.ep * exchange.needs.of_rank * job.wires.kept_row_bytes(model.hidden_size)
    hidden = exchange.num_pairs * 2 * model.expert_size * b if job.recompute != "experts" else 0.0
    return kept + received + hidden + tokens * model.num_experts * 4
