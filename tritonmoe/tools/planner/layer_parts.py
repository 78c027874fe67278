"""layer_parts: what a layer takes beside its experts, from the sizes of its products and rows."""

from collections.abc import Mapping
from functools import partial

from tritonmoe.tools.planner.cluster import Cluster
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.operation_costs import MAIN_GRAD_BYTES, copy_s, exchange_s, product_s

__all__ = ["ATTENTION_BACKWARD", "Parts", "layer_parts"]

Parts = Mapping[str, tuple[float, float]]
"""Part of a layer -> seconds of its forward and of its backward."""

ATTENTION_BACKWARD = 2.5 / 0.77
"""The time of attention's backward over its forward's: five products instead of two, at 0.77 of the rate (fused
attention on H100 and B200: 0.75 to 0.8)."""
NORM_BYTES = 10, 15
"""How often a row's elements are read or written by a layer's two norms and two residual sums, forward and backward."""


def layer_parts(job: Job, cluster: Cluster) -> dict[str, tuple[float, float]]:
    """Return the parts of a layer beside its experts, of which "dense" and "shared" stand for its feed-forward blocks.

    Products are shared by the tensor-parallel ranks; norms and the router see the tokens of one of them.
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
        "attention core": (core, core * ATTENTION_BACKWARD),
        "norms and rotations": tuple(copy(n * tokens * d * b) + rope for n in NORM_BYTES),  # type: ignore[dict-item]
        "tensor-parallel gathers": (2 * gather, 2 * gather),
        "dense": block(model.dense_size, job.tp),
        "shared": block(model.shared_size, 1) if model.shared_size else (0.0, 0.0),
        "router": (router + scores, router_back + scores),
    }
