"""The command `tritonmoe`: one subcommand a file, each with add_parser() and run()."""

import argparse
import sys
from collections.abc import Sequence

from . import bench, demo, env, models, tune, upcycle, warmup

__all__ = ["main"]

SUBCOMMANDS = (demo, bench, env, models, upcycle, tune, warmup)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and give the exit status.

    0, 1 where it found something wrong, 2 where it can't run, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="tritonmoe", description="Mixture-of-Experts layers with Triton kernels and compute/communication overlap."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in SUBCOMMANDS:
        module.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"tritonmoe {arguments.command}: interrupted", file=sys.stderr)
        return 130
