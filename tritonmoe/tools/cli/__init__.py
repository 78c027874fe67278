"""The command `tritonmoe`: one subcommand a file, each with add_parser() and run()."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from tritonmoe.runtime.version import __version__
from tritonmoe.tools.cli import bench, check, demo, doctor, env, models, plan, probe, tune, upcycle, warmup
from tritonmoe.tools.report.terminal import visible

__all__ = ["command_parser", "main"]

SUBCOMMANDS = (demo, bench, check, doctor, env, models, plan, probe, upcycle, tune, warmup)
READER_GONE = 141
"""What a shell reports of a command that SIGPIPE ended, as `| head` ends most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and give the exit status.

    0, 1 where it found something wrong, 2 where it can't run, 130 after Ctrl-C, 141 where nobody reads its output.
    """
    parser = command_parser()
    with _checked_output():
        arguments = parser.parse_args(argv)
        try:
            return arguments.run(arguments)
        except KeyboardInterrupt:
            print(f"tritonmoe {arguments.command}: interrupted", file=sys.stderr)
            return 130


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of `tritonmoe`, with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="tritonmoe", description="Mixture-of-Experts layers with Triton kernels and compute/communication overlap."
    )
    parser.add_argument("--version", action="version", version=f"tritonmoe {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


@contextlib.contextmanager
def _checked_output() -> Iterator[None]:
    """End the process cleanly, inside of this, as soon as its output can't be written."""
    with contextlib.ExitStack() as stack:
        if sys.stdout is not None:  # None: `>&-`
            output = stack.enter_context(contextlib.redirect_stdout(_Output(sys.stdout)))
            # Not under an exception, whose traceback says more.
            stack.push(lambda kind, *_: output.flush() if kind in (None, SystemExit) else None)
        if sys.stderr is not None:
            stack.enter_context(contextlib.redirect_stderr(_Output(sys.stderr)))
        yield


class _Output:
    """A standard stream: all text for the terminal goes through here, and is made visible (`report.terminal.visible`).

    A write that fails is a SystemExit: no `except OSError` takes it for a file's.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._failure_ends_it():
            return self._stream.write(visible(text))

    def flush(self) -> None:
        with self._failure_ends_it():
            self._stream.flush()

    @contextlib.contextmanager
    def _failure_ends_it(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What it still holds would fail once more when Python closes it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise SystemExit(READER_GONE) from None
            raise SystemExit(f"tritonmoe: the output could not be written: {error.strerror}") from None
