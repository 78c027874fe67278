"""`tritonmoe plan`: predict how long a training step of a model takes on a cluster, and find the best layout."""

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from tritonmoe.config.precision import BLOCKS
from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.tools.benchmarks.argument_types import (
    Subparsers,
    output_file,
    positive,
    positive_number,
    report_file,
)
from tritonmoe.tools.planner.break_even import break_even_table
from tritonmoe.tools.planner.cluster import DTYPE_BYTES, Cluster
from tritonmoe.tools.planner.cluster_file import read_cluster, to_toml
from tritonmoe.tools.planner.cluster_presets import CLUSTERS, NETWORKS, REMARKS, network_in, with_network
from tritonmoe.tools.planner.comparison import Equal, compare
from tritonmoe.tools.planner.job import FROZEN, TRAINERS, UNKNOWN_IMBALANCE, Job, Recompute, Sends, trained_by
from tritonmoe.tools.planner.job_memory import estimate_layers
from tritonmoe.tools.planner.model_config import MODELS, expert_load, find_model
from tritonmoe.tools.planner.plan_page import comparison_page, plan_page
from tritonmoe.tools.planner.plan_search import Free
from tritonmoe.tools.planner.plan_text import comparison_as_json, comparison_table, plan_as_json, plan_table
from tritonmoe.tools.planner.training_plan import Measured, Plan, plan
from tritonmoe.tools.report.html import Page, write_page
from tritonmoe.tools.report.terminal import TEXT_COLUMNS, refused, wrapped

__all__ = ["add_parser"]

DEFAULT_ADAPTER_RANK = 16
AS_GIVEN = (
    *("sequence", "micro_batch", "stages_in_turn", "trainer", "sends", "zero", "dtype", "wire_dtype"),
    *("expert_precision", "two_batches", "cuda_graphs", "frozen", "adapter_rank", "balanced", "routing"),
    *("network", "measured", "of"),
)
"""What the command that repeats a plan has as the command that found it."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser(
        "plan", help="predict a training step on machines that you don't have yet", description=__doc__
    )
    parser.add_argument("model", nargs="?", help=f"a config.json, its folder, or one of {', '.join(MODELS)}")
    parser.add_argument("cluster", nargs="?", help=f"a TOML file, or one of {', '.join(CLUSTERS)}")
    parser.add_argument(
        "--compare", nargs="+", metavar="CLUSTER", help="compare two or more clusters, instead of planning for one"
    )
    parser.add_argument(
        "--new-cluster",
        type=output_file,
        metavar="FILE",
        help="write the named cluster (default H100) to this file, with comments, for you to edit",
    )
    parser.add_argument("--nodes", type=positive, help="number of nodes (default: the cluster's)")
    parser.add_argument(
        "--equal",
        choices=get_args(Equal),
        help="with --compare: give all clusters as many GPUs as the first, or GPUs for the same $ an hour",
    )
    parser.add_argument(
        "--offload",
        type=positive_number,
        metavar="GB_PER_S",
        help="instead of a plan: say how many tokens per expert hide the loading of experts that stay in host memory "
        "or on a disk, at this rate",
    )
    _add_shape(parser)
    _add_trainer(parser)
    parser.add_argument(
        "--network",
        metavar="KIND",
        help=f"network between nodes: {' or '.join(NETWORKS)} (NCCL without RDMA), or a file that says it: NCCL's log "
        "(NCCL_DEBUG=INFO), or the output of env",
    )
    parser.add_argument(
        "--measured",
        type=positive_number,
        metavar="TOKENS_PER_S",
        help="tokens a second of all GPUs in a run of this job: narrows all intervals",
    )
    parser.add_argument(
        "--of",
        default="",
        metavar="OPTIONS",
        help="with --measured: options in which that run was another one, as one argument: '--nodes 2 --ep 8'; its "
        "--tp, --pp and --ep are needed here or there",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="instead of a step's time, print what the layers with experts hold on the fullest rank, by routing",
    )
    parser.add_argument(
        "--memory-budget-gb",
        type=positive_number,
        metavar="GB",
        help="with --memory: OverlapConfig(memory_budget_bytes=...), in 1e9 bytes (default: none)",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write everything to this file")
    parser.add_argument("--html", type=report_file, metavar="FILE", help="write a report, a page for any browser")
    parser.set_defaults(run=run, default_of=parser.get_default)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of a step, and over which ranks it is spread."""
    parser.add_argument("--sequence", type=positive, default=4096, help="tokens of one sequence (default 4096)")
    parser.add_argument("--micro-batch", type=positive, default=1, help="sequences of a micro-batch (default 1)")
    parser.add_argument(
        "--micro-batches",
        type=positive,
        default=8,
        help="micro-batches of a step on each data-parallel rank (default 8); while tp or pp are searched, a "
        "choice with more of them gets more micro-batches, so that all train the same number of tokens a step",
    )
    parser.add_argument("--tp", type=positive, help="tensor-parallel ranks (default: the best of 1 to 8)")
    parser.add_argument("--pp", type=positive, help="pipeline stages (default: the best of 1 to 32)")
    parser.add_argument(
        "--stages-in-turn", type=positive, default=1, help="pieces of each pipeline stage, interleaved (default 1)"
    )
    parser.add_argument(
        "--ep", type=positive, nargs="+", default=[], help="expert-parallel ranks (default: all that fit)"
    )


