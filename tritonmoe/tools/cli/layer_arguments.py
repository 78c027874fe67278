"""The arguments that describe one layer, for `tune` and `warmup`."""

import argparse

import torch

from tritonmoe.config.activations import ACTIVATION_NAMES, ClampedSwiGLU
from tritonmoe.config.formats import FORMATS
from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.precision import BLOCKS, ExpertPrecision
from tritonmoe.tools.benchmarks.argument_types import positive
from tritonmoe.tools.benchmarks.shapes import LayerShape

__all__ = ["DTYPES", "add_layer_arguments", "layer_shape", "tokens_of_every_class"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ACTIVATIONS = (*ACTIVATION_NAMES, "clamped")


def add_layer_arguments(parser: argparse.ArgumentParser, *, sizes_required: bool = True) -> None:
    """Add E, K, D, F, the dtype and the layout; a size that is not given, where none is required, is None."""
    nargs = None if sizes_required else "?"
    parser.add_argument("num_experts", metavar="E", type=positive, nargs=nargs, help="experts")
    parser.add_argument("top_k", metavar="K", type=positive, nargs=nargs, help="experts per token")
    parser.add_argument("hidden_size", metavar="D", type=positive, nargs=nargs, help="model width")
    parser.add_argument("intermediate_size", metavar="F", type=positive, nargs=nargs, help="width of one expert")
    parser.add_argument("dtype", choices=list(DTYPES), nargs="?", default="bfloat16", help="default bfloat16")
    parser.add_argument(
        "--tokens", type=positive, nargs="+", help="tokens per call; default: one of every class of tiles"
    )
    parser.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        default="silu",
        help="activation of the experts; clamped is gpt-oss's (default silu)",
    )
    parser.add_argument("--ungated", action="store_true", help="experts without a gate")
    parser.add_argument("--interleaved", action="store_true", help="columns of gate and up alternate")
    parser.add_argument("--transposed", action="store_true", help="weights as (E, D, 2F) and (E, F, D)")
    parser.add_argument("--bias", action="store_true", help="experts with biases")
    parser.add_argument("--weight-format", choices=FORMATS, help="of frozen weights that are packed (QuantizedWeight)")
    parser.add_argument("--expert-precision", choices=BLOCKS, help="of experts that train in 8 bits (ExpertPrecision)")


def layer_shape(arguments: argparse.Namespace) -> LayerShape:
    """Return the layer; ValueError where there can be none like it."""
    a = arguments
    activation = ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0) if a.activation == "clamped" else a.activation
    sizes = (a.hidden_size, a.intermediate_size, a.num_experts, a.top_k)
    if a.weight_format is not None and a.dtype != "bfloat16":
        raise ValueError(f"--weight-format {a.weight_format} is of experts that compute in bfloat16, got {a.dtype}")
    if a.expert_precision is not None and a.dtype != "bfloat16":
        raise ValueError(f"--expert-precision {a.expert_precision} is of experts in bfloat16, got {a.dtype}")
    if a.expert_precision is not None and a.weight_format is not None:
        raise ValueError(
            f"--expert-precision {a.expert_precision} is of experts that train, and those with --weight-format "
            f"{a.weight_format} are frozen: give one"
        )
    precision = None if a.expert_precision is None else ExpertPrecision(a.expert_precision)
    gates = not a.ungated, a.interleaved, a.transposed
    layout = MoEConfig(*sizes, activation, *gates, weight_format=a.weight_format).layout
    name = f"E={a.num_experts} K={a.top_k} D={a.hidden_size} F={a.intermediate_size}"
    name += "".join(f" {stored_as}" for stored_as in (a.weight_format, a.expert_precision) if stored_as)
    experts = a.num_experts, a.top_k, a.hidden_size, a.intermediate_size
    return LayerShape(name, *experts, activation, layout, a.bias, a.weight_format, precision)


def tokens_of_every_class(shape: LayerShape) -> list[int]:
    """Return token counts of every class of tiles: 1 token, then about 16, 32, 64, 128, ... 4096 pairs per expert."""
    from tritonmoe.ops.kernels.tiles.tile_choice import LONG_SUMS

    return sorted({1, *(-(-pairs * shape.num_experts // shape.top_k) for pairs in (16, 32, 64, *LONG_SUMS))})
