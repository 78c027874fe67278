"""`tritonmoe models`: which model families of the installed transformers run through tritonmoe, and how."""

import argparse
import dataclasses
import json
from collections.abc import Sequence

from tritonmoe.integrations.transformers.discovery import ExpertsClass, experts_classes, unsupported_classes
from tritonmoe.integrations.transformers.gates import named_activation
from tritonmoe.integrations.transformers.upcycle.native import NATIVE_TARGETS
from tritonmoe.tools.benchmarks.argument_types import Subparsers
from tritonmoe.tools.benchmarks.timing import package_versions
from tritonmoe.tools.report.terminal import refused

__all__ = ["add_parser"]

COLUMNS = ("model type", "experts class", "weights", "activation")


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser("models", help="list the model families that are supported", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        supported, others = experts_classes(), unsupported_classes()
    except ImportError as error:
        return refused("models", error)
    version = package_versions("transformers")["transformers"]
    if arguments.json:
        found = {
            "transformers": version,
            "supported": [dataclasses.asdict(one) | {"activation": named_activation(one)} for one in supported],
            "unsupported": [dataclasses.asdict(one) for one in others],
            "upcycled": _upcycled(supported),
        }
        print(json.dumps(found, indent=1))
        return 0
    rows = [(one.model_type, one.name, _weights(one), named_activation(one)) for one in supported]
    print("\n".join(_markdown(rows) if arguments.markdown else _plain(rows)))
    families = len({one.model_type for one in supported})
    print(f"\n{len(supported)} experts classes in {families} model types of transformers {version}.")
    twins = ", ".join(f"{dense} to {moe}" for dense, moe in _upcycled(supported).items())
    print(f"Dense model types that `tritonmoe upcycle` turns into one of these (others in place): {twins}.")
    names: dict[str, list[str]] = {}
    for other in others:
        names.setdefault(other.model_type, []).append(other.name)
    print("Not supported, since their experts ask no registry of transformers:")
    print("\n".join(f"- {model_type}: {', '.join(classes)}" for model_type, classes in names.items()))
    return 0


def _upcycled(supported: Sequence[ExpertsClass]) -> dict[str, str]:
    """Return the dense model types that upcycle() converts natively here, and what they become."""
    model_types = {one.model_type for one in supported}
    twins = {dense: target.model_type for dense, target in NATIVE_TARGETS.items()}
    return {dense: moe for dense, moe in twins.items() if moe in model_types}


def _weights(one: ExpertsClass) -> str:
    shape = ("(E, D, 2F)" if one.is_transposed else "(E, 2F, D)").replace("2F", "2F" if one.is_gated else "F")
    traits = {
        "interleaved": one.is_interleaved,
        "biases": one.has_bias,
        "norm before weighting": one.has_post_expert_norm,
    }
    return ", ".join([shape, *(trait for trait, is_there in traits.items() if is_there)])


def _plain(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = (COLUMNS, tuple("-" * width for width in widths), *rows)
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _markdown(rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = (COLUMNS, ("---",) * len(COLUMNS), *rows)
    return [f"| {' | '.join(line)} |" for line in lines]