def _add_trainer(parser: argparse.ArgumentParser) -> None:
    """Add how the step is trained, and where its tokens go."""
    parser.add_argument(
        "--recompute",
        choices=get_args(Recompute),
        help="activations that backward computes again (default: as few as the memory allows)",
    )
    parser.add_argument("--trainer", choices=list(TRAINERS), default="ours", help="trainer to predict (default ours)")
    parser.add_argument(
        "--sends",
        choices=get_args(Sends),
        help="rows: a token travels once to each rank; pairs: once for each expert (default: the trainer's way)",
    )
    parser.add_argument(
        "--zero",
        type=int,
        choices=[1, 3],
        help="ZeRO stage: 1 spreads optimizer states, 3 weights and gradients too (default: the trainer's)",
    )
    parser.add_argument("--dtype", choices=list(DTYPE_BYTES), default="bf16")
    parser.add_argument(
        "--wire-dtype", choices=["fp8"], help="dtype in which rows travel to their experts (default: --dtype)"
    )
    parser.add_argument(
        "--expert-precision",
        choices=list(BLOCKS),
        help="the format of an ExpertPrecision in which experts train; gradients of their weights are products in bf16 "
        "(default: --dtype)",
    )
    parser.add_argument(
        "--two-batches",
        action="store_true",
        help="run two halves of a micro-batch at once: one computes while the other's rows travel",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="launch layers from CUDA graphs, in part at least, by a host that waits for no counts (HybridEP)",
    )
    parser.add_argument(
        "--frozen",
        choices=FROZEN,
        help="freeze the model, its experts stored so, and train adapters of its experts (default: train everything)",
    )
    parser.add_argument(
        "--adapter-rank", type=positive, help="rank of the adapters of a --frozen model's experts (default 16)"
    )
    parser.add_argument("--balanced", action="store_true", help="assume routing that is forced to be balanced")
    parser.add_argument(
        "--routing",
        type=Path,
        metavar="FILE",
        help="JSON list with the number of pairs of each expert (default: an assumed imbalance)",
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.new_cluster is not None:
            preset = arguments.cluster or arguments.model or "H100"
            write_whole(arguments.new_cluster, to_toml(_find_cluster(preset), REMARKS), "cluster's description")
            print(f"wrote {arguments.new_cluster}, with the numbers of {preset}")
            return 0
        return _plan(arguments)
    except (ValueError, OSError) as error:
        return refused("plan", error)


def _plan(arguments: argparse.Namespace) -> int:
    if arguments.memory:
        return _print_memory(arguments)
    if arguments.memory_budget_gb is not None:
        raise ValueError("--memory-budget-gb bounds what --memory prints: give both")
    if arguments.model is None or (arguments.cluster is None) == (arguments.compare is None):
        raise ValueError("give a model and a cluster, or a model and --compare with clusters")
    if arguments.equal is not None and arguments.compare is None:
        raise ValueError(
            "--equal makes the clusters of --compare equal: give --compare with two or more clusters, or leave "
            "--equal out"
        )
    if arguments.offload is not None:
        return _break_even(arguments)
    job = _job(arguments)
    free = Free(*(getattr(arguments, name) is None for name in ("tp", "pp", "recompute")))
    if arguments.compare is not None:
        if len(arguments.compare) < 2:
            raise ValueError("--compare needs at least two clusters")
        if arguments.measured is not None or arguments.network is not None:
            raise ValueError(
                "--measured and --network are of one cluster: leave --compare out, or give clusters as files"
            )
        clusters = [_sized(_find_cluster(name), arguments) for name in arguments.compare]
        if len({cluster.name for cluster in clusters}) < len(clusters):
            clusters = [replace(one, name=given) for one, given in zip(clusters, arguments.compare, strict=True)]
        comparison = compare(job, clusters, arguments.ep, free=free, equal=arguments.equal)
        print(wrapped(comparison_table(comparison)))
        _say_again(arguments, zip(arguments.compare, comparison.plans, strict=True))
        _write(arguments, comparison_as_json(comparison), lambda: comparison_page(comparison))
        return 0 if all(one.best.fits for one in comparison.plans) else 1
    cluster, measured = _cluster(arguments), None if arguments.measured is None else _measured(arguments)
    found = plan(job, cluster, arguments.ep, free=free, measured=measured)
    print(wrapped(plan_table(found)))
    _say_again(arguments, [(arguments.cluster, found)])
    _write(arguments, plan_as_json(found), lambda: plan_page(found))
    return 0 if found.best.fits else 1


def _print_memory(arguments: argparse.Namespace) -> int:
    """Print what layers with experts hold under each routing; no cluster is needed."""
    if arguments.model is None or arguments.cluster is not None or len(arguments.ep) != 1 or arguments.html is not None:
        raise ValueError(
            "--memory needs a model and one --ep, no cluster and no --html: tritonmoe plan MODEL --memory --ep 8"
        )
    job = replace(_job(arguments), ep=arguments.ep[0])
    budget = None if arguments.memory_budget_gb is None else int(arguments.memory_budget_gb * 1e9)
    names = {"uniform": "uniform", "recorded": "recorded", "worst": "all on one rank"}
    found = {
        name: estimate_layers(job, routing, budget)
        for routing, name in names.items()
        if routing != "recorded" or job.load
    }
    rows: list[dict[str, Any]] = [
        {
            "routing": name,
            "peak_gb": round(float(one.peak.max()) / 1e9, 3),
            "kept_gb": round(float(one.kept.max()) / 1e9, 3),
            "keeps": dict(Counter(one.keeps)),
            "most_parts": max(one.parts),
        }
        for name, one in found.items()
    ]
    num_layers = len(found["uniform"].keeps)
    print(
        wrapped(
            f"{job.model.name}, {job.ep} ranks with {round(job.num_tokens)} tokens each, {job.dtype}, recompute "
            f"{job.recompute}: what {num_layers} layers with experts hold on the fullest rank beside weights, inputs "
            "and outputs, in 1e9 bytes"
        )
    )
    print(f"\n{'routing':<16} {'peak':>8} {'kept':>8}  layers keep")
    for row in rows:
        keeps = ", ".join(f"{name} in {count}" for name, count in row["keeps"].items())
        parts = f", up to {row['most_parts']} parts" if row["most_parts"] > 1 else ""
        print(f"{row['routing']:<16} {row['peak_gb']:>8.2f} {row['kept_gb']:>8.2f}  {keeps}{parts}")
    if budget is not None and any(one.peak.max() > budget for one in found.values()):
        print(
            "\n"
            + wrapped(f"{arguments.memory_budget_gb} GB are not enough for every routing: the call takes least then")
        )
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps({"memory": rows}, indent=1), "plan")
        print(f"\nwrote {arguments.json}")
    return 0


