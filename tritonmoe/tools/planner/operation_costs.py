"""What one product, one copy or one exchange takes on a cluster, and what a layer takes beside its experts."""

from collections.abc import Mapping
from functools import partial

from tritonmoe.overlap.simulation.cost_model import LinkCosts
from tritonmoe.tools.planner.cluster import Cluster, Link
from tritonmoe.tools.planner.job import Job

__all__ = [
    "ATTENTION_BACKWARD",
    "FP8_SHARE",
    "MAIN_GRAD_BYTES",
    "QUANTIZING_BYTES",
    "UP_PROJECTIONS",
    "Parts",
    "copy_s",
    "exchange_s",
    "exchanges_s",
    "layer_parts",
    "link_costs",
    "link_like",
    "product_s",
]

MAIN_GRAD_BYTES = 4
"""Gradients of weights are summed in fp32."""
FP8_SHARE = 0.8
"""The share of the peak that products in fp8 reach, over that of products in bf16."""
QUANTIZING_BYTES = 3
"""Read and written for each element that becomes fp8."""


def product_s(
    job: Job,
    cluster: Cluster,
    rows: float,
    inputs: int,
    outputs: int,
    *,
    weight_bytes: float = 0,
    is_wide: bool = False,
) -> float:
    """Return the seconds of one dense product of (rows, inputs) with (inputs, outputs).

    The time for its arithmetic and that for its operands in memory are added, as if it did nothing at once: narrow and
    short products of published tables lie nearer to the sum than to the longer of the two.
    weight_bytes: of one element of the weight, read, or read and written; 0 for the job's dtype.
    is_wide: a product in bf16 where others are in fp8.
    """
    flops = 2 * rows * inputs * outputs
    moved = rows * (inputs + outputs) * job.dtype_bytes + inputs * outputs * (weight_bytes or job.dtype_bytes)
    reached = job.peak_flops(cluster, is_wide=is_wide) * cluster.gpu.gemm_efficiency.value
    if job.dtype == "fp8" and not is_wide:
        reached *= FP8_SHARE
        moved += QUANTIZING_BYTES * rows * inputs
    return flops / reached + copy_s(cluster, moved)


def copy_s(cluster: Cluster, num_bytes: float) -> float:
    """Return the seconds in which a GPU reads or writes so many bytes of its memory."""
    return num_bytes / (cluster.gpu.memory_tb_per_s * 1e12 * cluster.gpu.memory_efficiency.value)


