"""`tritonmoe tune`: search faster tile configurations for a layer on this GPU, or show what would be chosen.

The result goes to tiles.json in $TRITONMOE_CACHE_DIR (default ~/.cache/tritonmoe), and every launch of a kernel uses it
from then on. Every measurement is written to tuning.jsonl beside it at once: if the command is stopped, run it again,
and it goes on there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.ops.backends import triton_unusable_reason
from tritonmoe.tools.benchmarks.argument_types import Subparsers
from tritonmoe.tools.benchmarks.shapes import LayerShape
from tritonmoe.tools.cli.layer_arguments import DTYPES, add_layer_arguments, layer_shape, tokens_of_every_class
from tritonmoe.tools.report.terminal import refused

if TYPE_CHECKING:
    from tritonmoe.ops.kernels.gpus import Architecture
    from tritonmoe.ops.kernels.tiles.config import TileConfig

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser("tune", help="search tile configurations on this GPU", description=__doc__)
    add_layer_arguments(parser, sizes_required=False)
    show_help = "print the configurations that are chosen, or without a layer the table of tiles; needs no GPU"
    parser.add_argument("--show", action="store_true", help=show_help)
    parser.add_argument("--json", action="store_true", help="with --show and a layer: print one JSON object")
    parser.add_argument("--target", help="with --show: any card, such as sm_90 (the default) or gfx942")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    try:
        if arguments.target and not arguments.show:
            raise ValueError("--target belongs to --show: without --show this machine's GPU is measured")
        if arguments.json and not arguments.show:
            raise ValueError("--json belongs to --show: add --show, or leave --json out")
        if arguments.show and arguments.num_experts is None and arguments.target is None:
            if arguments.json:
                raise ValueError("--json shows the tiles of a layer: give E, K, D and F")
            return show_table(say)
        if arguments.intermediate_size is None:
            raise ValueError("E, K, D and F are required; --show without them prints the table of tiles")
        shape = layer_shape(arguments)
        tokens = arguments.tokens or tokens_of_every_class(shape)
        if arguments.show:
            tiles = chosen_tiles(shape, tokens, DTYPES[arguments.dtype], arguments.target or "sm_90")
            say(_as_json(tiles) if arguments.json else _as_text(tiles))
            return 0
    except ImportError as error:
        return _without_triton(error)
    except (ValueError, OSError) as error:
        return refused("tune", error)
    reason = triton_unusable_reason(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if reason is not None or not torch.cuda.is_available():
        print(
            f"tritonmoe tune measures on a GPU, and there is none that Triton can use: {reason or 'interpreter only'}. "
            "--show prints what is chosen without one.",
            file=sys.stderr,
        )
        return 2
    from tritonmoe.ops.kernels import launch
    from tritonmoe.ops.kernels.tiles import measured_tiles
    from tritonmoe.tools.benchmarks.tuning import tune

    try:
        path = measured_tiles.cache_file()
        # A damaged file, or a folder that is read-only, is said before anything is measured.
        measured_tiles.write(path, {})
    except (OSError, ValueError) as error:
        print(
            f"tritonmoe tune can't keep what it would find: {error}. TRITONMOE_CACHE_DIR names another folder",
            file=sys.stderr,
        )
        return 2
    done: set[str] = set()
    try:
        if shape.precision is not None:
            check_codes(shape.precision, launch.gpu_of(torch.device("cuda")))
        for num_tokens in sorted(tokens, reverse=True):  # the longest sums say most of a class without an upper end
            say(f"{shape.name} T={num_tokens} {arguments.dtype}")
            found: dict[str, dict[str, int | str]] = {}
            samples_file = path.with_name("tuning.jsonl")
            try:
                for found in tune(shape, num_tokens, DTYPES[arguments.dtype], samples_file, say, done):
                    measured_tiles.write(path, found)
            except torch.OutOfMemoryError:
                say(f"T={num_tokens} is left out: it doesn't fit into the GPU's memory")
            say(f"{len(found)} entries written to {path}")
    except (OSError, ValueError) as error:
        return refused("tune", error)
    return 0


def show_table(say: Callable[[str], None]) -> int:
    """Print the table of tiles by rules of thumb, which entries that were measured replace."""
    from tritonmoe.ops.kernels.tiles.table import TABLE

    say(TABLE.rstrip())
    return 0


def _without_triton(error: ImportError) -> int:
    print(f"tritonmoe tune: the package triton can't be imported: {error}", file=sys.stderr)
    return 2


def chosen_tiles(
    shape: LayerShape, tokens: Sequence[int], dtype: torch.dtype, target: str
) -> "dict[str, tuple[TileConfig, str]]":
    """Return every product's tile, with how its operands are read, and where the choice comes from, by its key.

    Raises:
        ValueError: there is no such target, or it has no such products. ImportError: there is no triton.
    """
    from tritonmoe.ops.aot import Variant, architecture_named, record_launches
    from tritonmoe.ops.kernels.tiles import measured_tiles
    from tritonmoe.ops.kernels.tiles.config import TileConfig

    gpu = architecture_named(target)
    if shape.precision is not None:
        check_codes(shape.precision, gpu)
    tuned = measured_tiles.kept()
    tiles: dict[str, tuple[TileConfig, str]] = {}
    for num_tokens in tokens:
        variant = replace(Variant.of(shape, dtype, num_tokens), precision=shape.precision)
        with measured_tiles.asked() as found:
            record_launches(variant, gpu.target)
        for key, config in found.items():
            source = "tuned" if key in tuned else "shipped" if key in measured_tiles.SHIPPED else "heuristic"
            tiles[key] = config, source
    return tiles


def check_codes(precision: ExpertPrecision, gpu: "Architecture") -> None:
    """Raise ValueError where a GPU has no instruction for the codes of a precision."""
    if precision.format not in gpu.precisions:
        raise ValueError(
            f"{gpu.name} multiplies no {precision.format} codes: experts in it run the kernels of bfloat16 "
            "there, so leave --expert-precision out"
        )


def _as_text(tiles: "Mapping[str, tuple[TileConfig, str]]") -> str:
    return "\n".join(f"{key}: {config} ({source})" for key, (config, source) in tiles.items())


def _as_json(tiles: "Mapping[str, tuple[TileConfig, str]]") -> str:
    found = {key: {"tile": asdict(config), "source": source} for key, (config, source) in tiles.items()}
    return json.dumps(found, indent=1)
