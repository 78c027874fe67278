"""Published exchanges against the planner: rows and bytes, one node, and how a link gets slower with more nodes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bench.published import Row, Table, published
from tritonmoe.planner.cluster import Cluster, Estimate
from tritonmoe.planner.cluster_presets import CLUSTERS
from tritonmoe.planner.model import Model
from tritonmoe.planner.model_presets import MODELS
from tritonmoe.planner.operation_costs import exchange_s
from tritonmoe.planner.routed_rows import needs_of

__all__ = ["link_tables"]

MIB = 1 << 20
PREFILL, DECODE = 4096, 128
"""Tokens of a rank in the tables of DeepEP and its like."""
HEADER_BYTES, METADATA_BYTES = 32, 64
"""Of a row there, found in one row of a table: a header, and with a dispatch 8 ids and 8 weights of 4 bytes."""
UNIFORM = replace(MODELS["DeepSeek-V3"], num_groups=1, top_k_groups=1)
D, K = UNIFORM.hidden_size, UNIFORM.top_k
ROW_BYTES = {"fp8": D + 4 * D // 128, "bf16": 2 * D}


def link_tables() -> list[Table]:
    """Give every table of exchanges."""
    return [_rows(), _bytes(), _one_node(), _low_latency(), *_with_nodes(), _skewed()]


def _limited(num_ranks: int) -> Model:
    """Give the routing of DeepEP's test: experts from at most four nodes, each of which is a group.

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


