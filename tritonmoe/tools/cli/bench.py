"""`tritonmoe bench NAME ...`: run one of the benchmarks; the arguments behind NAME are its own."""

import argparse
import sys

from tritonmoe.tools.benchmarks import BENCHMARKS, load
from tritonmoe.tools.benchmarks.argument_types import Subparsers

__all__ = ["add_parser"]

EXTRAS = ("matplotlib", "numpy", "transformers")


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser(
        "bench", help="measure: overlap, models of transformers, experts over ranks", description=__doc__
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="see tritonmoe bench NAME --help")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        return load(arguments.name)(arguments.rest) or 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"tritonmoe bench {arguments.name} needs {package}: pip install 'tritonmoe[bench]'", file=sys.stderr)
        return 2
