"""Published steps of whole trainings as jobs that the planner knows: bench/results/published_steps.json and others."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.published import published
from tritonmoe.tools.planner.cluster import Cluster
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.job import UNKNOWN_IMBALANCE, Job, trained_by
from tritonmoe.tools.planner.model_config import MODELS

__all__ = ["HELD_OUT", "PublishedStep", "published_steps"]

FILE = Path(__file__).parent / "results" / "published_steps.json"
HELD_OUT = ("NeMo AutoModel", "torchtitan, B200", "ms-swift, A800")
"""The families that were not looked at while the model was first made. That a host adds to a layer came from all."""
FREE_ROUTING = ("torchtitan, B200", "ms-swift, A800")
"""The families of which nothing balances the routing."""
FEWER_GPUS = {"GB200": 64, "GB300": 64}
"""Machine -> the GPUs of one node that published runs use."""


@dataclass(frozen=True)
class PublishedStep:
    """One row: a job on a cluster, and what its step took."""

    family: str
    source: str
    what: str
    job: Job
    cluster: Cluster
    measured_s: float

    @property
    def tokens(self) -> int:
        return self.job.tokens_per_step(self.cluster)

    @property
    def num_levels(self) -> int:
        """2 where rows cross nodes: DeepEP and HybridEP send a row once to a node, which passes it on to its ranks."""
        return 1 if self.job.sends_pairs or self.job.ep <= self.cluster.gpus_per_node else 2


def published_steps() -> list[PublishedStep]:
    """Return every row of every family."""
    found = []
    for family, about in json.loads(FILE.read_text()).items():
        for values in about["rows"]:
            row = dict(zip(about["columns"], values, strict=True))
            found.append(_step(family, about, row))
    return found + _four_layers()


def _step(family: str, about: dict[str, Any], row: dict[str, Any]) -> PublishedStep:
    machine = CLUSTERS[row["machine"]]
    node = min(row["gpus"], FEWER_GPUS.get(row["machine"], machine.gpus_per_node))
    cluster = replace(machine, gpus_per_node=node, nodes=row["gpus"] // node)
    job = Job(
        MODELS[row["model"]],
        row["sequence"],
        row["micro_batch"],
        tp=row["tp"],
        pp=row["pp"],
        stages_in_turn=_pieces(row),
        ep=row["ep"],
        recompute=row["recompute"],
        dtype=row["dtype"],
        two_batches="two halves" in row["note"],
        cuda_graphs="CUDA graphs" in row["note"],
    )
    job = replace(job, micro_batches=row["global_batch"] // (row["micro_batch"] * job.dp(cluster)))
    if "free routing" in row["note"] or family in FREE_ROUTING:
        job = replace(job, imbalance=UNKNOWN_IMBALANCE)
    name = "deepspeed" if row["note"] == "deepspeed" else about["trainer"]
    job = trained_by(job, name, row["sends"], about.get("zero"))
    if row["unit"] == "s":
        measured_s = row["measured"]
    else:
        measured_s = job.tokens_per_step(cluster) / cluster.num_gpus / row["measured"]
    note = f", {row['note']}" if row["note"] else ""
    what = (
        f"{row['model']}, {row['gpus']} {row['machine']}, tp {job.tp}, pp {job.pp}, ep {job.ep}, "
        f"{job.sequence} x {job.micro_batch}, {job.dtype}, recompute {job.recompute}{note}"
    )
    return PublishedStep(family, about["source"], what, job, cluster, measured_s)


def _pieces(row: dict[str, Any]) -> int:
    """Return into how many pieces a stage is cut; published is sometimes more than the layers allow."""
    return max(1, min(row["stages_in_turn"], MODELS[row["model"]].num_layers // row["pp"])) if row["pp"] > 1 else 1


def _four_layers() -> list[PublishedStep]:
    """Models cut to four layers, one of them dense; experts padded to a capacity factor of 1, so balanced."""
    table, found = published("simumax_b200_moe_step"), []
    cluster = replace(CLUSTERS["B200"], nodes=1)
    for row in table["rows"]:
        name = {"deepseekv2": "DeepSeek-V2", "deepseekv3": "DeepSeek-V3"}[row["model"]]
        model = replace(MODELS[name], num_layers=4, num_dense_layers=1, num_groups=1, top_k_groups=1)
        job = Job(model, 4096, 1, row["mbc"], pp=row["pp"], ep=row["ep"], overlaps_reduction=False)
        what = f"{name} of 4 layers, 8 B200, pp {row['pp']}, ep {row['ep']}, {row['mbc']} micro-batches"
        found.append(
            PublishedStep(
                *("Megatron, four layers on B200", table["source"], what),
                *(trained_by(job, "megatron"), cluster, row["real_ms"] * 1e-3),
            )
        )
    return found
