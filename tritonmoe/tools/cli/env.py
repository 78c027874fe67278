"""`tritonmoe env`: versions, devices, and which backends and transports can run here, or why they can't."""

import argparse
import json
import os
import platform

import torch

from tritonmoe.config.precision import BLOCKS
from tritonmoe.ops.backends import BACKENDS, triton_unusable_reason
from tritonmoe.ops.backends.precision_choice import how_computed
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import Subparsers
from tritonmoe.tools.benchmarks.timing import all_versions, cpu_name
from tritonmoe.transports import mpi, torch_groups

__all__ = ["add_parser", "collect"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser("env", help="show versions, devices, and what can run here", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=1) if arguments.json else _as_text(found))
    return 0


def collect() -> Json:
    """Return everything that the subcommand shows, as plain values.

    A reason of None, in backends and transports, means that it can be used. expert_precisions has how each computes.
    """
    has_cuda = torch.cuda.is_available()
    devices = [_cuda_device(index) for index in range(torch.cuda.device_count())] if has_cuda else []
    device = torch.device("cuda" if has_cuda else "cpu")
    reasons = {name: triton_unusable_reason(device) if name == "triton" else None for name in BACKENDS}
    return {
        "versions": all_versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gb": _memory_gb(),
        },
        "cuda": {"built_for": torch.version.cuda or torch.version.hip, "devices": devices},
        "backends": reasons,
        "expert_precisions": {name: how_computed(name, device) for name in BLOCKS},
        "transports": {"local": None, "emulated": None, **torch_groups.available(), **mpi.available()},
    }


def _cuda_device(index: int) -> Json:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):  # not every system has these names
        return None


def _as_text(found: Json) -> str:
    lines = ["Versions"]
    lines += [f"  {name:<13} {version or 'not installed'}" for name, version in found["versions"].items()]
    cpu = found["cpu"]
    memory = "" if cpu["memory_gb"] is None else f", {cpu['memory_gb']} GB"
    lines += ["", "Machine", f"  {'system':<13} {found['system']}"]
    lines.append(f"  {'cpu':<13} {cpu['name']}, {cpu['cores']} cores ({cpu['torch_threads']} torch threads){memory}")
    for index, device in enumerate(found["cuda"]["devices"]):
        lines.append(
            f"  {f'cuda:{index}':<13} {device['name']}, capability {device['capability']}, "
            f"{device['multiprocessors']} multiprocessors, {device['memory_gb']} GB"
        )
    if not found["cuda"]["devices"]:
        built_for = found["cuda"]["built_for"]
        reason = "this torch was built without CUDA" if built_for is None else f"none found (torch is for {built_for})"
        lines.append(f"  {'gpu':<13} {reason}")
    titles = {"Backends": "backends", "Precisions of experts": "expert_precisions", "Transports": "transports"}
    for title, key in titles.items():
        lines += ["", title]
        lines += [f"  {name:<13} {'usable' if reason is None else reason}" for name, reason in found[key].items()]
    return "\n".join(lines)
