"""StepTime: what one training step takes, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.simulation.simulator import MOST_LAYERS
from tritonmoe.tools.planner.cluster import Cluster
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.layer_exchange import ExchangeTime, LayerExchange
from tritonmoe.tools.planner.operation_costs import (
    MAIN_GRAD_BYTES,
    UP_PROJECTIONS,
    Parts,
    copy_s,
    exchange_s,
    layer_parts,
    product_s,
)

__all__ = [
    "BESIDE",
    "HOST",
    "ONCE_A_STEP",
    "StepTime",
    "exchange_time",
    "in_turn",
    "layer_exchange",
    "step_time",
    "step_with",
    "walked_layers",
]


OPTIMIZER_BYTES = 46
"""Read or written for each parameter of a rank's own shard: its fp32 gradient to take the norm (4) and to clip it (8);
Adam's gradient, two moments and fp32 weight (28), which is then copied (4) to the weight in bf16 (2)."""
GRADIENT_BYTES = 12
"""The same for each parameter of the rank: its gradient is set to zero (4), and scaled before ranks sum it (8)."""
HOST = "waiting for the host"
"""The part in which a GPU has nothing to do before its host has launched more."""
GRAPHS_SHARE = 0.25
"""Of the host's time, where layers are launched from CUDA graphs in part (published steps on GB200 and GB300)."""
ONCE_A_STEP = ("data-parallel reduction", "optimizer", "other, once a step")
"""The parts that come after the last backward."""
HIDES_GATHERS = 0.9
"""The share of a layer's compute under which its neighbours' weights can be gathered."""
LOSS_BYTES = 16
"""Of one logit: the loss in fp32 and its gradient, forward and backward together."""


@dataclass(frozen=True)
class StepTime:
    """One step of a job on one GPU of the slowest pipeline stage."""

    step_s: float
    layer: ExchangeTime
    """Experts and exchanges of one layer and micro-batch."""
    layer_s: float
    """One layer with experts, forward and backward, all of its parts."""
    exposed_s: float
    """Of the step: exchanges of rows that nothing hides."""
    parts: dict[str, float]
    """Part of the step -> seconds; together they are step_s."""
    tokens: int
    num_calls: int
    """Layers with experts that a GPU runs in the step, micro-batch by micro-batch."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def forward_backward_s(self) -> float:
        """The step without what comes after the last backward."""
        return self.step_s - sum(self.parts.get(name, 0.0) for name in ONCE_A_STEP)


def step_time(job: Job, cluster: Cluster, num_levels: int, plan: OverlapPlan) -> StepTime:
    """Return what a step takes with a plan for its exchanges. Raises ValueError where job and cluster don't fit."""
    parts = layer_parts(job, cluster)
    return step_with(job, cluster, parts, exchange_time(job, cluster, num_levels, plan, parts))


def step_with(job: Job, cluster: Cluster, parts: Parts, exchange: ExchangeTime) -> StepTime:
    """Return what a step takes whose layers' parts, experts and exchanges are known."""
    dp, exchange = job.dp(cluster), exchange.times(job.imbalance if job.ep > 1 else 1.0)
    both = {name: forward + backward for name, (forward, backward) in parts.items()}
    apart = ("dense", "router", "tensor-parallel gathers", UP_PROJECTIONS, "shared")
    block, router, gathers, *_ = (both.pop(name) for name in apart)
    dense = {**both, "dense block": block, "tensor-parallel gathers": 2 * gathers}
    sparse = {
        **both,
        "router": router,
        "shared expert, backward": parts["shared"][1],  # its forward runs within the exchanges
        "experts and exchanges": exchange.total_s,
        "tensor-parallel gathers": gathers,
    }
    if job.recompute == "full":
        again = sum(parts[name][0] for name in both) + parts["tensor-parallel gathers"][0]
        dense["recomputation"] = again + parts["dense"][0]
        sparse["recomputation"] = again + parts["router"][0] + exchange.again_s
    if job.recompute == "selective":
        for of in (dense, sparse):
            of["recomputation"] = parts["norms and rotations"][0] + parts[UP_PROJECTIONS][0]
    passes = 3 if job.recompute == "full" else 2
    one_by_one = job.us_per_expert * job.model.num_experts * passes * 1e-6 if job.ep == 1 else 0.0
    for of, experts_s in ((dense, 0.0), (sparse, one_by_one)):
        if job.zero == 3:
            shared, experts = _layer_parameters(job, is_dense=of is dense)
            waiting_s = _gathering_s(job, cluster, dp, shared, experts, sum(of.values()), exchange)
            of["waiting for weights"] = waiting_s / (job.micro_batches if job.pp > 1 else 1)
        # A layer's host reads counts before it launches the experts: the GPU has run out of work by then.
        launching_s = cluster.host.us_per_layer.value * 1e-6 * (GRAPHS_SHARE if job.cuda_graphs else 1.0)
        of[HOST] = launching_s + max(0.0, experts_s - sum(of.values()))
    return _whole_step(job, cluster, dp, exchange, dense, sparse)


