"""`tritonmoe probe FILE`: measure this machine, alone or under torchrun, and write FILE for `tritonmoe plan`."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from tritonmoe.runtime.files import write_whole
from tritonmoe.tools.benchmarks.argument_types import Subparsers, output_file, positive
from tritonmoe.tools.benchmarks.ranks import device_and_backend
from tritonmoe.tools.planner.cluster import Cluster
from tritonmoe.tools.planner.cluster_file import read_cluster, to_toml
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.cluster_probe import DTYPES, probe_cluster
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.model_config import MODELS, find_model
from tritonmoe.tools.report.terminal import refused
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser("probe", help="measure this machine for `plan`", description=__doc__)
    parser.add_argument("file", type=output_file, help="the TOML file to write")
    parser.add_argument("model", help=f"model with the sizes to measure: a config.json, or one of {', '.join(MODELS)}")
    parser.add_argument(
        "--cluster",
        default="H100",
        help="cluster with the prices, and with all numbers that are not measured (default H100)",
    )
    parser.add_argument("--tokens", type=positive, default=4096, help="tokens of a micro-batch (default 4096)")
    parser.add_argument("--ep", type=positive, default=1, help="expert-parallel ranks of the plan (default 1)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--timeout-s", type=positive, default=300)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        model = find_model(arguments.model)
        job = Job(model, sequence=arguments.tokens, ep=arguments.ep, dtype=arguments.dtype)
        base = _base(arguments.cluster)
    except (ValueError, OSError) as error:
        return refused("probe", error)
    if "RANK" not in os.environ:
        device, _ = device_and_backend()
        alone = replace(base, nodes=1, gpus_per_node=1)
        _write(arguments.file, probe_cluster(job, alone, None, torch.device(device), print))
        return 0
    with torchrun_ranks(timeout_s=arguments.timeout_s) as ranks:
        device, _ = device_and_backend()
        node_size = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
        transport = ranks.with_nodes(node_size) if 1 < node_size < ranks.size else ranks
        say = print if ranks.rank == 0 else lambda text: None
        found = probe_cluster(job, base, transport, torch.device(device), say, node_size)
        if ranks.rank == 0:
            _write(arguments.file, found)
    return 0


def _base(name: str) -> Cluster:
    cluster = CLUSTERS[name] if name in CLUSTERS else read_cluster(Path(name))
    return replace(cluster, name=f"{cluster.name}, probed")


def _write(path: Path, cluster: Cluster) -> None:
    write_whole(path, to_toml(cluster), "cluster's description")
    print(f"wrote {path}")
