"""Common machines as a Cluster: peaks from data sheets, efficiencies assumed."""

import re
from dataclasses import replace

from tritonmoe.ops.kernels.gpus import CARDS, architecture_like
from tritonmoe.tools.planner.cluster import BetweenLink, Cluster, Estimate, Gpu, Host, Link

__all__ = ["CLUSTERS", "NETWORKS", "REMARKS", "network_in", "with_network"]


def _assumed(value: float) -> Estimate:
    return Estimate(value, "assumed")


HOST = Host(us_per_layer=_assumed(4000.0), us_per_chunk=_assumed(30.0), ms_per_step=_assumed(20.0))
"""The time of a layer is that of published steps with few and with many tokens in a micro-batch, of one model and one
kind of machine: a part that doesn't shrink with the tokens, beside what the GPU computes (`python -m bench.plan_steps`
names the rows)."""
CX7 = BetweenLink(
    gb_per_s=50.0,
    efficiency=_assumed(0.87),
    latency_us=_assumed(50.0),
    us_per_peer=_assumed(0.3),
    decay=_assumed(0.03),
)
"""One port of 400 Gbit/s a GPU. Efficiency, decay and the cost per peer are those that published all-to-alls over 3 to
32 nodes have in common (`python -m bench.plan` fits them, there with each cluster left out of its own prediction)."""
EFA = replace(CX7, latency_us=_assumed(120.0))
TCP = replace(CX7, efficiency=Estimate(0.12, "assumed", 2.0), latency_us=_assumed(150.0))
"""The same port where NCCL finds no RDMA: a 25th of the data sheet was published, a third is what good hosts reach."""
NETWORKS = ("rdma", "sockets")
SAID = (  # by a line of NCCL's log, a variable or its value; the first that is there
    ("sockets", r"(?i)using network socket\b|NCCL_IB_DISABLE\W+1|NCCL_NET\W+socket\b"),
    ("rdma", r"(?i)using network (?:ib|ibext\w*|aws libfabric|libfabric|ofi|gib)\b|NCCL_NET\W+(?:ib|ibext\w*|aws)\b"),
    ("sockets", r"NET/Socket ?: Using"),
    ("rdma", r"NET/(?:IB|OFI|IBext\w*) ?: (?:Using|Selected)"),
)
RDMA_SPREAD = 0.25
"""How far the efficiency between nodes may be from what published all-to-alls over RDMA reach."""
IB200 = replace(CX7, gb_per_s=25.0)


def _nvlink(gb_per_s: float) -> Link:
    """Return a link of which an all-to-all reaches about two thirds: 0.67 on H20, 0.6 on B200, 0.78 on H800."""
    return Link(gb_per_s=gb_per_s, efficiency=_assumed(0.65), latency_us=_assumed(25.0), us_per_peer=_assumed(0.5))


def _gpu(name: str, *shares: float) -> Gpu:
    """Return a GPU with its card's facts. A data sheet's GB of memory are 2**30 bytes: cards show 1 % less than those.

    shares: efficiencies of dense products, grouped ones and attention.
    """
    card, efficiencies = CARDS[name], map(_assumed, (*shares, 0.7, 0.1))
    of_codes = dict.fromkeys(architecture_like(card.architecture).precisions, card.tflops.get("fp8", 0.0))
    return Gpu(card.memory_gb, card.memory_tb_per_s, {**card.tflops, **of_codes}, *efficiencies)


def network_in(text: str) -> str | None:
    """Return over what NCCL runs between nodes, as its log or its variables say: rdma or sockets; None: they don't."""
    return next((kind for kind, words in SAID if re.search(words, text)), None)


def with_network(cluster: Cluster, kind: str) -> Cluster:
    """Return the cluster with what is known of such a network; what was measured of it stays.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in NETWORKS:
        raise ValueError(f"the network between nodes is one of {', '.join(NETWORKS)}, got {kind!r}")
    between = cluster.between
    if between.efficiency.source != "assumed":
        return cluster
    if kind == "rdma":
        return replace(cluster, between=replace(between, efficiency=replace(CX7.efficiency, spread=RDMA_SPREAD)))
    return replace(cluster, between=replace(between, efficiency=TCP.efficiency, latency_us=TCP.latency_us))


CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        Cluster("H100", 8, 8, 2.5, 0, _gpu("H100", 0.7, 0.6, 0.55), _nvlink(450), CX7, HOST),
        Cluster("H200", 8, 8, 3.0, 0, _gpu("H200", 0.7, 0.6, 0.55), _nvlink(450), CX7, HOST),
        Cluster("H800", 8, 8, 2.0, 0, _gpu("H100", 0.7, 0.6, 0.55), _nvlink(200), CX7, HOST),
        Cluster("A100", 8, 8, 1.5, 0, _gpu("A100", 0.75, 0.6, 0.6), _nvlink(300), IB200, HOST),
        Cluster("A800", 8, 8, 1.4, 0, _gpu("A100", 0.75, 0.6, 0.6), _nvlink(200), IB200, HOST),
        Cluster("B200", 8, 8, 4.5, 0, _gpu("B200", 0.55, 0.54, 0.42), _nvlink(900), CX7, HOST),
        Cluster("MI300X", 8, 8, 2.0, 0, _gpu("MI300X", 0.5, 0.45, 0.35), _nvlink(448), CX7, HOST),
    )
}
CLUSTERS |= {
    name: replace(CLUSTERS[machine], name=name, between=between)
    for name, machine, between in (
        ("H100-EFA", "H100", EFA),
        ("H200-EFA", "H200", EFA),
        ("B200-EFA", "B200", EFA),
        ("H100-100G", "H100", replace(CX7, gb_per_s=12.5)),
        ("H100-TCP", "H100", TCP),
    )
}
CLUSTERS |= {
    name: replace(
        CLUSTERS["B200"], name=name, nodes=1, gpus_per_node=72, usd_per_gpu_hour=usd, gpu=_gpu(name, 0.55, 0.54, 0.42)
    )
    for name, usd in (("GB200", 5.0), ("GB300", 6.0))
}
"""Racks of 72 GPUs behind one NVLink switch."""
REMARKS = {
    "usd_per_gpu_hour": "assumed: put your own",
    "gpu.tflops": "data sheet, without sparsity",
    "gpu.memory_gib": "data sheet",
    "gpu.memory_tb_per_s": "data sheet",
    "inside.gb_per_s": "data sheet: half of the bidirectional figure",
    "between.gb_per_s": "port speed: 400 Gbit/s are 50",
}