BESIDE = ("attention projections", "attention core", "norms and rotations", "router")
"""The parts that run under the other half's exchanges, forward and backward, where a batch runs in two halves."""


LEAST_EXPOSED = 1 / 8
"""Of exchanges that run under all that the other half of a batch computes: the share that nothing hides at the ends."""


def in_turn(time: ExchangeTime, parts: Parts) -> ExchangeTime:
    """Return what experts and exchanges take where two halves of a batch run in turn, and nothing overlaps in a layer.

    An exchange of one half runs under all that the other one computes: experts, attention, norms and router.
    """
    beside = [sum(parts[name][number] for name in BESIDE) for number in range(2)]
    seconds, exposed = (time.forward_s, time.backward_s), (time.exposed_forward_s, time.exposed_backward_s)
    computed = [whole - own for whole, own in zip(seconds, exposed, strict=True)]
    left = [max(LEAST_EXPOSED * own, own - by - of) for own, by, of in zip(exposed, computed, beside, strict=True)]
    passes = [by + own for by, own in zip(computed, left, strict=True)]
    return ExchangeTime(passes[0], passes[1], left[0], left[1], time.again_s, time.exposed_again_s)


def layer_exchange(job: Job, cluster: Cluster, num_levels: int, parts: Parts) -> LayerExchange:
    """Return the experts and exchanges of one call: of a micro-batch, or of its half where two run in turn."""
    shared_s, tokens = parts["shared"][0], float(job.num_tokens)
    if job.two_batches:
        shared_s, tokens = shared_s / 2, tokens / 2
    return LayerExchange(job, cluster, num_levels, tokens=tokens, shared_s=shared_s)


def exchange_time(job: Job, cluster: Cluster, num_levels: int, plan: OverlapPlan, parts: Parts) -> ExchangeTime:
    """Return the experts and exchanges of one layer and micro-batch, of whose layer_parts are `parts`."""
    if job.two_batches and not job.overlaps_exchange:
        whole = replace(job, two_batches=False)
        return in_turn(layer_exchange(whole, cluster, num_levels, parts).time(plan), parts)
    exchange = layer_exchange(job, cluster, num_levels, parts)
    if not job.two_batches:
        return exchange.time(plan)
    forward_s, backward_s = (sum(parts[name][number] for name in BESIDE) / 2 for number in range(2))
    return exchange.time_of_two_batches(plan, (forward_s, backward_s), walked_layers(job))


def walked_layers(job: Job) -> int:
    """Return how many layers are walked to see what one takes where two halves of a batch run at once."""
    return min(MOST_LAYERS, max(1, *(num_sparse for _, num_sparse in job.stage_layers())))


def _whole_step(
    job: Job,
    cluster: Cluster,
    dp: int,
    exchange: ExchangeTime,
    dense: dict[str, float],
    sparse: dict[str, float],
) -> StepTime:
    """Put stages of layers together: micro-batches, pipeline, what comes once a step."""
    stages = job.stage_layers()
    head = _head_s(job, cluster)
    hop = _hop_s(job, cluster) if job.pp > 1 else 0.0
    by_stage: list[dict[str, float]] = []
    for number, (num_dense, num_sparse) in enumerate(stages):
        own = {name: num_dense * seconds for name, seconds in dense.items()}
        for name, seconds in sparse.items():
            own[name] = own.get(name, 0.0) + num_sparse * seconds
        if number == len(stages) - 1:
            own["output layer and loss"] = head
        own["pipeline hops"] = 2 * hop if job.pp > 1 else 0.0
        by_stage.append(own)
    totals = [sum(own.values()) for own in by_stage]
    slowest = max(range(len(totals)), key=totals.__getitem__)
    parts = {name: seconds * job.micro_batches for name, seconds in by_stage[slowest].items()}
    parts["pipeline bubble"] = (sum(totals) - totals[slowest]) / job.stages_in_turn
    # A stage is done with its last micro-batch before those that come before it; about two thirds are the backward.
    backward = [2 / 3 * total for total in totals]
    ahead = [
        sum(backward[:stage]) + (backward[stage] if job.overlaps_reduction else 0.0) for stage in range(len(backward))
    ]
    once = (*_once_a_step(job, cluster, dp, ahead), cluster.host.ms_per_step.value * 1e-3)
    parts |= dict(zip(ONCE_A_STEP, once, strict=True))
    parts = {name: seconds for name, seconds in parts.items() if seconds > 0}
    _, sparse_there = stages[slowest]
    again = exchange.exposed_again_s if job.recompute == "full" else 0.0
    exposed = (exchange.exposed_s + again) * sparse_there * job.micro_batches
    return StepTime(
        sum(parts.values()),
        exchange,
        sum(sparse.values()),
        exposed,
        parts,
        job.tokens_per_step(cluster),
        sparse_there * job.micro_batches,
    )


