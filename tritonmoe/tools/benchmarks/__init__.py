"""The benchmarks, by the name that `tritonmoe bench` knows them by; each module has main(argv)."""

import importlib
from collections.abc import Callable

__all__ = ["BENCHMARKS", "load"]

BENCHMARKS = (
    "overlap",
    "auto",
    "transformers",
    "expert_parallel",
)


def load(name: str) -> Callable[[list[str]], int | None]:
    """Return a benchmark's main(argv); it gives the exit status, or None for 0."""
    return importlib.import_module(f"{__name__}.{name}").main
