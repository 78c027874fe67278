"""A Qwen3-MoE-like model and one of its blocks under tritonmoe, transformers' own experts implementations, and Liger.

Everything runs in one process, in turn, with the same weights; only experts_implementation changes. Every call has a
new batch, the same one for all implementations: what an implementation prepared for an earlier routing doesn't help it.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tritonmoe.integrations.transformers import collect_statistics
from tritonmoe.integrations.transformers.bench_model import PEERS, peer_unusable_reason, qwen3_moe_model, register_liger
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import picture_file, positive
from tritonmoe.tools.benchmarks.model_sizes import add_model_sizes, check_model_sizes, model_sizes
from tritonmoe.tools.benchmarks.step_memory import kept_for_backward_mb, peak_mb
from tritonmoe.tools.benchmarks.timing import add_arguments, interleave, ratio, summarize, write_json
from tritonmoe.tools.benchmarks.workload import DTYPES
from tritonmoe.tools.report.png import new_figure, write_picture

__all__ = [
    "main",
]

OURS = "tritonmoe"
BATCHED_MM_LARGEST_T = 64
"""batched_mm copies the weights for every pair."""
ROUTINGS = {"untrained": 0.0, "skewed": 1.0}
"""The skew of a random router: see qwen3_moe_model. Rows of a model's later layers are alike, so that even without any
such a router is far from uniform there, as MaxVio says."""
PASSES = ("training", "prefill", "decode")


NUM_BATCHES = 16


class Subject:
    """The model or its first MoE block, and its three passes; every variant sets its implementation and batch first."""

    def __init__(self, model: Any, is_block: bool, num_tokens: int, new_tokens: int) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.block = model.model.layers[0].mlp if is_block else None
        device = model.device
        generator = torch.Generator().manual_seed(1)
        vocab_size, width = model.config.vocab_size, model.config.hidden_size
        self.batches = [
            (
                torch.randint(2, vocab_size, (1, num_tokens), generator=generator).to(device),
                torch.randn(1, num_tokens, width, generator=generator).to(device, model.dtype).requires_grad_(),
            )
            for _ in range(NUM_BATCHES)
        ]
        self.take(0)

    def take(self, call: int) -> None:
        """Make the passes run on the batch of this call: token ids (1, T) of the model, rows (1, T, D) of the block."""
        self.ids, self.rows = self.batches[call % NUM_BATCHES]

    def training(self) -> None:
        """Forward and backward; no optimizer step, which no implementation changes."""
        self.forward_with_graph().backward()
        self.model.zero_grad(set_to_none=True)
        self.rows.grad = None

    def forward_with_graph(self) -> torch.Tensor:
        if self.block is None:
            return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return _first(self.block(self.rows)).float().square().mean()

    @torch.no_grad()
    def prefill(self) -> None:
        if self.block is None:
            self.model(input_ids=self.ids, use_cache=False)
        else:
            self.block(self.rows)

    @torch.no_grad()
    def decode(self) -> None:
        """Greedy generation of new_tokens at batch 1 behind 16 tokens; of a block, as many calls with one token."""
        if self.block is None:
            self.model.generate(
                self.ids[:, :16], max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens, do_sample=False
            )
        else:
            for _ in range(self.new_tokens):
                self.block(self.rows[:, :1])


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def peers_that_run(subject: Subject, kind: str, num_tokens: int) -> tuple[list[str], dict[str, str]]:
    """Return the implementations that can do this pass here, and why the others can't."""
    usable, reasons = [], {}
    for name in PEERS:
        reason = peer_unusable_reason(name, subject.model.device, plain=True)
        if reason is not None:
            reasons[name] = reason
            continue
        if name == "batched_mm" and kind != "decode" and num_tokens > BATCHED_MM_LARGEST_T:
            reasons[name] = f"copies the weights for every pair: not tried above {BATCHED_MM_LARGEST_T} tokens"
            continue
        try:
            variant(subject, kind, name)()
            usable.append(name)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return usable, reasons


def variant(subject: Subject, kind: str, implementation: str) -> Callable[[], None]:
    run, calls = getattr(subject, kind), itertools.count()

    def set_and_run() -> None:
        subject.model.set_experts_implementation(implementation)
        subject.take(next(calls))
        run()

    return set_and_run


def measure(subject: Subject, kind: str, num_tokens: int, rounds: int, seconds: float) -> Json:
    """Return times and memory of every implementation, the best other one and the ratio of its median to ours."""
    peers, reasons = peers_that_run(subject, kind, num_tokens)
    names = [OURS, *peers]
    samples = interleave({name: variant(subject, kind, name) for name in names}, rounds, seconds=seconds)
    best = min(peers, key=lambda name: statistics.median(samples[name]))
    times = {name: summarize(of_one) for name, of_one in samples.items()}
    case: Json = {
        "times": times,
        "best_other": best,
        "ratio": ratio(times[best], times[OURS], 3),
        "not_run": reasons,
    }
    case["peak_mb"] = {name: peak_mb(variant(subject, kind, name)) for name in names}
    if kind == "training":
        case["kept_for_backward_mb"] = {name: kept(subject, name) for name in names}
    return case


def kept(subject: Subject, implementation: str) -> float:
    subject.model.set_experts_implementation(implementation)
    return kept_for_backward_mb(subject.forward_with_graph, subject.model.parameters())


