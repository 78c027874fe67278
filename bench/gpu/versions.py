"""What machine a day's figures are from: versions, the card's limits and clocks, and the tools that are there."""

import shutil

import torch

from bench.gpu.workbench import Workbench
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.kept_results import query_gpu
from tritonmoe.tools.benchmarks.timing import all_versions, environment

__all__ = ["describe_machine"]

FIELDS = (
    *("driver_version", "vbios_version", "clocks.max.sm", "clocks.max.mem", "clocks.applications.graphics"),
    *("power.limit", "ecc.mode.current", "persistence_mode", "mig.mode.current", "temperature.gpu"),
)
TOOLS = ("ncu", "nsys", "compute-sanitizer", "nvidia-smi")


def describe_machine(bench: Workbench) -> Json:
    """Return all of it; the fields of a card that doesn't tell are missing."""
    found = query_gpu(*FIELDS)
    device: Json = {}
    if bench.setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.setting.device)
        device = {
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 2),
            "capability": list(torch.cuda.get_device_capability(bench.setting.device)),
        }
    return {
        "environment": environment(bench.setting.device),
        "versions": all_versions(),
        "cuda": torch.version.cuda,
        "card": dict(zip(FIELDS, found, strict=True)) if found is not None else None,
        "tools": {tool: shutil.which(tool) is not None for tool in TOOLS},
        **device,
    }
