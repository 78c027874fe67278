"""`tritonmoe check`: whether this GPU's kernels compute what plain PyTorch does, operation by operation.

The command runs small layers of every layout and dtype, and routers of every rule, forward and backward; that takes
seconds once the kernels are compiled. The largest error of a result, and its root mean square, may be twice those of
plain PyTorch in the same dtype. If one is larger, the exit status is 1: don't train with those kernels. Until they are
mended, use layers with backend="torch", or on one device experts_implementation="grouped_mm" of transformers.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import cast

import torch

from tritonmoe.ops.backends import choose, triton_unusable_reason
from tritonmoe.ops.backends.ops import Operations
from tritonmoe.tools.benchmarks.argument_types import Subparsers

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser("check", help="compare this GPU's kernels with plain PyTorch", description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with every comparison instead of the text"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = triton_unusable_reason(device)
    if reason is not None:
        print(f"tritonmoe check: there are no kernels to check, since {reason}", file=sys.stderr)
        return 2
    from tritonmoe.ops.backends.encoded import EncodedOperations
    from tritonmoe.ops.backends.kernel_check import CASES, SMALL_CASES, check_layer
    from tritonmoe.ops.kernels import launch
    from tritonmoe.ops.kernels.tiles import measured_tiles
    from tritonmoe.routing.router_check import ROUTERS, SMALL_ROUTERS, check_router

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    layers, routers = (SMALL_CASES, SMALL_ROUTERS) if launch.INTERPRETED else (CASES, ROUTERS)
    checks, emulated = [], set()
    for layer in layers:
        ops = choose("triton", device, layer.dtype)
        if layer.precision is not None:
            if layer.precision.format not in launch.gpu_of(device).precisions:
                emulated.add(layer.precision.format)
                continue
            ops = cast(Operations, EncodedOperations(layer.precision))
        checks.append((layer.name, check_layer(layer, ops, device)))
    checks += [(router.name, check_router(router, device)) for router in routers]
    found, wrong = [], 0
    for case, results in checks:
        with measured_tiles.asked() as tiles:
            checked = list(results)
        found += checked
        bad = [one for one in checked if not one.is_right]
        wrong += len(bad)
        if arguments.json:
            continue
        print(f"{case:24} {len(checked):3} results, " + (f"{len(bad)} WRONG" if bad else "all right"))
        for one in bad:
            print(f"  {one}")
        if bad:
            print("".join(f"  tiles of {key}: {config}\n" for key, config in tiles.items()), end="")
    if arguments.json:
        comparisons = [{**asdict(one), "is_right": one.is_right} for one in found]
        about = {"device": name, "triton": launch.TRITON_VERSION, "emulated_precisions": sorted(emulated)}
        print(json.dumps({**about, "wrong": wrong, "results": comparisons}))
    else:
        for precision_format in sorted(emulated):
            print(f"{precision_format:24} no kernels of its own: bf16 kernels multiply rounded numbers on this GPU")
        print(f"{name}: {len(found)} results compared, {wrong} wrong")
    return 1 if wrong else 0