def largest_violation(subject: Subject) -> float:
    """Return the mean over layers of MaxVio, to say how skewed the routing is."""
    with collect_statistics(subject.model) as collected:
        subject.prefill()
    layers = collected.layers.values()
    return round(sum(layer.max_violation for layer in layers) / len(layers), 3)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tritonmoe bench transformers", description=__doc__)
    parser.add_argument("--subjects", nargs="+", default=["block", "model"], choices=["block", "model"])
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS), choices=list(ROUTINGS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens of training and prefill (default 1024)")
    parser.add_argument("--new-tokens", type=positive, default=16, help="tokens that decode generates (default 16)")
    add_model_sizes(parser)
    parser.add_argument("--png", type=picture_file, help="also draw the figures")
    add_arguments(parser, rounds=7)
    return parser


def _check_used(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise ValueError for an option that nothing of what is to be measured would heed."""
    has_prompt = "decode" in arguments.passes and "model" in arguments.subjects
    for name, is_used, way in (
        ("layers", "model" in arguments.subjects, "add model to --subjects"),
        ("new_tokens", "decode" in arguments.passes, "add decode to --passes"),
        ("tokens", arguments.passes != ["decode"] or has_prompt, "add training or prefill to --passes"),
    ):
        if getattr(arguments, name) != parser.get_default(name) and not is_used:
            option = f"--{name.replace('_', '-')} {getattr(arguments, name)}"
            raise ValueError(f"{option} has no effect on this measurement: leave the option out, or {way}")


def main(argv: list[str] | None = None) -> None:
    """Print a table, a line for each case; ratio is the best other median over ours."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        check_model_sizes(arguments)
        _check_used(arguments, parser)
    except ValueError as error:
        parser.error(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register_liger()
    results = []
    for dtype in arguments.dtypes:
        for routing in arguments.routings:
            model = qwen3_moe_model(
                model_sizes(arguments),
                dtype=DTYPES[dtype],
                device=device,
                skew=ROUTINGS[routing],
            )
            for name in arguments.subjects:
                subject = Subject(model, name == "block", arguments.tokens, arguments.new_tokens)
                max_violation = largest_violation(subject)
                for kind in arguments.passes:
                    case = {
                        "subject": name,
                        "layers_D_F_E_K": [
                            *(arguments.layers, arguments.hidden_size, arguments.intermediate_size),
                            *(arguments.experts, arguments.top_k),
                        ],
                        "T": 1 if kind == "decode" else arguments.tokens,
                        "dtype": dtype,
                        "routing": routing,
                        "max_violation": max_violation,
                        "pass": kind,
                        **measure(subject, kind, arguments.tokens, arguments.rounds, arguments.seconds),
                    }
                    results.append(case)
                    about = f"{name} {kind} {dtype} {routing}"
                    print(f"{about}: {case['ratio']:.2f} times as fast as {case['best_other']}", flush=True)
    print(as_table(results, (OURS, *PEERS)))
    for peer, reason in {peer: why for case in results for peer, why in case["not_run"].items()}.items():
        print(f"not run somewhere: {peer} ({reason})")
    write_json(arguments.json, "transformers", results, device)
    if arguments.png is not None:
        write_png(arguments.png, results, (OURS, *PEERS))
        print(f"wrote {arguments.png}")


def as_table(results: list[Json], names: Sequence[str]) -> str:
    """Return a line for each case: median ms and peak MB under every implementation, and the ratio.

    Args:
        names: the implementations, ours first.
    """
    names = _measured(results, names)
    head = ["", "pass", "T", "dtype", "routing", *names, "ratio"]
    lines = [head]
    for case in results:
        cells = [
            f"{case['times'][name]['median_ms']:.1f} / {case['peak_mb'][name]:.1f}" if name in case["times"] else "-"
            for name in names
        ]
        about = [str(case[key]) for key in ("subject", "pass", "T", "dtype", "routing")]
        lines.append([*about, *cells, f"{case['ratio']:.2f} over {case['best_other']}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    kept = [
        f"kept for backward, {case['subject']} {case['dtype']} {case['routing']}, MB: "
        + "  ".join(f"{name} {value:.1f}" for name, value in case["kept_for_backward_mb"].items())
        for case in results
        if "kept_for_backward_mb" in case
    ]
    return "\n".join(["median ms / peak MB of a call; ratio: best other median over ours", *text, *kept])


def write_png(path: Path, results: list[Json], names: Sequence[str]) -> None:
    """Draw a bar for every implementation of every case, as a multiple of the median time of names[0]."""
    figure = new_figure(11, 1.2 + 0.55 * len(results), "constrained")
    axes = figure.add_subplot()
    ours, names = names[0], _measured(results, names)
    height = 0.8 / len(names)
    for position, name in enumerate(names):
        here = [(line, case) for line, case in enumerate(results) if name in case["times"]]
        medians = [case["times"][name]["median_ms"] / case["times"][ours]["median_ms"] for _, case in here]
        axes.barh([line + position * height for line, _ in here], medians, height=height, label=name)
    labels = [f"{case['subject']}, {case['pass']}, {case['dtype']}, {case['routing']}" for case in results]
    axes.set_yticks([line + 0.4 - height / 2 for line in range(len(results))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#333333", lw=1)
    axes.set_xlabel(f"multiple of {ours}'s time")
    axes.legend()
    write_picture(path, figure)


def _measured(results: list[Json], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(name in case["times"] for case in results)]
