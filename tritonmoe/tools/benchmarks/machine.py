"""What a figure of a GPU belongs to: the card, its driver, the versions, and the sources that were measured."""

import functools
import subprocess
from pathlib import Path

import torch

from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.kept_results import source_hash
from tritonmoe.tools.benchmarks.timing import cpu_name, package_versions

__all__ = ["identity", "query_gpu"]

PACKAGES = ("torch", "triton", "transformers", "liger-kernel")


def query_gpu(*fields: str) -> list[str] | None:
    """Return what nvidia-smi says of these fields of the first GPU, None where there is no nvidia-smi or no GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return [value.strip() for value in found.splitlines()[0].split(",")]


@functools.cache
def _sources() -> str:
    return source_hash(Path(__file__).parents[2])


def identity() -> Json:
    """Return card, driver, versions and a hash of tritonmoe's files: results of two that differ are not mixed."""
    has_gpu = torch.cuda.is_available()
    driver = query_gpu("driver_version") if has_gpu else None
    return {
        "device": torch.cuda.get_device_name() if has_gpu else cpu_name(),
        "driver": None if driver is None else driver[0],
        "versions": package_versions(*PACKAGES),
        "sources": _sources(),
    }