def _traffic(model: Model, tokens: int, num_ranks: int) -> Traffic:
    needs, nodes = needs_of(model, num_ranks, 8), max(1, num_ranks // 8)
    size = min(8, num_ranks)
    return Traffic(
        nodes * (size - 1) * tokens * needs.of_rank,
        (nodes - 1) * tokens * needs.of_node,
        nodes * tokens * needs.of_node,
    )


def _rows() -> Table:
    payload, mori = published("deepep_v2_payload_b200_efa"), published("mori_token_counts")
    rows = [
        Row(
            f"EP{row['ep']} {row['op']}: rows that a rank sends inside its node",
            "rows",
            row["payload_bytes"] / row["row_bytes(derived)"],
            _traffic(UNIFORM, PREFILL, row["ep"]).inside,
        )
        for row in payload["rows"]
    ]
    needs = needs_of(UNIFORM, 16, 8)
    counts = mori["values"]
    rows += [
        Row("EP16 rows to nodes", "rows", counts["rdma_tokens_algo"], 2 * PREFILL * needs.of_node),
        Row("EP16 rows received", "rows", counts["recv_tokens_rank8"], 16 * PREFILL * needs.of_rank),
    ]
    return Table("Received rows", f"{payload['source']} and {mori['source']}", "nothing", rows, worst_target=0.0015)


def _bytes() -> Table:
    payload = published("deepep_v2_payload_b200_efa")
    rows = []
    for row in payload["rows"]:
        dtype, op = row["op"].split()
        per_row = ROW_BYTES[dtype] + HEADER_BYTES + METADATA_BYTES * (op == "dispatch")
        predicted = _traffic(UNIFORM, PREFILL, row["ep"]).inside * per_row
        rows.append(Row(f"EP{row['ep']} {row['op']}", "B", row["payload_bytes"], predicted))
    fitted = "the 32 bytes of header of a row; ids and weights are 64 more in a dispatch"
    return Table("Bytes", payload["source"], fitted, rows, worst_target=0.001)


def _one_node() -> Table:
    """NCCL on one node: a line through the largest exchange of each of the two sweeps."""
    table = published("nccl_all_to_all_8xH20_nvlink")
    points = [(row["bytes"], row["us"], row["std_us"]) for row in table["rows"]]
    chosen = [points[6], points[-1]]
    (x0, y0, _), (x1, y1, _) = chosen
    sent = 7 / 8  # a rank's own share doesn't travel
    byte_us = (y1 - y0) / (x1 - x0) / sent
    cluster = replace(CLUSTERS["H200"], nodes=1)
    efficiency = 1 / (byte_us * 1e-6 * cluster.inside.gb_per_s * 1e9)
    inside = replace(
        cluster.inside,
        efficiency=Estimate(efficiency, "measured"),
        latency_us=Estimate(y0 - byte_us * x0 * sent, "measured"),
        us_per_peer=Estimate(0.0, "measured"),
    )
    cluster = replace(cluster, inside=inside)
    rows = [
        Row(
            f"{num_bytes} bytes",
            "us",
            us,
            1e6 * exchange_s(cluster, 8, num_bytes * sent, 0.0),
            (num_bytes, us, std) in chosen,
            f"own standard deviation {std / us:.0%}",
        )
        for num_bytes, us, std in points
    ]
    return Table(
        *("NCCL on one node", table["source"], "latency and rate, to the largest exchange of each of the two sweeps"),
        rows,
        worst_target=0.1,
        judged="7.5 MB and above",
        excluded=frozenset(f"{num_bytes} bytes" for num_bytes, _, _ in points if num_bytes < 7.5e6),
    )


def _low_latency() -> Table:
    """DeepEP's low-latency kernels send every pair, and post from the GPU, so that a further peer costs nothing."""
    table = published("deepep_v1_low_latency_h800_cx7")
    cluster = _gpu_posted(CLUSTERS["H800"])
    rows = []
    for row in table["rows"]:
        ep = row["ep"]
        for op, dtype in (("dispatch", "fp8"), ("combine", "bf16")):
            pairs = DECODE * K * ROW_BYTES[dtype]
            inside, cross = pairs * (min(ep, 8) - 1) / ep, pairs * max(0, ep - 8) / ep
            predicted = 1e6 * exchange_s(cluster, ep, inside, cross)
            rows.append(Row(f"EP{ep} {op}", "us", row[f"{op}_us"], predicted))
    return Table("DeepEP, low latency, H800", table["source"], "nothing: the preset H800, no cost per peer", rows)


def _gpu_posted(cluster: Cluster) -> Cluster:
    """Give the cluster for kernels that post their messages from the GPU: a further peer costs nothing."""
    free = Estimate(0.0, "assumed")
    return replace(
        cluster,
        inside=replace(cluster.inside, us_per_peer=free),
        between=replace(cluster.between, us_per_peer=free),
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


def _fabrics() -> list[Fabric]:
    return [
        _nccl("nccl_busbw_b300_efa", 56 * MIB, 100.0),
        _nccl("nccl_busbw_h100_efa", 64 * MIB, 50.0),
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


def _deepep_like() -> Iterator[Fabric]:
    """Give the fabrics whose kernels send a token once to every node, and from there to the ranks."""
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
    traffic = _traffic(model, PREFILL, ep)
    inside, cross = traffic.inside * ROW_BYTES[dtype], traffic.cross * ROW_BYTES[dtype]
    return Sample(what, "us", us, lambda seconds: 1e6 * seconds, ep, inside, cross, series, us * 1e-6)


def _by_rate(what: str, series: str, model: Model, ep: int, dtype: str, gb_per_s: float) -> Sample:
    """Give a sample of which the rate is known: of rows to nodes, the own one too; on one node of rows received."""
    traffic = _traffic(model, PREFILL, ep)
    counted = traffic.cross_and_own_node if ep > 8 else traffic.inside * 8 / 7
    num_bytes = counted * ROW_BYTES[dtype]
    return Sample(
        *(what, "GB/s", gb_per_s, lambda seconds: num_bytes / seconds / 1e9, ep),
        traffic.inside * ROW_BYTES[dtype],
        traffic.cross * ROW_BYTES[dtype],
        series,
        num_bytes / (gb_per_s * 1e9),
    )


@dataclass(frozen=True)
class Defaults:
    """What all fabrics are taken to have in common. The numbers here are fitted to all, and those of the presets."""

    efficiency: float = 0.87
    decay: float = 0.03
    nccl_latency_us: float = 120.0
    nccl_us_per_peer: float = 0.9


STEPS = Defaults(0.01, 0.01, 10.0, 0.1)
LEAST, MOST = Defaults(0.5, 0.0, 0.0, 0.0), Defaults(1.0, 0.4, 400.0, 3.0)
GPU_POSTED_LATENCY_US = 30.0


def _seconds(fabric: Fabric, sample: Sample, defaults: Defaults, moved_gb_per_s: float | None) -> float:
    """Give what is predicted. moved_gb_per_s: what kernels that forward move, where their own two-node row said so."""
    cluster = fabric.cluster if fabric.is_nccl else _gpu_posted(fabric.cluster)
    between, inside, inside_bytes = cluster.between, cluster.inside, sample.inside_bytes
    between = replace(
        between,
        efficiency=Estimate(defaults.efficiency, "assumed"),
        decay=Estimate(defaults.decay, "assumed"),
        latency_us=Estimate(defaults.nccl_latency_us if fabric.is_nccl else GPU_POSTED_LATENCY_US, "assumed"),
        us_per_peer=Estimate(defaults.nccl_us_per_peer if fabric.is_nccl else 0.0, "assumed"),
    )
    if moved_gb_per_s is not None:
        inside = replace(inside, gb_per_s=moved_gb_per_s, efficiency=Estimate(1.0, "measured"))
        inside_bytes = sample.moved_bytes
    cluster = replace(cluster, between=between, inside=inside)
    return exchange_s(cluster, sample.num_ranks, inside_bytes, sample.cross_bytes)


def _moved_rates(fabric: Fabric) -> dict[str, float]:
    """Give the GB/s that a GPU moves in each series of kernels that forward, from its row of two nodes."""
    if fabric.is_nccl:
        return {}
    return {
        sample.series: sample.moved_bytes / (sample.seconds - GPU_POSTED_LATENCY_US * 1e-6) / 1e9
        for sample in fabric.samples
        if sample.num_ranks == 16
    }


def _fit(fabrics: Sequence[Fabric]) -> Defaults:
    """Give the defaults with the least mean error of logarithms, over all rows of three nodes and more.

    Every fabric counts the same. A search that changes one number at a time by a step, as long as that helps.
    """

    def loss(defaults: Defaults) -> float:
        total = 0.0
        for fabric in fabrics:
            rates = _moved_rates(fabric)
            errors = [
                abs(math.log(_seconds(fabric, sample, defaults, rates.get(sample.series)) / sample.seconds))
                for sample in fabric.samples
                if sample.num_ranks > 16
            ]
            total += sum(errors) / len(errors)
        return total

    best, least = Defaults(), loss(Defaults())
    improved = True
    while improved:
        improved = False
        for name in vars(best):
            for sign in (-1, 1):
                value = getattr(best, name) + sign * getattr(STEPS, name)
                if getattr(LEAST, name) <= value <= getattr(MOST, name):
                    tried = replace(best, **{name: round(value, 6)})
                    if (found := loss(tried)) < least - 1e-9:
                        best, least, improved = tried, found, True
    return best


def _with_nodes() -> Iterator[Table]:
    """Give a table for every fabric, with defaults that were fitted to the others."""
    fabrics = _fabrics()
    for fabric in fabrics:
        defaults = _fit([other for other in fabrics if other is not fabric])
        rates = _moved_rates(fabric)
        rows, excluded = [], set()
        for sample in fabric.samples:
            moved = rates.get(sample.series) if sample.num_ranks > 8 else None
            predicted = _seconds(fabric, sample, defaults, moved)
            is_fitted = sample.num_ranks == 16 and sample.series in rates
            note = ""
            if sample.num_ranks <= 8:
                note = "one node: the preset's link inside"
            elif sample.seconds <= 400e-6:
                note = "400 us or less"
            if note:
                excluded.add(sample.what)
            rows.append(Row(sample.what, sample.unit, sample.measured, sample.shown(predicted), is_fitted, note))
        fitted = (
            f"to the other fabrics' rows of more than two nodes: efficiency {defaults.efficiency:.2f}, decay "
            f"{defaults.decay:.2f}, NCCL's latency {defaults.nccl_latency_us:.0f} us and "
            f"{defaults.nccl_us_per_peer:.1f} us per peer; "
            + ("nothing to its own" if fabric.is_nccl else "to its own rows of two nodes: how fast rows are moved")
        )
        yield Table(
            *(f"Decay with nodes: {fabric.name}", fabric.source, fitted, rows, 0.15, 0.25),
            "several nodes, above 400 us, nothing fitted",
            frozenset(excluded),
        )


def _skewed() -> Table:
    table = published("deepspeed_autoep_skewed_replay")
    note = "the model's sizes, the tokens and how many layers' exchanges were summed are not published"
    rows = [
        Row(f"{row['routing']}, {kind}", "ms", row[f"{kind}_ms"], None, note=note)
        for row in table["rows"]
        for kind in ("nccl", "deepep")
    ]
    return Table("Skewed routing, DeepSpeed", table["source"], "nothing", rows)
