"""Published exchanges against the planner: rows and bytes, one node, kernels of low latency."""

from dataclasses import replace

from bench.plan_fabrics import fabric_tables
from bench.plan_samples import DECODE, PREFILL, ROW_BYTES, UNIFORM, K, gpu_posted, traffic
from bench.published import Row, Table, published
from tritonmoe.tools.planner.cluster import Estimate
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.layer_exchange import needs_of
from tritonmoe.tools.planner.operation_costs import exchange_s

__all__ = ["link_tables"]

HEADER_BYTES, METADATA_BYTES = 32, 64
"""Of a row there, found in one row of a table: a header, and with a dispatch 8 ids and 8 weights of 4 bytes."""


def link_tables() -> list[Table]:
    """Return every table of exchanges."""
    return [_rows(), _bytes(), _one_node(), _low_latency(), *fabric_tables(), _skewed()]


def _rows() -> Table:
    payload, mori = published("deepep_v2_payload_b200_efa"), published("mori_token_counts")
    rows = [
        Row(
            f"EP{row['ep']} {row['op']}: rows that a rank sends inside its node",
            "rows",
            row["payload_bytes"] / row["row_bytes(derived)"],
            traffic(UNIFORM, PREFILL, row["ep"]).inside,
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
        predicted = traffic(UNIFORM, PREFILL, row["ep"]).inside * per_row
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
            us * 1e-6,
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
    cluster = gpu_posted(CLUSTERS["H800"])
    rows = []
    for row in table["rows"]:
        ep = row["ep"]
        for op, dtype in (("dispatch", "fp8"), ("combine", "bf16")):
            pairs = DECODE * K * ROW_BYTES[dtype]
            inside, cross = pairs * (min(ep, 8) - 1) / ep, pairs * max(0, ep - 8) / ep
            predicted = 1e6 * exchange_s(cluster, ep, inside, cross)
            rows.append(Row(f"EP{ep} {op}", "us", row[f"{op}_us"], predicted, seconds=row[f"{op}_us"] * 1e-6))
    return Table("DeepEP, low latency, H800", table["source"], "nothing: the preset H800, no cost per peer", rows)


def _skewed() -> Table:
    table = published("deepspeed_autoep_skewed_replay")
    note = "the model's sizes, the tokens and how many layers' exchanges were summed are not published"
    rows = [
        Row(f"{row['routing']}, {kind}", "ms", row[f"{kind}_ms"], None, note=note)
        for row in table["rows"]
        for kind in ("nccl", "deepep")
    ]
    return Table("Skewed routing, DeepSpeed", table["source"], "nothing", rows)
