"""Published grouped products, and steps and memory of models cut to four layers, against the planner."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.published import Row, Table, published
from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.tools.planner.cluster import Cluster, Estimate
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.draws import Drawn
from tritonmoe.tools.planner.exchange_curve import ExchangeCurve
from tritonmoe.tools.planner.job import UNKNOWN_IMBALANCE, Job, trained_by
from tritonmoe.tools.planner.job_memory import memory_gib
from tritonmoe.tools.planner.model_config import MODELS
from tritonmoe.tools.planner.operation_costs import copy_s
from tritonmoe.tools.planner.step import step_time

__all__ = ["four_layer_tables"]

FAMILIES = {"deepseekv2": ("DeepSeek-V2", 0.1), "deepseekv3": ("DeepSeek-V3", 0.05)}
"""Name in the table -> preset, and the target for the largest error."""
PLAIN = OverlapPlan((1,), local_first=False, serial=True)
"""What Megatron-LM's all-to-all dispatcher does: nothing overlaps."""
MACHINE = replace(CLUSTERS["B200"], nodes=1)


def four_layer_tables() -> Iterator[Table]:
    """Return grouped products, and for each family of models cut to four layers a table of steps and one of memory."""
    yield _grouped_products()
    yield _exposed_shares()
    table = published("simumax_b200_moe_step")
    for family, (preset, target) in FAMILIES.items():
        own = [row for row in table["rows"] if row["model"] == family]
        first = own[0]
        machine = _calibrate(preset, first)
        rows = [
            Row(
                _what(row),
                "ms",
                row["real_ms"],
                1e3 * step_time(_job(preset, row), machine, 1, PLAIN).step_s,
                row is first,
                f"SimuMax {row['simumax_ms'] / row['real_ms'] - 1:+.1%}",
            )
            for row in own
        ]
        host_us = machine.host.us_per_layer.value
        fitted = f"{host_us:.0f} us that the host adds to a layer (host.us_per_layer), to the first row"
        yield Table(f"Steps of {preset}, 4 layers", table["source"], fitted, rows, worst_target=target)
        memory = [
            Row(_what(row), "GiB", row["real_gib"], memory_gib(_job(preset, row), MACHINE))
            for row in own
            if row["mbc"] == 4
        ]
        yield Table(f"Memory of {preset}, 4 layers", table["source"], "nothing", memory)


def _exposed_shares() -> Table:
    """How much of its exchanges torchtitan doesn't hide, one batch after the other or two halves in turn."""
    table = published("torchtitan_ep16_overlap_trace")
    job = trained_by(Job(MODELS["DeepSeek-V2-Lite"], 4096, 4, ep=16, recompute="selective"), "torchtitan")
    cluster, rows = CLUSTERS["H100"].with_nodes(2), []
    for row in table["rows"]:
        own = replace(job, two_batches=row["variant"] != "no-overlap")
        if row["routing"] != "forced-balanced":
            own = replace(own, imbalance=UNKNOWN_IMBALANCE)
        curve = ExchangeCurve(own, cluster, 1, PLAIN)
        found = Drawn.of(own, cluster, (curve, curve))
        share = 100 * found.time.exposed_s / found.exchange_s
        rows.append(Row(f"{row['routing']}, {row['variant']}", "%", row["not_hidden_percent"], share))
    fitted = "that an eighth stays exposed at the ends, to the rows of forced balance in halves"
    return Table("Exposed exchanges, torchtitan", table["source"], fitted, rows)


def _grouped_products() -> Table:
    """Grouped products: the time for arithmetic and that for operands in memory, added."""
    table, gpu = published("simumax_b200_grouped_products"), CLUSTERS["B200"].gpu
    rows = []
    for row in table["rows"]:
        experts, each, outputs, inputs = (row[name] for name in ("experts", "rows", "outputs", "inputs"))
        weight_bytes = 2 if row["pass"] != "weight gradient" else 8 if row["gradient"] == "fp32" else 4
        peak_s = 2 * experts * each * outputs * inputs / (gpu.tflops["bf16"] * 1e12)
        moved = experts * (outputs * inputs * weight_bytes + 2 * each * (outputs + inputs))
        predicted = peak_s / (peak_s / gpu.grouped_efficiency.value + copy_s(CLUSTERS["B200"], moved))
        what = f"{experts} x {each} rows, {inputs} to {outputs}, {row['pass']}, {row['gradient']}"
        rows.append(Row(what, "%", 100 * row["efficiency"], 100 * predicted))
    fitted = "the preset B200's grouped and memory efficiency, 0.54 and 0.7, to all of them"
    return Table("Grouped products, B200", table["source"], fitted, rows)


def _what(row: dict[str, Any]) -> str:
    return f"ep {row['ep']}, pp {row['pp']}, {row['mbc']} micro-batches"


def _job(preset: str, row: dict[str, Any]) -> Job:
    """Return the job: one dense layer, experts padded to a capacity factor of 1, so balanced, every pair sent."""
    model = replace(MODELS[preset], num_layers=4, num_dense_layers=1, num_groups=1, top_k_groups=1)
    job = Job(model, 4096, 1, row["mbc"], pp=row["pp"], ep=row["ep"], overlaps_reduction=False)
    return trained_by(job, "megatron")


def _calibrate(preset: str, row: dict[str, Any]) -> Cluster:
    """Return the machine with the host's time of a layer with which the row's time comes out, which grows with it."""

    def machine(us: float) -> Cluster:
        return replace(MACHINE, host=replace(MACHINE.host, us_per_layer=Estimate(us, "measured")))

    none, some = (1e3 * step_time(_job(preset, row), machine(us), 1, PLAIN).step_s for us in (0.0, 1000.0))
    return machine(max(0.0, 1000 * (row["real_ms"] - none) / (some - none)))
