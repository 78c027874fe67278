"""A training step of a Qwen3-MoE-like model spread over ranks by transformers: its own all_to_all against tritonmoe's.

Forward and backward are timed. Every rank has its own batch, FSDP shards the dense weights, experts are spread over all
ranks, and both implementations have the same weights. Ranks are those of torchrun, or processes in network namespaces
that --netns makes on this machine (one core and one thread each). With the default shapes compute and communication of
all_to_all take about equally long on two processes with a link of 1 Gbit/s; the time of a step on a link of 40 Gbit/s
shows how nearly.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.errors import TransportError
from tritonmoe.integrations.transformers.bench_model import load_spread, qwen3_moe_model
from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.model_halves import two_batches
from tritonmoe.overlap.tuning.tuner import SETTLING_CALLS
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import chunk_count, output_file, positive, positive_number
from tritonmoe.tools.benchmarks.model_sizes import add_model_sizes, check_model_sizes, model_sizes
from tritonmoe.tools.benchmarks.namespaces import Namespaces, ask, check_start, interface_bytes, parse_rate
from tritonmoe.tools.benchmarks.ranks import gather, slowest
from tritonmoe.tools.benchmarks.timing import Samples, ratio, summarize, synchronize, write_json
from tritonmoe.tools.benchmarks.workload import DTYPES
from tritonmoe.tools.report.terminal import refused
from tritonmoe.transports import Transport
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = [
    "OURS",
    "PEERS",
    "RankSteps",
    "main",
    "make_parser",
    "measure_steps",
    "num_settling_steps",
    "summarize_steps",
]

FAST_LINK = 40e9
"""Bits per second of a link that takes next to no time, to see what a step takes besides."""


@dataclass(frozen=True)
class Variant:
    """An exchange (ep_implementation) and the experts between (experts_implementation)."""

    exchange: str
    experts: str
    is_halved: bool = False
    """Whether two halves of the batch run at once (two_batches)."""

    def __str__(self) -> str:
        return f"{self.exchange}, {self.experts}" + (", two batches" if self.is_halved else "")


Models: TypeAlias = dict[str, Any]
"""A language model of transformers by the exchange that it uses, all with the same weights."""
Step: TypeAlias = Callable[[Variant], Tensor]
"""Runs a training step of a variant and gives its loss."""

OURS = Variant("tritonmoe", "tritonmoe")
PEERS = (Variant("all_to_all", "grouped_mm"), Variant("all_to_all", "eager"))
MIXED = Variant("all_to_all", "tritonmoe")
"""Our experts without our exchange: what is not gained by overlap."""
HALVED = Variant("tritonmoe", "tritonmoe", is_halved=True)
"""Of batches of more than one sequence."""


@dataclass
class RankSteps:
    """What every rank knows after the rounds; times are the slowest rank's."""

    seconds: Samples
    seconds_on_fast_link: Samples
    """Empty where the link's rate can't be changed."""
    sent_mb: dict[str, float]
    """Megabytes (1e6 bytes) that this rank sends in a step, by variant; empty outside of network namespaces."""
    loss_difference: float
    """The largest relative difference of any variant's loss from that of all_to_all, on this rank."""
    gradient_difference: float
    """The same of its gradients: over all parameters, the norm of the difference over the norm."""


def measure_steps(transport: Transport, models: Models, ids: Tensor, rounds: int, rate: float | None) -> RankSteps:
    """Measure forward and backward of this rank's batch `ids`, in interleaved rounds; every rank makes the same call.

    Args:
        models: by exchange, with the same weights. rate: bits per second of the link; None: it is as it is.
    """
    variants = [OURS, *([HALVED] if ids.shape[0] > 1 else []), *PEERS, MIXED]

    def step(variant: Variant) -> Tensor:
        model = models[variant.exchange]
        model.set_experts_implementation(variant.experts)
        halved = two_batches(model) if variant.is_halved else None
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if halved is not None:
            halved.remove()
        return loss.detach()

    def timed(variant: Variant) -> float:
        for model in models.values():
            model.zero_grad(set_to_none=True)
        synchronize()
        transport.barrier()
        started = time.perf_counter()
        step(variant)
        synchronize()
        return time.perf_counter() - started

    loss_difference, gradient_difference = _differences(models, variants, step)
    for _ in range(num_settling_steps(len(experts_modules(models[OURS.exchange])))):
        step(OURS)
    rates = [None] if rate is None else [rate, FAST_LINK]
    samples: list[Samples] = [{str(variant): [] for variant in variants} for _ in rates]
    sent: dict[str, float] = {}
    shuffle = random.Random(0).shuffle  # the same order on every rank
    for _ in range(rounds):
        for bits, seconds in zip(rates, samples, strict=True):
            if bits is not None:
                if transport.rank == 0:
                    ask(f"rate {bits}")
                transport.barrier()
            shuffle(variants)
            for variant in variants:
                before = 0 if rate is None else interface_bytes()[1]
                seconds[str(variant)].append(timed(variant))
                if rate is not None:
                    sent[str(variant)] = (interface_bytes()[1] - before) / 1e6
    slowest_samples = [{name: slowest(transport, values) for name, values in one.items()} for one in samples]
    return RankSteps(
        slowest_samples[0],
        slowest_samples[1] if rate is not None else {},
        sent,
        loss_difference,
        gradient_difference,
    )


def num_settling_steps(num_layers: int) -> int:
    """Return the steps until "auto" has chosen its chunks: it takes some calls, and a step makes one for each layer."""
    return -(-SETTLING_CALLS // num_layers) + 1


def _differences(models: Models, variants: list[Variant], step: Step) -> tuple[float, float]:
    """Return the largest relative differences of losses and of gradients from the first peer's."""
    expected_loss, expected = _loss_and_gradients(models, PEERS[0], step)
    losses, gradients = [], []
    for variant in variants:
        loss, actual = _loss_and_gradients(models, variant, step)
        losses.append(abs(loss - expected_loss) / abs(expected_loss))
        square = sum(float((actual[name] - expected[name]).square().sum()) for name in expected)
        gradients.append((square / sum(float(grad.square().sum()) for grad in expected.values())) ** 0.5)
    return max(losses), max(gradients)


def _loss_and_gradients(models: Models, variant: Variant, step: Step) -> tuple[float, dict[str, Tensor]]:
    model = models[variant.exchange]
    model.zero_grad(set_to_none=True)
    loss = float(step(variant))
    gradients = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        gradients[name] = (grad.to_local() if hasattr(grad, "to_local") else grad).float().clone()
    return loss, gradients


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
