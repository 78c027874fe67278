"""The sizes of the Qwen3-MoE-like model that two benchmarks train, as arguments of a command."""

import argparse

from tritonmoe.integrations.transformers.bench_model import ModelSizes
from tritonmoe.tools.benchmarks.argument_types import positive

__all__ = ["add_model_sizes", "check_model_sizes", "model_sizes"]


def add_model_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--hidden-size", type=positive, default=512)
    parser.add_argument("--intermediate-size", type=positive, default=256)
    parser.add_argument("--experts", type=positive, default=64)
    parser.add_argument("--top-k", type=positive, default=8)


def check_model_sizes(arguments: argparse.Namespace) -> None:
    """Raise ValueError for sizes that the model or grouped_mm can't take."""
    if arguments.top_k > arguments.experts:
        raise ValueError(f"--top-k {arguments.top_k} must not exceed --experts {arguments.experts}")
    if arguments.hidden_size % 16 or arguments.intermediate_size % 8:
        raise ValueError(
            "--hidden-size must be a multiple of 16, for eight heads, and --intermediate-size of 8, for the rows of "
            f"grouped_mm, got {arguments.hidden_size} and {arguments.intermediate_size}"
        )


def model_sizes(arguments: argparse.Namespace) -> ModelSizes:
    """Return the sizes that the command was given."""
    return ModelSizes(
        arguments.layers, arguments.hidden_size, arguments.intermediate_size, arguments.experts, arguments.top_k
    )