def _break_even(arguments: argparse.Namespace) -> int:
    """Print what hides the loading of experts."""
    if arguments.cluster is None or arguments.json is not None or arguments.html is not None:
        raise ValueError("--offload prints a table for one cluster: leave out --compare, --json and --html")
    if arguments.expert_precision is not None:
        raise ValueError("--offload is for frozen experts, and --expert-precision for experts that train: give one")
    tokens = arguments.sequence * arguments.micro_batch
    model, cluster = find_model(arguments.model), _find_cluster(arguments.cluster)
    print(wrapped(break_even_table(model, cluster, arguments.offload, tokens)))
    return 0


def _say_again(arguments: argparse.Namespace, plans: Iterable[tuple[str, Plan]]) -> None:
    """Print a command for each plan that fits, by the name or file of its cluster: one that finds its best choice."""
    commands = [_command(arguments, cluster, found) for cluster, found in plans if found.best.fits]
    if commands:
        print("\nThe best choice alone:", *commands, sep="\n")


def _command(arguments: argparse.Namespace, cluster: str, found: Plan) -> str:
    """Return the command line that plans the best choice alone; one that is too long goes on below."""
    choice = found.best.choice
    chosen: dict[str, object] = {"nodes": found.cluster.nodes, "tp": choice.tp, "pp": choice.pp, "ep": choice.ep}
    chosen |= {"recompute": choice.recompute, "micro_batches": choice.micro_batches}
    given = {name: getattr(arguments, name) for name in AS_GIVEN}
    chosen |= {name: value for name, value in given.items() if value != arguments.default_of(name)}
    words = ["tritonmoe", "plan", shlex.quote(arguments.model), shlex.quote(cluster)]
    for name, value in chosen.items():
        option = f"--{name.replace('_', '-')}"
        words.append(option if value is True else f"{option} {shlex.quote(str(value))}")
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) + len(" \\") >= TEXT_COLUMNS:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _job(arguments: argparse.Namespace) -> Job:
    model = find_model(arguments.model)
    job = Job(
        model,
        arguments.sequence,
        arguments.micro_batch,
        arguments.micro_batches,
        arguments.tp or 1,
        arguments.pp or 1,
        stages_in_turn=arguments.stages_in_turn,
        recompute=arguments.recompute or "none",
        dtype=arguments.dtype,
        wire_dtype=arguments.wire_dtype,
        expert_precision=arguments.expert_precision,
        imbalance=1.0 if arguments.balanced or arguments.routing is not None else UNKNOWN_IMBALANCE,
        load=() if arguments.routing is None else expert_load(arguments.routing, model.num_experts),
        frozen=arguments.frozen,
        adapter_rank=arguments.adapter_rank or (0 if arguments.frozen is None else DEFAULT_ADAPTER_RANK),
    )
    job = trained_by(job, arguments.trainer, arguments.sends, arguments.zero)
    return replace(job, two_batches=arguments.two_batches, cuda_graphs=arguments.cuda_graphs)