def link_costs(cluster: Cluster, num_ranks: int, inside_bytes: float, cross_bytes: float) -> LinkCosts:
    """Return the link of each of num_ranks ranks that send so many bytes inside their node and to other nodes at once.

    a0 + a_peer * peers + max(inside / (rate * e1), cross / (nic * e2 * (nodes / 2) ** -g)); LinkCosts has one rate, so
    that of all bytes together is given.
    """
    nodes = -(-num_ranks // cluster.gpus_per_node)
    inside, between = cluster.inside, cluster.between
    inside_peers = min(num_ranks, cluster.gpus_per_node) - 1
    fixed, byte_s = inside.line(inside_bytes)
    seconds = inside_bytes * byte_s
    if nodes > 1:
        between_fixed, between_byte_s = between.line(cross_bytes)
        fixed = max(fixed, between_fixed) + (num_ranks - cluster.gpus_per_node) * between.us_per_peer.value * 1e-6
        seconds = max(seconds, cross_bytes * between_byte_s * (nodes / 2) ** between.decay.value)
    fixed += inside_peers * inside.us_per_peer.value * 1e-6
    rate = (inside_bytes + cross_bytes) / seconds if seconds else float("inf")
    slower = inside if nodes == 1 else between
    return link_like(slower, cluster, fixed, rate)


def link_like(link: Link, cluster: Cluster, fixed_s: float, bytes_per_s: float) -> LinkCosts:
    """Return a link of this rate that works as `link` does otherwise."""
    return LinkCosts(fixed_s, bytes_per_s, link.is_shared, link.alone_share, contention=cluster.gpu.contention.value)


def exchange_s(cluster: Cluster, num_ranks: int, inside_bytes: float, cross_bytes: float) -> float:
    """Return the seconds of one exchange alone."""
    return exchanges_s(link_costs(cluster, num_ranks, inside_bytes, cross_bytes), 1, inside_bytes + cross_bytes)


def exchanges_s(link: LinkCosts, count: float, num_bytes: float) -> float:
    """Return the seconds of so many exchanges, each of them alone, that have so many bytes together."""
    return count * link.latency_s + num_bytes / (link.bytes_per_s * link.alone_share)


Parts = Mapping[str, tuple[float, float]]
"""Part of a layer -> seconds of its forward and of its backward."""

UP_PROJECTIONS = "latents' up-projections"
"""The part of the attention projections that recompute="selective" runs again."""
ATTENTION_BACKWARD = 2.5 / 0.77
"""The time of attention's backward over its forward's: five products instead of two, at 0.77 of the rate (fused
attention on H100 and B200: 0.75 to 0.8)."""
NORM_BYTES = 10, 15
"""How often a row's elements are read or written by a layer's two norms and two residual sums, forward and backward."""


def layer_parts(job: Job, cluster: Cluster) -> dict[str, tuple[float, float]]:
    """Return the parts of a layer beside its experts, of which "dense" and "shared" stand for its feed-forward blocks.

    UP_PROJECTIONS are a part of the attention projections. Products are shared by the tensor-parallel ranks; norms and
    the router see the tokens of one of them.
    """
    model, b = job.model, job.dtype_bytes
    d, tokens = model.hidden_size, job.num_tokens
    rows = tokens * job.tp  # a tensor-parallel rank computes all rows with its share of the columns
    copy = partial(copy_s, cluster)

    def products(shapes: list[tuple[int, int]], shared_by: int, *, is_wide: bool = False) -> tuple[float, float]:
        own, product = rows if shared_by > 1 else tokens, partial(product_s, job, cluster, is_wide=is_wide)
        forward = sum(product(own, i, o) for i, o in shapes) / shared_by
        if job.frozen is not None:
            return forward, forward
        gradients = sum(product(own, i, o, weight_bytes=2 * MAIN_GRAD_BYTES) for i, o in shapes) / shared_by
        return forward, forward + gradients

    def block(width: int, shared_by: int) -> tuple[float, float]:
        """Return a gated feed-forward block; its activation reads 2F and writes F columns, its gradient 3F and 2F."""
        forward, backward = products([(d, 2 * width), (width, d)], shared_by)
        columns = tokens * width * b
        return forward + copy(3 * columns), backward + copy(5 * columns)

    attention = model.attention
    core_flops = tokens * model.attention_flops(job.sequence) / model.num_layers
    core = core_flops / (job.peak_flops(cluster, is_wide=True) * cluster.gpu.attention_efficiency.value)
    rope = copy(2 * tokens * attention.rope_width * b)
    router, router_back = products([(d, model.num_experts)], 1, is_wide=True)
    scores = copy(6 * 4 * tokens * model.num_experts)
    gathered = tokens * (job.tp - 1) * d * b
    gather = exchange_s(cluster, job.tp, gathered, 0.0) if job.tp > 1 else 0.0
    return {
        "attention projections": products(attention.products(d), job.tp),
        UP_PROJECTIONS: (products(attention.up_projections(d), job.tp)[0], 0.0),
        "attention core": (core, core * ATTENTION_BACKWARD),
        "norms and rotations": tuple(copy(n * tokens * d * b) + rope for n in NORM_BYTES),  # type: ignore[dict-item]
        "tensor-parallel gathers": (2 * gather, 2 * gather),
        "dense": block(model.dense_size, job.tp),
        "shared": block(model.shared_size, 1) if model.shared_size else (0.0, 0.0),
        "router": (router + scores, router_back + scores),
    }
