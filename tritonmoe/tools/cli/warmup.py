"""`tritonmoe warmup`: compile a layer's kernels before the first step, for this GPU or, with --target, for another.

The command compiles every kernel that inference and training launch with the default options: with save="hidden" or
"input", with gradients returned or added to an fp32 main_grad. It runs none of them. Triton keeps compiled kernels in
its cache ($TRITON_CACHE_DIR, default ~/.triton/cache).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from tritonmoe.tools.benchmarks.argument_types import Subparsers, positive
from tritonmoe.tools.benchmarks.shapes import LayerShape
from tritonmoe.tools.cli.layer_arguments import DTYPES, add_layer_arguments, layer_shape, tokens_of_every_class
from tritonmoe.tools.report.terminal import refused

if TYPE_CHECKING:
    from tritonmoe.ops.kernels.launch import GPUTarget, Launch

__all__ = ["add_parser", "launches_of_layer"]

PRODUCTS = ("up", "down")
"""How the operations begin that multiply codes where experts have a precision that the card can compute in."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser("warmup", help="compile a layer's kernels ahead of time", description=__doc__)
    add_layer_arguments(parser)
    parser.add_argument(
        "--ranks",
        type=positive,
        default=1,
        help="ranks that the experts are spread over (default 1); --tokens are then the rows that one of them receives",
    )
    parser.add_argument("--target", help="compile for any card, such as sm_90 or gfx942, without a GPU")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    try:
        shape = layer_shape(arguments)
        num_experts, num_ranks = shape.num_experts, arguments.ranks
        if num_experts % num_ranks:
            sizes = ", ".join(str(size) for size in range(1, num_experts + 1) if num_experts % size == 0)
            raise ValueError(f"E ({num_experts}) must be divisible by --ranks ({num_ranks}); choose one of {sizes}")
    except ValueError as error:
        return refused("warmup", error)
    if arguments.target is None and not torch.cuda.is_available():
        print("tritonmoe warmup needs a GPU, or --target sm_90 (say) to compile for another machine's", file=sys.stderr)
        return 2
    try:
        from tritonmoe.ops.aot import architecture_named
        from tritonmoe.ops.kernels import launch
        from tritonmoe.ops.kernels.compiled import cache_refusal
    except ImportError as error:
        print(f"tritonmoe warmup: the package triton can't be imported: {error}", file=sys.stderr)
        return 2
    try:
        named = None if arguments.target is None else architecture_named(arguments.target).target
    except ValueError as error:
        print(f"tritonmoe warmup: --target: {error}", file=sys.stderr)
        return 2
    if launch.INTERPRETED:
        print("tritonmoe warmup: Triton's interpreter is on, unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    if reason := cache_refusal():
        print(
            f"tritonmoe warmup can't keep what it would compile: {reason}. TRITON_CACHE_DIR names another folder",
            file=sys.stderr,
        )
        return 2
    here = torch.device("cuda")
    target = launch.target_of(here) if named is None else named
    jobs = launches_of_layer(shape, num_ranks, arguments.tokens, DTYPES[arguments.dtype], target)
    status = 0
    for number, (num_tokens, kernel, item) in enumerate(jobs, 1):
        problem, sizes = compile_launch(f"T={num_tokens}", kernel, item, target)
        say(f"[{number}/{len(jobs)}] T={num_tokens} {kernel}: {problem or sizes}")
        status = 1 if problem else status
    return status


def launches_of_layer(
    shape: LayerShape, num_ranks: int, tokens: list[int] | None, dtype: torch.dtype, target: "GPUTarget"
) -> list[tuple[int, str, "Launch"]]:
    """Return (tokens, kernel, launch) of everything that a layer's steps would compile on `target`, each once.

    Args:
        shape: num_experts are those of all ranks.
        tokens: per call; None for every class of tiles, and for as many pairs as weights' gradients are cut from.
    """
    from tritonmoe.ops.aot import Variant, record_launches, source_of
    from tritonmoe.ops.kernels.weight_grad import MIN_SPAN

    shape = replace(shape, num_experts=shape.num_experts // num_ranks)
    tokens = tokens or sorted({*tokens_of_every_class(shape), -(-2 * MIN_SPAN // shape.top_k)})
    jobs, seen = [], set()
    for num_tokens in tokens:
        variant = replace(Variant.of(shape, dtype, num_tokens), num_ranks=num_ranks)
        launches = record_launches(variant, target)
        if of_codes := shape.precision and record_launches(replace(variant, precision=shape.precision), target):
            launches = {kernel: item for kernel, item in launches.items() if not kernel.startswith(PRODUCTS)} | of_codes
        for kernel, item in launches.items():
            key = source_of(item, target).hash(), str(item.options)
            if key not in seen:
                seen.add(key)
                jobs.append((num_tokens, kernel, item))
    return jobs


def compile_launch(variant: str, kernel: str, item: "Launch", target: "GPUTarget") -> tuple[str, str]:
    """Compile into Triton's cache; give what is wrong, and what is needed where that is known of the architecture."""
    from tritonmoe.ops.aot import architecture_named, compile_one, compile_unchecked
    from tritonmoe.ops.kernels import launch

    name = launch.architecture_of(target)
    try:
        architecture_named(name)
    except ValueError:  # a card of which nothing is known
        try:
            compile_unchecked(item, target)
        except Exception as error:  # whatever the compiler says of a card that nobody knows
            return f"{type(error).__name__}: {error}"[:2000], ""
        return "", f"compiled for {name}"
    compiled = compile_one(variant, kernel, item, name)
    return compiled.problem, f"{compiled.registers} registers, {compiled.shared_bytes / 1024:.0f} KB shared"
