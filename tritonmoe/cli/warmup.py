"""`tritonmoe warmup`: compile a layer's kernels before the first step, here or, with --target, for another GPU.

Triton keeps what it compiles in its cache ($TRITON_CACHE_DIR, default ~/.triton/cache).
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..benchmarks.shapes import LayerShape, draw_inputs
from ..experts import moe_mlp
from .layer_arguments import DTYPES, add_layer_arguments, layer_shape, tokens_of_every_class

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser("warmup", help="compile a layer's kernels ahead of time", description=__doc__)
    add_layer_arguments(parser)
    parser.add_argument("--target", help="compile for sm_80, sm_90, sm_100, sm_120, gfx942 or gfx950, without a GPU")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    try:
        shape = layer_shape(arguments)
    except ValueError as error:
        print(f"tritonmoe warmup: {error}", file=sys.stderr)
        return 2
    tokens, dtype = arguments.tokens or tokens_of_every_class(shape), DTYPES[arguments.dtype]
    if arguments.target is not None:
        return compile_for(arguments.target, shape, tokens, dtype, say)
    if not torch.cuda.is_available():
        print("tritonmoe warmup needs a GPU, or --target sm_90 (say) to compile for another machine's", file=sys.stderr)
        return 2
    for number, num_tokens in enumerate(tokens, 1):
        started = time.perf_counter()
        inputs = draw_inputs(shape, num_tokens, "uniform", dtype, torch.device("cuda"))
        with torch.no_grad():
            moe_mlp(inputs.x, inputs.topk_ids, inputs.topk_weights, **inputs.arguments, backend="triton")
        y = moe_mlp(inputs.x, inputs.topk_ids, inputs.topk_weights, **inputs.arguments, backend="triton")
        torch.autograd.grad(y, list(inputs.leaves.values()), inputs.dout)
        torch.cuda.synchronize()
        say(f"[{number}/{len(tokens)}] {shape.name} T={num_tokens}: {time.perf_counter() - started:.1f} s")
    return 0


def compile_for(
    target: str, shape: LayerShape, tokens: list[int], dtype: torch.dtype, say: Callable[[str], None]
) -> int:
    """Compile without running; 1 where a kernel is unfit."""
    try:
        from ..kernels import launch
        from ..kernels.aot import ARCHITECTURES, Variant, compile_one, record_launches, source_of
    except ImportError as error:
        print(f"tritonmoe warmup: the package triton can't be imported: {error}", file=sys.stderr)
        return 2
    if target not in ARCHITECTURES:
        print(f"tritonmoe warmup: --target must be one of {', '.join(ARCHITECTURES)}, got {target!r}", file=sys.stderr)
        return 2
    if launch.INTERPRETED:
        print("tritonmoe warmup: Triton's interpreter is on, unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    jobs, seen = [], set()
    for num_tokens in tokens:
        variant = Variant.of(shape, dtype, num_tokens)
        for kernel, item in record_launches(variant, ARCHITECTURES[target].target).items():
            key = source_of(item, ARCHITECTURES[target].target).hash(), str(item.options)
            if key not in seen:
                seen.add(key)
                jobs.append((num_tokens, kernel, item))
    status = 0
    for number, (num_tokens, kernel, item) in enumerate(jobs, 1):
        compiled = compile_one(f"T={num_tokens}", kernel, item, target)
        sizes = f"{compiled.registers} registers, {compiled.shared_bytes / 1024:.0f} KB shared"
        say(f"[{number}/{len(jobs)}] T={num_tokens} {kernel}: {compiled.problem or sizes}")
        status = 1 if compiled.problem else status
    return status
