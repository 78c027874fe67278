"""`tritonmoe bench overlap`: measure how much of a layer's communication the schedule hides, and show it."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from tritonmoe.errors import TransportError
from tritonmoe.runtime.files import Json
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
from tritonmoe.tools.benchmarks.measured_layer import Link, MeasuredLayer, ReplayedPeers
from tritonmoe.tools.benchmarks.namespaces import Namespaces, ask, check_start, interface_bytes, is_inside, parse_rate
from tritonmoe.tools.benchmarks.overlap_rank import RankMeasurement, measure_rank
from tritonmoe.tools.benchmarks.overlap_report import (
    TERMS,
    TERMS_OF_PICTURE,
    as_table,
    as_terms,
    headline,
    mark_contention,
    noise_notes,
    overlap_page,
    summarize_overlap,
    verdict,
)
from tritonmoe.tools.benchmarks.overlap_variants import variants_of
from tritonmoe.tools.benchmarks.ranks import device_and_backend, gather
from tritonmoe.tools.benchmarks.timing import summarize, write_figures
from tritonmoe.tools.benchmarks.workload import DTYPES, MODELS, NAMED_WIRE_DTYPES, Workload
from tritonmoe.tools.report.html import write_page
from tritonmoe.tools.report.perfetto import write_chrome_trace
from tritonmoe.tools.report.png import write_overlap_png
from tritonmoe.tools.report.terminal import refused, wrapped
from tritonmoe.tools.report.timeline import Timeline, layer_timeline, simulated_timeline
from tritonmoe.transports import EmulatedTransport, LinkModel, MPITransport, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks
from tritonmoe.transports.torchrun import torchrun_ranks
from tritonmoe.transports.wire import WireFormat

__all__ = ["main", "make_parser"]

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


LINK_DESCRIPTION = "LINK_DESCRIPTION"
"""The environment variable in which every process finds the words for its link."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; gives the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments, sys.argv[1:] if argv is None else argv)
    except (TypeError, ValueError, OSError) as error:
        return refused("bench overlap", error)
    except TransportError as error:
        print(f"tritonmoe bench overlap: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    check_arguments(arguments)
    workload = Workload(
        arguments.model,
        arguments.tokens,
        arguments.routing,
        arguments.dtype,
        not arguments.forward_only,
        arguments.seed,
        arguments.wire_dtype,
    )
    WireFormat(workload.torch_dtype, workload.torch_wire_dtype)  # refuses what can't travel so
    if arguments.emulate is not None:
        has_gpu = torch.cuda.is_available()
        if has_gpu and arguments.record is not None:
            raise ValueError("--record needs ranks that all compute: on a GPU --emulate replays all but one")
        results = _emulate_one(arguments, workload, "cuda") if has_gpu else _emulate_all(arguments, workload)
        _write(arguments, results)
        return 0
    if arguments.netns is not None and not is_inside():
        return _run_namespaces(arguments, argv)
    if arguments.mpi:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
            raise ValueError(f"--mpi needs mpi4py and an MPI: {error}; pip install 'tritonmoe[mpi]'") from error

        torch.set_num_threads(1)
        transport = MPITransport(MPI.COMM_WORLD, timeout_s=arguments.timeout_s)
        results_of_rank = _measure(transport, arguments, workload, Link(), f"{transport.size} processes, MPI", "cpu")
        if transport.rank == 0:
            _write(arguments, results_of_rank)
        transport.close()
        return 0
    with torchrun_ranks(timeout_s=arguments.timeout_s) as group:
        device, backend = device_and_backend()
        link, description = Link(), f"{group.size} processes, {backend}"
        if arguments.netns is not None:
            device, description = "cpu", os.environ[LINK_DESCRIPTION]
            torch.set_num_threads(1)
            link = _link_of_namespaces(group.rank)
            if arguments.node_size is not None:
                link.two_levels = group.with_nodes(arguments.node_size)
        results_of_rank = _measure(group, arguments, workload, link, description, device)
        if group.rank == 0:
            _write(arguments, results_of_rank)
    return 0


def _emulate_all(arguments: argparse.Namespace, workload: Workload) -> Json:
    """Measure N ranks that all compute, on a CPU."""
    description = f"{arguments.emulate} emulated ranks in one process, emulated link"
    model = LinkModel(parse_rate(arguments.rate or DEFAULT_RATE) / 8e9)

    def on_rank(transport: Transport) -> Json:
        assert isinstance(transport, EmulatedTransport)
        link = Link(set_rate=lambda bits: transport.world.set_link(LinkModel(bits / 8e9)))
        return _measure(transport, arguments, workload, link, description, "cpu")

    return run_on_emulated_ranks(on_rank, arguments.emulate, link=model, timeout_s=arguments.timeout_s)[0]


def _emulate_one(arguments: argparse.Namespace, workload: Workload, device: str) -> Json:
    """Measure rank 0 alone: the others compute only while a call of each plan is recorded, before it is measured."""
    num_ranks = arguments.emulate
    description = f"one of {num_ranks} ranks computes, the others are replayed; emulated link"
    peers = ReplayedPeers(num_ranks, LinkModel(parse_rate(arguments.rate or DEFAULT_RATE) / 8e9))

    def on_rank(transport: Transport) -> Json:
        if transport.rank == 0:
            link = Link(set_rate=lambda bits: setattr(peers.port, "link", LinkModel(bits / 8e9)), peers=peers)
            with peers:
                return _measure(transport, arguments, workload, link, description, device)
        layer = MeasuredLayer(transport, workload, torch.device(device), Link())
        peers.serve(transport.rank, layer.record)
        return {}

    return run_on_emulated_ranks(on_rank, num_ranks, device=device, timeout_s=arguments.timeout_s)[0]


def _run_namespaces(arguments: argparse.Namespace, argv: list[str]) -> int:
    inter_rate = None if arguments.inter_rate is None else parse_rate(arguments.inter_rate)
    rate = arguments.rate or DEFAULT_RATE
    of_rate = f", {rate} a link" if arguments.compute_ratio is None else ""  # that is to be chosen yet
    description = f"{arguments.netns} network namespaces, gloo{of_rate}"
    if arguments.node_size is not None:
        description += f", nodes of {arguments.node_size} with an uplink of {arguments.inter_rate}"
    os.environ[LINK_DESCRIPTION] = description
    command = [sys.executable, "-m", "tritonmoe", "bench", "overlap", *argv]
    with Namespaces(
        command,
        arguments.netns,
        parse_rate(rate),
        node_size=arguments.node_size,
        inter_rate=inter_rate,
    ) as namespaces:
        return namespaces.run(arguments.timeout_s)


def _link_of_namespaces(rank: int) -> Link:
    def set_rate(bits: float) -> None:
        ask(f"rate {bits}")

    def read_uplinks() -> list[int]:
        return json.loads(ask("uplinks") or "[]")

    return Link(set_rate, interface_bytes, read_uplinks if rank == 0 else None)


def _measure(
    transport: Transport,
    arguments: argparse.Namespace,
    workload: Workload,
    link: Link,
    description: str,
    device: str,
) -> Json:
    """Measure on this rank and give everything that is shown, with every rank's timelines; the same on every rank."""
    check_ranks(transport.size, workload.model)
    measured = measure_rank(
        transport,
        workload,
        arguments.chunks,
        arguments.rounds,
        link=link,
        compute_ratio=arguments.compute_ratio,
        device=device,
        record_to=arguments.record,
    )
    summary = summarize_overlap(measured)
    timelines = _timelines(measured, summary, transport.rank)
    own = {
        "timelines": {name: dataclasses.asdict(timeline) for name, timeline in timelines.items()},
        "sent_bytes": measured.sent_bytes,
        "predicted": {name: seconds for name, (seconds, _) in measured.predicted.items()},
        "rows_between_nodes": measured.rows_between_nodes,
        "contention": {kind: summary[kind].pop("contention") for kind in ("overlapped", "auto")},
    }
    ranks = gather(link.measured_ranks(transport), own)
    for kind in ("overlapped", "auto"):
        summary[kind]["contention"] = max(r["contention"][kind] for r in ranks)
    mark_contention(summary)
    if measured.rate is not None:
        description = f"{description} (rate chosen: {measured.rate / 1e9:.4g} gbit)"
    results = {
        "link": description,
        "emulated": arguments.emulate is not None,
        "device": torch.device(device).type,
        "ranks": transport.size,
        "computing_ranks": len(ranks),
        "compute_ratio": arguments.compute_ratio,
        "rate_bits_per_s": _rate_of(measured, arguments),
        **workload.as_json(),
        "rounds": arguments.rounds,
        "traffic_rows": measured.traffic_rows,
        "row_bytes": measured.row_bytes,
        "other_row_bytes": measured.other_row_bytes,
        "variants": {name: summarize(times) for name, times in measured.seconds.items()},
        "sweep": [
            {"name": str(v), "series": v.series, "num_chunks": v.num_chunks}
            for v in variants_of(arguments.chunks, workload.shape[0] // transport.size, link.two_levels is not None)
            if v.kind != "compute" and v.num_chunks is not None
        ],
        "summary": summary,
        "predicted_ms": {name: round(1e3 * max(r["predicted"][name] for r in ranks), 3) for name in measured.predicted},
        "sent_bytes": None if measured.sent_bytes is None else [r["sent_bytes"] for r in ranks],
        "uplink_bytes": measured.uplink_bytes,
        "two_levels_computed_bytes": _bytes_between_nodes([r["rows_between_nodes"] for r in ranks], measured, workload),
        "timelines": {name: [Timeline.of_plain(r["timelines"][name]) for r in ranks] for name in timelines},
    }
    return {**results, "verdict": verdict(results)}


def _rate_of(measured: RankMeasurement, arguments: argparse.Namespace) -> float | None:
    """Return the rate of the link: the chosen one, else the one asked for; None on a link that nobody emulates."""
    if measured.rate is None and (arguments.emulate is not None or arguments.netns is not None):
        return parse_rate(arguments.rate or DEFAULT_RATE)
    return measured.rate


def _timelines(measured: RankMeasurement, summary: Json, rank: int) -> dict[str, Timeline]:
    """Return what is drawn, by name: the best serial schedule, the best overlapped ones and what the simulator says."""
    timelines = {}
    for kind in ("serial", "overlapped", "two levels"):
        if f"T_{kind}" not in summary:
            continue
        name = summary[f"T_{kind}"]["variant"]
        timelines[name] = _typical_timeline(measured, name)
        if kind != "serial":
            planned = f"{name}, planned"
            timelines[planned] = simulated_timeline(planned, rank, measured.predicted[name][1])
    return timelines


def _typical_timeline(measured: RankMeasurement, name: str) -> Timeline:
    """Return the timeline of the round whose time is the median."""
    seconds = measured.seconds[name]
    typical = sorted(range(len(seconds)), key=seconds.__getitem__)[len(seconds) // 2]
    return layer_timeline(name, measured.reports[name][typical])


def _bytes_between_nodes(rows: list[int | None], measured: RankMeasurement, workload: Workload) -> int | None:
    """Return what all nodes send each other in a call on two levels: rows, ids, weights and their gradients."""
    total = sum(count for count in rows if count is not None)
    if None in rows:
        return None
    top_k = workload.shape[1]
    if workload.backward:
        return total * (measured.row_bytes + 3 * measured.other_row_bytes + 12 * top_k)
    return total * (measured.row_bytes + measured.other_row_bytes + 8 * top_k)


def _write(arguments: argparse.Namespace, results: Json) -> None:
    """Write the files, then print the figures: they are there where nobody reads what is printed, and vice versa."""
    timelines: dict[str, list[Timeline]] = results.pop("timelines")
    said, failures = [wrapped(as_table(results))], []

    def write_picture(path: Path) -> None:
        lanes = [one[0] for one in timelines.values()]
        texts = [results["verdict"]["text"], headline(results), *noise_notes(results)], as_terms(TERMS_OF_PICTURE)
        write_overlap_png(path, lanes, results, *texts)

    for path, write, hint in (
        (arguments.json, lambda path: write_figures(path, "overlap", results, results["device"]), ""),
        (arguments.trace, lambda path: write_chrome_trace(path, timelines), ": open it in https://ui.perfetto.dev"),
        (arguments.png, write_picture, ""),
        (arguments.html, lambda path: write_page(path, overlap_page(results, timelines)), ""),
    ):
        if path is None:
            continue
        try:
            write(path)
            said.append(f"wrote {path}{hint}")
        except OSError as error:
            failures.append(str(error))
    if arguments.record is not None:
        said.append(f"wrote {arguments.record}: read it with tritonmoe doctor {arguments.record}")
    print("\n".join([*said, "", wrapped(results["verdict"]["text"])]), flush=True)
    if failures:
        raise OSError("; ".join(failures))
