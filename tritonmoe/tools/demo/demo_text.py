"""What `tritonmoe demo` shows: its text in the terminal, and its HTML page."""

import math
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.timing import all_versions, cpu_name
from tritonmoe.tools.demo.measure import VARIANTS, LayerMeasurement
from tritonmoe.tools.demo.model import ModelShape, Text
from tritonmoe.tools.demo.training import RankTraining
from tritonmoe.tools.report.charts import Curve, Curves, Heat, lanes_chart, ranks_within
from tritonmoe.tools.report.figures import Cell, Figures, Line, Table
from tritonmoe.tools.report.html import Page, Section
from tritonmoe.tools.report.perfetto import chrome_trace
from tritonmoe.tools.report.terminal import TIMELINE_LEGEND, TextStyle, heat_map, lane_timelines, sparkline
from tritonmoe.transports import LinkModel

__all__ = ["Results", "as_json", "as_page", "as_text", "rate_text", "title"]


@dataclass
class Results:
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
    report: Path | None
    """Paths of the files; None where one could not be written."""
    elapsed_s: float


def _bits(nats: float) -> float:
    return nats / math.log(2)


def rate_text(gb_per_s: float) -> str:
    """Return a bandwidth with its unit."""
    return f"{gb_per_s:.1f} GB/s" if gb_per_s >= 1 else f"{gb_per_s * 1e3:.1f} MB/s"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} cores"


def _sharing(results: Results) -> str:
    what = "one GPU" if results.device.type == "cuda" else f"{os.cpu_count()} cores"
    return f"The ranks share {what}."


def _expert_load(results: Results) -> list[int]:
    return [sum(loads) for loads in zip(*(rank.expert_load for rank in results.training), strict=True)]


def _parameters(results: Results) -> tuple[int, int]:
    """Return the model's number of parameters, and how many of them are experts'."""
    experts = sum(rank.num_expert_parameters for rank in results.training)
    return results.training[0].num_parameters + experts, experts


def as_text(results: Results, style: TextStyle) -> str:
    """Return what is printed."""
    parts = [_text_of_model(results), _text_of_training(results, style), _text_of_layer(results, style)]
    viewer = " (open it at https://ui.perfetto.dev)" if results.trace else ""
    files = {"Picture": results.png, "Trace": results.trace, "Report": results.report}
    hints = {"Trace": viewer}
    parts.append("\n".join(f"{n:8} {path or 'could not be written'}{hints.get(n, '')}" for n, path in files.items()))
    parts.append(f"{results.elapsed_s:.0f} s in all")
    return "\n\n".join(parts)


def _text_of_model(results: Results) -> str:
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
            f"Link     emulated: {rate_text(results.link.bandwidth_gb_per_s or 0.0)} per rank and direction, "
            f"{results.link.latency_us:.0f} us; chosen so that a",
            "         layer's exchanges take as long as its forward and backward do where",
            f"         rows travel at once ({results.calibrated_layer_s * 1e3:.0f} ms, measured first)",
        ]
    )


def _text_of_training(results: Results, style: TextStyle) -> str:
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


def title(layer: LayerMeasurement) -> str:
    """Return what stands above the picture."""
    return (
        f"One MoE layer on {len(layer.traffic_rows)} ranks: overlapped {layer.speed_up('serial'):.2f} times as fast as "
        "serial"
    )


def _text_of_layer(results: Results, style: TextStyle) -> str:
    layer, shape = results.layer, results.layer.shape
    num_rounds = len(layer.total_s["serial"])
    serial, overlapped = layer.shown
    lines = [
        f"One MoE layer: {shape.num_tokens} tokens per rank, "
        f"D={shape.hidden_size}, F={shape.intermediate_size}, E={shape.num_experts}, K={shape.top_k}",
        f"Emulated link of {rate_text(layer.bandwidth_gb_per_s)}: its exchanges take as long as forward and backward",
        f"do where rows travel at once ({layer.free_link_s * 1e3:.0f} ms). {_sharing(results)}",
        "",
        "Its traffic: tokens of rank i (from) that need an expert of rank k (to); each",
        "travels once, the diagonal stays at home",
        heat_map(layer.traffic_rows, style, row="from", column="to"),
        "",
        f"The median round of each, on its slowest rank: {serial.rank} serial, {overlapped.rank} overlapped",
        lane_timelines(layer.shown, style),
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
        f"  speed-up           {layer.speed_up('serial'):.2f} over serial with the same chunks, of these medians"
    )
    lines.append(f"                     (of single rounds {min(ratios):.2f} to {max(ratios):.2f}),")
    lines.append(f"                     {layer.speed_up('serial, one chunk'):.2f} over serial in one chunk")
    return "\n".join(lines)


def as_json(results: Results) -> Json:
    """Return what --json prints."""
    layer, training = results.layer, results.training
    total, experts = _parameters(results)
    paths = {"png": results.png, "trace": results.trace, "report": results.report}
    return {
        "versions": all_versions(),
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
        "paths": {name: path and str(path) for name, path in paths.items()},
        "elapsed_s": results.elapsed_s,
    }


def as_page(results: Results) -> Page:
    """Return the page: lanes, exposed communication, traffic, and how the loss fell."""
    data = as_json(results)
    number, layer = Figures(data), results.layer
    variants: list[list[Cell]] = [
        [name, number(f"layer/median_s/{name}", "s"), number(f"layer/exposed_share/{name}", "share")]
        for name in VARIANTS
    ]
    whole = Table(["schedule", "forward + backward", "communication exposed"], variants, "Medians of the rounds")
    runs = {name: layer.timelines[name] for name in ("serial", "overlapped")}
    ranks = ranks_within(runs, first=[one.rank for one in layer.shown])
    runs = {name: [timelines[rank] for rank in ranks] for name, timelines in runs.items()}
    steps = len(data["training"]["losses_nats"])
    every = max(1, steps // 12)
    shown = sorted({*range(0, steps, every), steps - 1})
    losses: list[list[Cell]] = [[f"{step + 1}", number(f"training/losses_nats/{step}", "plain")] for step in shown]
    curve = Curve("loss", [(step + 1, data["training"]["losses_nats"][step]) for step in shown])
    names = [str(rank) for rank in range(results.num_ranks)]
    traffic = Heat(
        "Tokens of a rank that need an expert of another",
        *("layer/traffic_rows", layer.traffic_rows, "count", "from rank", "to rank", names, names),
        base=min(map(min, layer.traffic_rows)),
    )
    sections = [
        Section("One layer, serial and overlapped", [
            lanes_chart("The median round of each schedule: forward, then backward", runs, whole)]),
        Section("Traffic of this layer", [traffic]),
        Section("Training", [Curves("Loss", "step", "nats a byte", [curve], Table(["step", "nats a byte"], losses))]),
    ]  # fmt: skip
    summary: list[Line] = [
        [number("ranks", "count"), f" emulated ranks on {data['machine']['name']}; the link is emulated, in wall time"],
        ["overlapped is ", number("layer/speed_up", "times"), " as fast as serial with the same chunks, ",
         number("layer/speed_up_over_one_chunk", "times"), " as fast as serial in one chunk"],
        "serial and overlapped gave the same losses, bit for bit" if results.is_bit_equal
        else "WRONG: serial and overlapped gave different losses",
    ]  # fmt: skip
    return Page("tritonmoe demo", summary, sections, data, chrome_trace(runs))
