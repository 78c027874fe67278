"""`python -m bench.demo`: the layer of `tritonmoe demo`, measured for the pictures of README and docs.

It writes docs/images/demo.png, which the demo draws too, and with --json what the site's own picture is drawn of.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from tritonmoe.tools.benchmarks.argument_types import output_file
from tritonmoe.tools.benchmarks.timing import write_json
from tritonmoe.tools.cli.demo import MEASURING_ROUNDS, MEASURING_TIME_LIMIT_S, draw_layer
from tritonmoe.tools.demo.measure import TimedLayer, measure_layer

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "demo.png"
NUM_RANKS = 4


def main() -> None:
    """Measure, draw and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--json", type=output_file, help="also write the figures to this file")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    shape = TimedLayer.of_device(device)
    layer = measure_layer(
        shape, NUM_RANKS, device, seed=0, rounds=MEASURING_ROUNDS, time_limit_s=MEASURING_TIME_LIMIT_S
    )
    draw_layer(layer, PICTURE)
    results = {
        "ranks": NUM_RANKS,
        "rounds": len(layer.total_s["serial"]),
        "E_K_D_F": [shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size],
        "tokens": shape.num_tokens,
        "emulated_bandwidth_gb_per_s": layer.bandwidth_gb_per_s,
        "speed_up": layer.speed_up("serial"),
        "exposed_share": layer.exposed_share,
        "timelines": [asdict(one) for one in layer.shown],
    }
    print(f"overlapped {results['speed_up']:.2f} times as fast as serial")
    write_json(arguments.json, "demo", results)


if __name__ == "__main__":
    main()
