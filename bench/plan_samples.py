"""Published exchanges over several nodes, as bytes that every rank sends."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from bench.published import published
from tritonmoe.tools.planner.cluster import Cluster, Estimate
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.layer_exchange import needs_of
from tritonmoe.tools.planner.model_config import MODELS
from tritonmoe.tools.planner.transformer_model import Model

__all__ = [
    "DECODE",
    "GPU_POSTED_LATENCY_US",
    "PREFILL",
    "ROW_BYTES",
    "UNIFORM",
    "D",
    "Fabric",
    "K",
    "Sample",
    "fabrics",
    "gpu_posted",
    "traffic",
]

MIB = 1 << 20
GPU_POSTED_LATENCY_US = 30.0
PREFILL, DECODE = 4096, 128
"""Tokens of a rank in the tables of DeepEP and its like."""
UNIFORM = replace(MODELS["DeepSeek-V3"], num_groups=1, top_k_groups=1)
D, K = UNIFORM.hidden_size, UNIFORM.top_k
ROW_BYTES = {"fp8": D + 4 * D // 128, "bf16": 2 * D}


def _limited(num_ranks: int) -> Model:
    """Return the routing of DeepEP's test: experts from at most four nodes, each of which is a group.

    Of 256 experts there are as many as can be shared evenly: 240 on 24 ranks.
    """
    nodes = max(1, num_ranks // 8)
    experts = 256 // num_ranks * num_ranks
    return replace(UNIFORM, num_experts=experts, num_groups=nodes, top_k_groups=min(nodes, 4))


@dataclass(frozen=True)
class Traffic:
    """The rows of one rank: to others of its node, its own and relayed ones, and to other nodes."""

    inside: float
    cross: float
    cross_and_own_node: float
    """As libraries count: with the copy that the own node gets."""


def traffic(model: Model, tokens: int, num_ranks: int) -> Traffic:
    needs, nodes = needs_of(model, num_ranks, 8), max(1, num_ranks // 8)
    size = min(8, num_ranks)
    return Traffic(
        nodes * (size - 1) * tokens * needs.of_rank,
        (nodes - 1) * tokens * needs.of_node,
        nodes * tokens * needs.of_node,
    )


def gpu_posted(cluster: Cluster) -> Cluster:
    """Return the cluster for kernels that post their messages from the GPU: a further peer costs nothing."""
    free = Estimate(0.0, "assumed")
    return replace(
        cluster,
        inside=replace(cluster.inside, us_per_peer=free),
        between=replace(cluster.between, us_per_peer=free, latency_us=Estimate(GPU_POSTED_LATENCY_US, "assumed")),
    )


@dataclass(frozen=True)
class Sample:
    """One exchange over several nodes."""

    what: str
    unit: str
    measured: float
    shown: Callable[[float], float]
    """Turns seconds into what the table gives."""
    num_ranks: int
    inside_bytes: float
    cross_bytes: float
    series: str
    """Samples of one series are alike but for the number of nodes."""
    seconds: float

    @property
    def moved_bytes(self) -> float:
        """What kernels that forward move through a GPU: a row inside its node once, one that crosses out and in."""
        return self.inside_bytes + 2 * self.cross_bytes


@dataclass(frozen=True)
class Fabric:
    """The samples of one cluster and library."""

    name: str
    source: str
    cluster: Cluster
    is_nccl: bool
    samples: list[Sample]


def fabrics() -> list[Fabric]:
    return [
        _nccl("nccl_busbw_b300_efa", 56 * MIB, 100.0),
        _nccl("nccl_busbw_h100_efa", 64 * MIB, 50.0),
        _nccl_us(),
        *_deepep_like(),
    ]


PEAK_BYTES = 16 << 30
"""Where a table says "peak": so many bytes that nothing fixed counts."""


def _nccl(name: str, num_bytes: int, gb_per_s: float) -> Fabric:
    table = published(name)
    machine = CLUSTERS["B200-EFA" if "b300" in name else "H100-EFA"]
    cluster = replace(machine, between=replace(machine.between, gb_per_s=gb_per_s))
    samples = []
    for row in table["rows"]:
        ranks = row["ranks"]
        for column, size in (("matched", num_bytes), ("peak", PEAK_BYTES)):
            travelling = size * (ranks - 1) / ranks
            seconds = travelling / (row[column] * 1e9)
            samples.append(
                Sample(
                    f"{ranks} ranks {column}",
                    "GB/s",
                    row[column],
                    lambda s, travelling=travelling: travelling / s / 1e9,  # type: ignore[misc]
                    ranks,
                    size * 7 / ranks,
                    size * (ranks - 8) / ranks,
                    column,
                    seconds,
                )
            )
    machine_name = "B300" if "b300" in name else "H100"
    return Fabric(f"NCCL, {machine_name} EFA", table["source"], cluster, True, samples)


def _nccl_us() -> Fabric:
    """Return torch's all-to-all over InfiniBand, of the rows of 128 tokens and of one."""
    table, samples = published("nccl_all_to_all_h100_cx7"), []
    for row in table["rows"]:
        ranks = row["ep"]
        for column, size in (("us_128tok", 242221056), ("us_1tok", 1892352)):
            us = row[column]
            samples.append(
                Sample(
                    *(f"{ranks} ranks, {size} bytes", "us", us, lambda seconds: 1e6 * seconds, ranks),
                    size * (min(ranks, 8) - 1) / ranks,
                    size * max(0, ranks - 8) / ranks,
                    column,
                    us * 1e-6,
                )
            )
    return Fabric("NCCL, H100 CX7", table["source"], CLUSTERS["H100"], True, samples)


