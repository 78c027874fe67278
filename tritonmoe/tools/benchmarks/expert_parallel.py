"""A training step of a Qwen3-MoE-like model spread over ranks by transformers: its own all_to_all against tritonmoe's.

Forward and backward are timed. Every rank has its own batch, FSDP shards the dense weights, experts are spread over all
ranks, and both implementations have the same weights. Ranks are those of torchrun, or processes in network namespaces
that --netns makes on this machine (one core and one thread each). With the default shapes compute and communication of
all_to_all take about equally long on two processes with a link of 1 Gbit/s; the time of a step on a link of 40 Gbit/s
shows how nearly.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.errors import TransportError
from tritonmoe.integrations.transformers.bench_model import load_spread, qwen3_moe_model
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import chunk_count, output_file, positive, positive_number
from tritonmoe.tools.benchmarks.expert_parallel_rank import OURS, PEERS, RankSteps, measure_steps
from tritonmoe.tools.benchmarks.model_sizes import add_model_sizes, check_model_sizes, model_sizes
from tritonmoe.tools.benchmarks.namespaces import Namespaces, check_start, parse_rate
from tritonmoe.tools.benchmarks.ranks import gather
from tritonmoe.tools.benchmarks.timing import ratio, summarize, write_json
from tritonmoe.tools.benchmarks.workload import DTYPES
from tritonmoe.tools.report.terminal import refused
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["main", "make_parser", "summarize_steps"]

MODEL = "EXPERT_PARALLEL_MODEL"
"""The directory of the weights, for the processes in the namespaces."""
LARGEST_LOSS_DIFFERENCE = {"float32": 1e-4, "bfloat16": 1e-2}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tritonmoe bench expert_parallel", description=__doc__)
    parser.add_argument("--netns", type=int, metavar="N", help="N processes in network namespaces (Linux, root)")
    parser.add_argument("--rate", help="with --netns: the rate of every rank's link, each way (default 1gbit)")
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens of each rank (default 1024)")
    parser.add_argument(
        "--sequences",
        type=positive,
        default=1,
        help="sequences that the tokens form (default 1); with 2, two halves of a batch are measured too",
    )
    parser.add_argument("--dtype", choices=list(LARGEST_LOSS_DIFFERENCE), default="float32")
    add_model_sizes(parser)
    parser.add_argument(
        "--chunks", type=chunk_count, help="number of chunks for tritonmoe (default: it chooses by itself)"
    )
    parser.add_argument("--rounds", type=positive, default=7, help="interleaved rounds (default 7)")
    parser.add_argument(
        "--timeout-s", type=positive_number, default=120.0, help="seconds that an exchange may take (default 120)"
    )
    parser.add_argument("--json", type=output_file, help="also write the figures to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; gives the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        return _run(arguments, sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, ImportError) as error:
        return refused("bench expert_parallel", error)
    except TransportError as error:
        print(f"tritonmoe bench expert_parallel: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    check_start(arguments.netns, {"--rate": arguments.rate})
    arguments.rate = arguments.rate or "1gbit"
    rate = parse_rate(arguments.rate)
    check_model_sizes(arguments)
    if arguments.tokens % arguments.sequences:
        raise ValueError(f"--tokens {arguments.tokens} must be a multiple of --sequences {arguments.sequences}")
    if "RANK" in os.environ:
        return _run_rank(arguments, None if arguments.netns is None else rate)
    if arguments.netns is None:
        raise ValueError(
            "start it with --netns N, or under torchrun: torchrun --nproc-per-node 2 -m tritonmoe bench expert_parallel"
        )
    if arguments.netns < 2 or arguments.experts % arguments.netns:
        raise ValueError(f"--netns must be 2 or more and divide the {arguments.experts} experts, got {arguments.netns}")
    command = [sys.executable, "-m", "tritonmoe", "bench", "expert_parallel", *argv]
    with tempfile.TemporaryDirectory() as directory:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers would put the model there
        os.environ[MODEL] = directory
        _make_model(arguments).save_pretrained(directory)
        with Namespaces(command, arguments.netns, rate) as namespaces:
            return namespaces.run(arguments.timeout_s)


def _make_model(arguments: argparse.Namespace) -> Any:
    return qwen3_moe_model(
        model_sizes(arguments),
        dtype=DTYPES[arguments.dtype],
    )


def _run_rank(arguments: argparse.Namespace, rate: float | None) -> int:
    """Measure on this rank; rank 0 writes. rate: None under torchrun."""
    with tempfile.TemporaryDirectory() as directory_of_rank, torchrun_ranks(timeout_s=arguments.timeout_s) as ranks:
        directory = Path(os.environ.get(MODEL, directory_of_rank))
        if rate is None:
            _make_model(arguments).save_pretrained(directory)
        else:
            torch.set_num_threads(1)
        overlap = OverlapConfig() if arguments.chunks is None else OverlapConfig(arguments.chunks)
        models = {
            exchange: load_spread(directory, ranks.size, exchange, overlap)
            for exchange in (OURS.exchange, "all_to_all")
        }
        generator = torch.Generator().manual_seed(ranks.rank)
        shape = arguments.sequences, arguments.tokens // arguments.sequences
        ids = torch.randint(2, 2048, shape, generator=generator).to(models["all_to_all"].device)
        measured = measure_steps(ranks, models, ids, arguments.rounds, rate)
        everybody = gather(ranks, (measured.loss_difference, measured.gradient_difference))
        loss_difference, gradient_difference = (max(one) for one in zip(*everybody, strict=True))
        results = summarize_steps(arguments, measured, ranks.size)
        results |= {"loss_difference": loss_difference, "gradient_difference": gradient_difference}
        if ranks.rank == 0:
            print(_as_table(results))
            write_json(arguments.json, "expert_parallel", results, ids.device)
    if loss_difference > LARGEST_LOSS_DIFFERENCE[arguments.dtype]:
        raise ValueError(
            f"the variants' losses differ by {loss_difference:.2g}, relative, so they computed different things and "
            "their times can't be compared: report this"
        )
    return 0


def summarize_steps(arguments: argparse.Namespace, measured: RankSteps, num_ranks: int) -> Json:
    """Return all that is shown: times by variant, the best of transformers' own, and how much faster ours is."""
    best = min((str(peer) for peer in PEERS), key=lambda name: statistics.median(measured.seconds[name]))
    variants: Json = {}
    for name, seconds in measured.seconds.items():
        case: Json = {"step": summarize(seconds)}
        if measured.seconds_on_fast_link:
            fast = measured.seconds_on_fast_link[name]
            case["step_on_fast_link"] = summarize(fast)
            case["exposed_ms"] = round(case["step"]["median_ms"] - case["step_on_fast_link"]["median_ms"], 3)
            case["sent_mb"] = round(measured.sent_mb[name], 3)
        variants[name] = case
    on_netns = arguments.netns is not None
    results = {
        "link": f"{num_ranks} network namespaces, gloo, {arguments.rate} a link" if on_netns else f"{num_ranks} ranks",
        "ranks": num_ranks,
        "layers_D_F_E_K": [
            *(arguments.layers, arguments.hidden_size, arguments.intermediate_size),
            *(arguments.experts, arguments.top_k),
        ],
        "tokens": arguments.tokens,
        "sequences": arguments.sequences,
        "dtype": arguments.dtype,
        "chunks": arguments.chunks or "auto",
        "variants": variants,
        "best_other": best,
        "ratio": ratio(variants[best]["step"], variants[str(OURS)]["step"], 3),
    }
    if measured.seconds_on_fast_link:
        peer = variants[best]
        results["compute_over_communication"] = round(peer["step_on_fast_link"]["median_ms"] / peer["exposed_ms"], 3)
    return results


def _as_table(results: Json) -> str:
    lines = [f"{results['link']}; {results['tokens']} tokens a rank, {results['dtype']}; forward and backward, ms"]
    for name, case in results["variants"].items():
        step = case["step"]
        line = (
            f"{name:<24}{step['median_ms']:8.0f} ({step['lower_quartile_ms']:.0f} to {step['upper_quartile_ms']:.0f})"
        )
        if "step_on_fast_link" in case:
            line += (
                f"   on a fast link {case['step_on_fast_link']['median_ms']:.0f}, so {case['exposed_ms']:.0f} of "
                f"communication in sight; {case['sent_mb']:.1f} MB sent"
            )
        lines.append(line)
    if "compute_over_communication" in results:
        lines.append(f"{results['best_other']}: compute / communication {results['compute_over_communication']:.2f}")
    lines.append(
        f"ratio {results['ratio']:.2f} over {results['best_other']}; losses differ {results['loss_difference']:.1g}, "
        f"gradients {results['gradient_difference']:.1g}"
    )
    return "\n".join(lines)