def _find_cluster(name: str) -> Cluster:
    if name in CLUSTERS:
        return CLUSTERS[name]
    path = Path(name)
    if not path.exists():
        raise ValueError(f"{name!r} is no cluster: give the path of a TOML file, or one of {', '.join(CLUSTERS)}")
    return read_cluster(path)


def _cluster(arguments: argparse.Namespace) -> Cluster:
    """Return the cluster of a plan with what is said of its network."""
    cluster, kind = _sized(_find_cluster(arguments.cluster), arguments), arguments.network
    if kind is None or kind in NETWORKS:
        return cluster if kind is None else with_network(cluster, kind)
    if not Path(kind).is_file():
        raise ValueError(
            f"--network is {' or '.join(NETWORKS)}, or a file with NCCL's log or the output of env: {kind!r}"
        )
    said = network_in(Path(kind).read_text(errors="replace"))
    if said is None:
        raise ValueError(
            f"{kind} doesn't say over what NCCL runs: a log with NCCL_DEBUG=INFO has a line 'Using network ...'. Say "
            f"it with --network {' or --network '.join(NETWORKS)}"
        )
    return with_network(cluster, said)


def _measured(arguments: argparse.Namespace) -> Measured:
    """Return the step that was measured, of this job but for the options of --of.

    Raises:
        ValueError: these are no options of a job, or its degrees aren't known.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--nodes", type=positive)
    _add_shape(parser)
    _add_trainer(parser)
    try:
        of, unknown = parser.parse_known_args(shlex.split(arguments.of), argparse.Namespace(**vars(arguments)))
    except argparse.ArgumentError as error:
        raise ValueError(f"--of: {error}") from None
    if unknown:
        raise ValueError(f"--of takes options of a job and --nodes, got {' '.join(unknown)}")
    if of.tp is None or of.pp is None or len(of.ep) != 1:
        raise ValueError(
            "--measured needs to know how the run was spread: give --tp, --pp and one --ep, or --of with them: "
            "--of '--tp 1 --pp 1 --ep 8'"
        )
    return Measured(replace(_job(of), ep=of.ep[0]), _cluster(of), arguments.measured)


def _sized(cluster: Cluster, arguments: argparse.Namespace) -> Cluster:
    return cluster if arguments.nodes is None else cluster.with_nodes(arguments.nodes)


def _write(arguments: argparse.Namespace, found: Json, page: Callable[[], Page]) -> None:
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(found, indent=1), "plan")
        print(f"\nwrote {arguments.json}")
    if arguments.html is not None:
        write_page(arguments.html, page())
        print(f"\nwrote {arguments.html}: open it in a browser")