def _deepep_like() -> Iterator[Fabric]:
    """Return the fabrics whose kernels send a token once to every node, and from there to the ranks."""
    v1 = published("deepep_v1_normal_h800_cx7")
    samples = []
    for row in v1["rows"]:
        ep = row["ep"]
        for op, dtype in (("dispatch", "fp8"), ("combine", "bf16")):
            samples.append(_by_rate(f"EP{ep} {op}", op, _limited(ep), ep, dtype, row[f"{op}_gbs"]))
    yield Fabric("DeepEP v1, H800", v1["source"], CLUSTERS["H800"], False, samples)

    uccl = published("uccl_ep_normal")
    for machine, preset in (("p5en", "H200-EFA"), ("p6-b200", "B200-EFA")):
        samples = []
        for row in uccl["rows"]:
            if row["machine"].startswith(machine):
                for op, dtype in (("dispatch", "fp8"), ("combine", "bf16")):
                    ep = row["ep"]
                    samples.append(_by_us(f"EP{ep} {op}", op, _limited(ep), ep, dtype, row[f"{op}_us"]))
        yield Fabric(f"UCCL, {machine}", uccl["source"], CLUSTERS[preset], False, samples)

    v2 = published("deepep_v2_payload_b200_efa")
    samples = [
        _by_us(f"EP{row['ep']} {row['op']}", row["op"], UNIFORM, row["ep"], row["op"].split()[0], row["us"])
        for row in v2["rows"]
    ]
    yield Fabric("DeepEP v2, B200 EFA", v2["source"], CLUSTERS["B200-EFA"], False, samples)

    hybrid = published("hybrid_ep_h100_kernel_only")
    samples = []
    for row in hybrid["rows"]:
        model = replace(UNIFORM, num_experts=8 * row["ranks"])
        for op in ("fp8_dispatch", "bf16_dispatch", "combine"):
            dtype = "fp8" if op.startswith("fp8") else "bf16"
            what = f"EP{row['ranks']} {op} with {row['sms']} SMs"
            samples.append(_by_rate(what, f"{op} {row['sms']}", model, row["ranks"], dtype, row[op]))
    yield Fabric("Hybrid-EP, H100", hybrid["source"], CLUSTERS["H100"], False, samples)


def _by_us(what: str, series: str, model: Model, ep: int, dtype: str, us: float) -> Sample:
    rows = traffic(model, PREFILL, ep)
    inside, cross = rows.inside * ROW_BYTES[dtype], rows.cross * ROW_BYTES[dtype]
    return Sample(what, "us", us, lambda seconds: 1e6 * seconds, ep, inside, cross, series, us * 1e-6)


def _by_rate(what: str, series: str, model: Model, ep: int, dtype: str, gb_per_s: float) -> Sample:
    """Return a sample of which the rate is known: of rows to nodes, the own one too; on one node of rows received."""
    rows = traffic(model, PREFILL, ep)
    counted = rows.cross_and_own_node if ep > 8 else rows.inside * 8 / 7
    num_bytes = counted * ROW_BYTES[dtype]
    return Sample(
        *(what, "GB/s", gb_per_s, lambda seconds: num_bytes / seconds / 1e9, ep),
        rows.inside * ROW_BYTES[dtype],
        rows.cross * ROW_BYTES[dtype],
        series,
        num_bytes / (gb_per_s * 1e9),
    )
