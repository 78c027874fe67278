"""The arguments of `tritonmoe bench overlap`, and which of them go together."""

import argparse
import os

from tritonmoe.tools.benchmarks.argument_types import (
    add_chunks,
    output_file,
    output_folder,
    picture_file,
    positive,
    positive_number,
    report_file,
    seed,
)
from tritonmoe.tools.benchmarks.inside_namespace import check_start
from tritonmoe.tools.benchmarks.link_rates import parse_rate
from tritonmoe.tools.benchmarks.overlap_table import TERMS, as_terms
from tritonmoe.tools.benchmarks.workload import DTYPES, MODELS, NAMED_WIRE_DTYPES

__all__ = ["DEFAULT_RATE", "check_arguments", "check_ranks", "make_parser"]

DEFAULT_RATE = "1gbit"

DESCRIPTION = """\
Measure how much of a layer's communication overlap hides: compute alone, communication alone, both in turn, overlapped.

On a real link, in processes: under torchrun (gloo or NCCL), under mpiexec with --mpi, or in network namespaces that
--netns makes on this machine. On an emulated link, in one process: --emulate. On a CPU all emulated ranks
compute. On a GPU, which they would share, only one rank computes, and gets the recorded rows of the others.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tritonmoe bench overlap",
        description=DESCRIPTION,
        epilog=f"the figures in the table, in --json and in --png:\n{as_terms(TERMS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_argument_group("ranks and links (under torchrun: none of these)")
    where.add_argument(
        "--emulate", type=positive, metavar="N", help="N emulated ranks in this process, over an emulated link"
    )
    where.add_argument("--netns", type=positive, metavar="N", help="N processes in network namespaces (Linux, root)")
    where.add_argument("--mpi", action="store_true", help="take the ranks of mpiexec")
    link = where.add_mutually_exclusive_group()
    link.add_argument(
        "--rate", help=f"with --emulate or --netns: the rate of every rank's link, each way (default {DEFAULT_RATE})"
    )
    where.add_argument("--node-size", type=int, metavar="M", help="with --netns: put M ranks on a node ...")
    where.add_argument("--inter-rate", metavar="RATE", help="... and give each node an uplink of this rate")
    link.add_argument(
        "--compute-ratio",
        type=float,
        metavar="X",
        help="instead of --rate: choose a rate at which compute takes X times as long as communication",
    )
    _add_layer(parser)
    parser.add_argument("--rounds", type=positive, default=21, help="interleaved rounds (default 21)")
    parser.add_argument(
        "--timeout-s", type=positive_number, default=60.0, help="seconds that an exchange may take (default 60)"
    )
    parser.add_argument("--seed", type=seed, default=0)
    output = parser.add_argument_group("output, beside the table")
    output.add_argument("--json", type=output_file, help="write all figures to this file")
    output.add_argument("--png", type=picture_file, help="draw the best schedules, measured and planned, and the sweep")
    output.add_argument("--html", type=report_file, help="write a report for any browser: figures, lanes and traffic")
    output.add_argument("--trace", type=output_file, help="write the lanes of every rank as a trace for Perfetto")
    output.add_argument(
        "--record",
        type=output_folder,
        metavar="DIR",
        help="record the calls of the layer that chooses by itself, for tritonmoe doctor DIR",
    )
    return parser


def _add_layer(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("layer")
    what.add_argument(
        "--model", choices=MODELS, default="coarse", help="whose E, K, D and F the layer has (default coarse)"
    )
    what.add_argument("--tokens", type=positive, default=1024, help="tokens of each rank (default 1024)")
    what.add_argument("--dtype", choices=DTYPES, default="float32")
    what.add_argument(
        "--wire-dtype", choices=NAMED_WIRE_DTYPES, help="send rows in this dtype (default: the dtype of the layer)"
    )
    what.add_argument(
        "--routing",
        default="uniform",
        help="uniform, zipf:S, remote (no expert of a token is on its rank), or a file of ids (default uniform)",
    )
    what.add_argument("--forward-only", action="store_true", help="measure the forward without a backward")
    add_chunks(what)


def check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.rate is not None:
        parse_rate(arguments.rate)
    check_start(arguments.netns, {"--inter-rate": arguments.inter_rate, "--node-size": arguments.node_size})
    modes = [name for name in ("emulate", "netns", "mpi") if getattr(arguments, name)]
    if len(modes) > 1 or (not modes and "RANK" not in os.environ):
        raise ValueError(
            "choose one of --emulate N, --netns N and --mpi (under mpiexec), or start it under torchrun: "
            "torchrun --nproc-per-node 2 -m tritonmoe bench overlap"
        )
    if arguments.emulate is not None and "RANK" in os.environ:
        raise ValueError(
            f"--emulate {arguments.emulate} needs one process, and the environment has RANK={os.environ['RANK']}: "
            "under torchrun every process would emulate all ranks. Start without torchrun (unset RANK), or leave "
            "--emulate out"
        )
    if arguments.rate is not None and modes not in (["emulate"], ["netns"]):
        raise ValueError(
            f"--rate {arguments.rate} shapes the link of --emulate or --netns, and can't shape the link between ranks "
            "of torchrun or mpiexec. Leave --rate out"
        )
    if arguments.compute_ratio is not None:
        if not 0 < arguments.compute_ratio < 1000:
            raise ValueError(f"--compute-ratio must lie between 0 and 1000, got {arguments.compute_ratio}")
        if modes not in (["emulate"], ["netns"]):
            raise ValueError("--compute-ratio chooses the link's rate: it needs --emulate or --netns")
    num_ranks = arguments.emulate if arguments.emulate is not None else arguments.netns
    if num_ranks is not None:
        check_ranks(num_ranks, arguments.model)
    if (arguments.node_size is None) != (arguments.inter_rate is None):
        raise ValueError("--node-size and --inter-rate belong together")
    if arguments.node_size is not None:
        parse_rate(arguments.inter_rate)
        if arguments.netns is None or not 2 <= arguments.node_size < arguments.netns:
            raise ValueError("--node-size must be 2 or more, and needs --netns with more ranks than that")
        if arguments.netns % arguments.node_size:
            raise ValueError(f"--node-size {arguments.node_size} must divide the {arguments.netns} ranks of --netns")
    files = [str(path) for path in (arguments.json, arguments.png, arguments.html, arguments.trace) if path is not None]
    if len(set(files)) < len(files):
        raise ValueError(f"--json, --png, --html and --trace must be different files, got {' '.join(files)}")
    if len(set(arguments.chunks)) < len(arguments.chunks):
        raise ValueError(f"--chunks must be different numbers, got {' '.join(map(str, arguments.chunks))}")
    if arguments.record is not None and any(arguments.record.glob("rank-*.jsonl")):
        raise ValueError(f"{arguments.record} holds a recording already: give --record another folder")


def check_ranks(num_ranks: int, model: str) -> None:
    num_experts = MODELS[model][0]
    if num_ranks < 2 or num_experts % num_ranks:
        raise ValueError(
            f"the number of ranks must be 2 or more and divide the {num_experts} experts of {model}, got {num_ranks}"
        )