def _head_s(job: Job, cluster: Cluster) -> float:
    """Return the output layer, forward and backward, and the loss."""
    model = job.model
    rows, vocab = job.num_tokens * job.tp, model.vocab_size / job.tp
    product = partial(product_s, job, cluster, rows, model.hidden_size, round(vocab), is_wide=True)
    forward, gradient = product(), 0.0 if job.frozen is not None else product(weight_bytes=2 * MAIN_GRAD_BYTES)
    return 2 * forward + gradient + copy_s(cluster, LOSS_BYTES * rows * vocab)


def _hop_s(job: Job, cluster: Cluster) -> float:
    """Return what sending one micro-batch's rows to the next stage takes: over nodes, where the pipeline needs them."""
    num_bytes = job.num_tokens * job.model.hidden_size * job.dtype_bytes
    is_inside = job.tp * job.pp <= cluster.gpus_per_node and cluster.nodes == 1
    fixed, byte_s = (cluster.inside if is_inside else cluster.between).line(num_bytes)
    return fixed + num_bytes * byte_s


def _once_a_step(job: Job, cluster: Cluster, dp: int, ahead: Sequence[float]) -> tuple[float, float]:
    """Return what summing gradients takes, and what the optimizer and gathering the new weights take after that.

    The optimizer's state is sharded over the data-parallel ranks. Between the two all ranks wait for the norm of all
    gradients.
    ahead: how many seconds every pipeline stage has for its sums before the first stage has done its last backward.
    """
    optimizer = reduction = 0.0
    expert_dp = dp * job.tp // job.ep
    for stage, seconds in enumerate(ahead):
        shared, experts = job.trained_parameters(stage)
        if job.zero == 3:  # every micro-batch has summed its gradients, and gathers weights before it needs them
            own = shared / dp + experts / expert_dp
            optimizer = max(optimizer, copy_s(cluster, (OPTIMIZER_BYTES + GRADIENT_BYTES) * own))
            continue
        rings = [(dp, job.tp, shared), (expert_dp, job.ep, experts)]
        summing = copy_s(cluster, GRADIENT_BYTES * (shared + experts))
        summing += sum(_ring_s(cluster, ranks, stride, MAIN_GRAD_BYTES * number) for ranks, stride, number in rings)
        updating = copy_s(cluster, OPTIMIZER_BYTES * (shared / dp + experts / expert_dp))
        updating += sum(_ring_s(cluster, ranks, stride, job.dtype_bytes * number) for ranks, stride, number in rings)
        reduction, optimizer = max(reduction, summing - seconds), max(optimizer, updating)
    return reduction, optimizer


def _layer_parameters(job: Job, *, is_dense: bool) -> tuple[float, float]:
    """Return how many parameters of a layer a rank computes with: those that all ranks have, and its experts'."""
    model = job.model
    if is_dense:
        return model.dense_parameters / job.tp, 0.0
    return model.other_parameters / job.tp, model.num_experts / job.ep * model.expert_parameters


def _gathering_s(
    job: Job, cluster: Cluster, dp: int, shared: float, experts: float, layer_s: float, exchange: ExchangeTime
) -> float:
    """Return for how long a layer waits for its weights, gathered before each pass, and for the sums of its gradients.

    They travel while layers beside it compute; exchanges of rows need the same links. In a pipeline the weights stay.
    """
    passes = 1 if job.pp > 1 else 3 if job.recompute == "full" else 2
    weights = job.weight_bytes(shared, experts)
    trained = shared, experts
    if job.frozen is not None:
        trained = 0.0, experts / job.model.expert_parameters * job.expert_adapters
    travels = [passes * of + MAIN_GRAD_BYTES * number for of, number in zip(weights, trained, strict=True)]
    rings = [(dp, job.tp, travels[0]), (dp * job.tp // job.ep, job.ep, travels[1])]
    needed = sum(_ring_s(cluster, ranks, stride, num_bytes) for ranks, stride, num_bytes in rings)
    return max(0.0, needed - HIDES_GATHERS * (layer_s - exchange.exposed_s))


def _ring_s(cluster: Cluster, num_ranks: int, stride: int, num_bytes: float) -> float:
    """Return what a reduce-scatter or an all-gather of so many bytes takes over ranks that stand `stride` apart.

    Of a ring's links those between nodes set the pace, which all GPUs of a node share evenly.
    """
    if num_ranks == 1:
        return 0.0
    sent = num_bytes * (num_ranks - 1) / num_ranks
    if num_ranks * stride <= cluster.gpus_per_node:
        return exchange_s(cluster, num_ranks, sent, 0.0)
    near = max(1, cluster.gpus_per_node // stride)  # ranks of the ring on one node share its ports
    fixed, byte_s = cluster.between.line(sent)
    nodes = num_ranks / near
    pace = max(byte_s / near, cluster.inside.line(sent)[1] if near > 1 else 0.0)
    return fixed + nodes * cluster.between.us_per_peer.value * 1e-6 + sent * pace
