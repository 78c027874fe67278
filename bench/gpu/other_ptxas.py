"""The checks once more, on kernels that another ptxas than Triton's own has assembled, where this machine has one."""

import glob
import json
import re
import shutil
import subprocess
from collections.abc import Iterable

from triton.backends.compiler import GPUTarget

from bench.gpu.programs import run_in_repository
from bench.gpu.workbench import Workbench
from tritonmoe.ops.kernels import launch
from tritonmoe.runtime.files import Json

__all__ = ["check_with_other_ptxas"]

PLACES = ("/usr/local/cuda*/bin/ptxas", "/opt/cuda*/bin/ptxas")
VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
Version = tuple[int, ...]


def check_with_other_ptxas(
    bench: Workbench, shape: str, num_tokens: int, routing: str, tiles: dict[str, int | str]
) -> Json:
    """Compare a layer's values with fp64 as check_samples does, in a process whose kernels another ptxas assembles.

    ptxas has made wrong code of right PTX: where this passes and check_samples doesn't, or the other way round, one of
    the two has.
    """
    arguments = {"shape": shape, "num_tokens": num_tokens, "routing": routing, "tiles": tiles}
    command = ["-m", "bench.gpu.one_case", "check_samples", json.dumps(arguments)]
    if bench.setting.is_rehearsal:
        return run_in_repository(bench, [*command, "--rehearse"], {"TRITON_INTERPRET": "1"})
    target = launch.target_of(bench.setting.device)
    if target is None or target.backend != "cuda":
        return {"left_out": "this GPU's kernels are not assembled by ptxas"}
    own = own_version(target)
    path, version = other_ptxas(own, (shutil.which("ptxas"), *_found(PLACES)))
    if not path:
        return {"left_out": f"there is no other ptxas than Triton's own, {_text(own)}"}
    found = run_in_repository(bench, command, dict.fromkeys(VARIABLES, path))
    return {**found, "ptxas": path, "version": _text(version), "own_version": _text(own)}


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _found(patterns: Iterable[str]) -> list[str]:
    return [path for pattern in patterns for path in sorted(glob.glob(pattern))]


def own_version(target: GPUTarget) -> Version:
    """Return the version of the ptxas with which Triton assembles kernels for a GPU of NVIDIA's."""
    from triton.backends.nvidia.compiler import get_ptxas

    return version_of(get_ptxas(target.arch).path)


def other_ptxas(own: Version, paths: Iterable[str | None]) -> tuple[str, Version]:
    """Return the newest ptxas of another version than Triton's own, and its version; "" where there is none."""
    found = [(version_of(path), path) for path in paths if path]
    others = [(version, path) for version, path in found if version not in (own, ())]
    version, path = max(others, default=((), ""))
    return path, version


def version_of(path: str) -> Version:
    """Return what a ptxas says that it is, (13, 0, 88); () where it can't run."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    match = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", said)
    return tuple(map(int, match.groups())) if match else ()
