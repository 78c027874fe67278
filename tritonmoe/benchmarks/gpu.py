"""Everything that is measured on a GPU, by one command that can be stopped and goes on where it was.

Correctness against fp64 first, then the layer beside its peers, then single kernels. Every finished case is a file of
its own in the output folder; a rerun does what is missing. A call starts no new case after its budget, so that three
calls of under eight minutes do everything on an H100. A case that raised is finished too, with its error: delete its
file to run it again. On a CPU the same code runs with tiny shapes.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tritonmoe.benchmarks.argument_types import output_file, output_folder, positive
from tritonmoe.benchmarks.gpu_cases import Setting, check, measure_layer
from tritonmoe.benchmarks.gpu_kernels import measure_kernels
from tritonmoe.benchmarks.shapes import GPU_SHAPES, LayerShape, tiny
from tritonmoe.benchmarks.timing import environment
from tritonmoe.runtime.files import Json, write_whole

__all__ = ["Case", "cases", "main"]

TOKENS = (32768, 4096, 512, 64, 8, 1)
ROUTINGS = ("uniform", "zipf")
MEASURES: dict[str, Callable[[LayerShape, int, str, Setting], Json]] = {
    "check": check,
    "layer": measure_layer,
    "kernels": measure_kernels,
}


@dataclass(frozen=True)
class Case:
    """One file of results."""

    kind: str
    """"check", "layer" or "kernels"."""
    shape: LayerShape
    num_tokens: int
    routing: str

    @property
    def file_name(self) -> str:
        shape = re.sub(r"[^\w.-]+", "_", self.shape.name)
        return f"{self.kind}-{shape}-T{self.num_tokens}-{self.routing}.json"


def cases(is_tiny: bool) -> Iterator[Case]:
    """Give all cases, what matters most first: a run that is cut short has the headlines."""
    shapes = list(GPU_SHAPES.values())
    if is_tiny:
        shapes = [tiny(shape) for shape in shapes if shape.name != "DeepSeek-V3"]
    tokens = (9,) if is_tiny else TOKENS
    # fp64 on a whole batch takes too long; few tokens leave experts empty, zipf gives hot ones.
    for num_tokens in (9, 1) if is_tiny else (512, 1):
        for shape in shapes:
            yield Case("check", shape, num_tokens, "zipf")
    for routing in ROUTINGS:
        for num_tokens in tokens:
            for shape in shapes:
                yield Case("layer", shape, num_tokens, routing)
                if routing == "uniform" and num_tokens in tokens[:2]:
                    yield Case("kernels", shape, num_tokens, routing)


def main(argv: list[str] | None = None) -> int:
    """Run the missing cases; give 0 when none is left, 3 when some are, 1 when one went wrong, 2 when it can't run."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=output_folder, required=True, help="folder of results; a rerun goes on in it")
    parser.add_argument("--budget-s", type=float, default=420.0, help="start no case after so many seconds (420)")
    parser.add_argument("--rounds", type=positive, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--kinds", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; always so on a CPU")
    parser.add_argument("--summary", type=output_file, help="also write all finished cases to this one file")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_tiny = arguments.tiny or device.type == "cpu"
    setting = Setting(device, torch.bfloat16, "auto", arguments.rounds, 0.001 if is_tiny else 0.02)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"python -m bench.gpu: --out {arguments.out} can't be made: {error}", file=sys.stderr)
        return 2
    run = {"tiny": is_tiny, "rounds": arguments.rounds, "environment": {**environment(), **_machine()}}
    if (problem := _belongs_elsewhere(arguments.out, run)) is not None:
        print(problem, file=sys.stderr)
        return 2

    started = time.perf_counter()
    wanted = [case for case in cases(is_tiny) if case.kind in arguments.kinds]
    missing = [case for case in wanted if not (arguments.out / case.file_name).exists()]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} cases are finished in {arguments.out}")
    for number, case in enumerate(missing):
        if time.perf_counter() - started > arguments.budget_s:
            print(f"{len(missing) - number} cases are left: run the same command again")
            break
        begun = time.perf_counter()
        result = _run(case, setting)
        result["seconds"] = round(time.perf_counter() - begun, 2)
        described = {"kind": case.kind, "shape": case.shape.name, "T": case.num_tokens, "routing": case.routing}
        sizes = case.shape
        described["E_K_D_F"] = [sizes.num_experts, sizes.top_k, sizes.hidden_size, sizes.intermediate_size]
        _write(arguments.out / case.file_name, {**described, **result})
        print(f"{case.file_name}: {_headline(result)} ({result['seconds']:.1f} s)", flush=True)
        if "failed" in result and not _device_works(device):
            print("the error is the device's, which computes nothing more for this process: run the same command again")
            break
    finished = [
        json.loads((arguments.out / case.file_name).read_text())
        for case in wanted
        if (arguments.out / case.file_name).exists()
    ]
    if arguments.summary is not None:
        _write(arguments.summary, {"benchmark": "gpu", **run, "results": finished})
    wrong = [item for item in finished if item.get("passed") is False or "failed" in item]
    for item in wrong:
        what = item["failed"] if "failed" in item else item["errors"]
        print(f"WRONG: {item['kind']} {item['shape']} T={item['T']} {item['routing']}: {what}", file=sys.stderr)
    if wrong:
        return 1
    return 3 if len(finished) < len(wanted) else 0


def _run(case: Case, setting: Setting) -> Json:
    """Measure one case; one that doesn't fit into memory, or raises, is finished too, and says so."""
    try:
        return MEASURES[case.kind](case.shape, case.num_tokens, case.routing, setting)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()  # the next case may need all memory
        if setting.device.type == "cuda" and _device_works(setting.device):
            torch.cuda.empty_cache()


def _device_works(device: torch.device) -> bool:
    """Say whether a device still computes: after an illegal access, say, it doesn't for the process that made it."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _headline(result: Json) -> str:
    if "out_of_memory" in result:
        return "out of memory"
    if "failed" in result:
        return f"FAILED: {result['failed'].splitlines()[0]}"
    if "errors" in result:
        return "passed" if result["passed"] else "WRONG"
    if "forward" in result:
        parts = []
        for name in ("forward", "forward+backward"):
            ours = result[name]["tritonmoe"]
            parts.append(f"{name} {ours['tflops']} TFLOP/s, {ours.get('fraction_of_dense')} of dense")
        return "; ".join(parts)
    return ", ".join(f"{name} {kernel['us']} us" for name, kernel in result.items() if isinstance(kernel, dict))


def _belongs_elsewhere(folder: Path, run: Json) -> str | None:
    """Note what the folder's results belong to, or say why this run's can't join them."""
    path = folder / "run.json"
    if not path.exists():
        _write(path, run)
        return None
    before = json.loads(path.read_text())
    for name in ("device", "commit", "driver"):
        ours, theirs = run["environment"][name], before["environment"][name]
        if ours != theirs:
            return f"{folder} has results of {name} {theirs}, this is {ours}: give another --out"
    for name in ("tiny", "rounds"):
        if run[name] != before[name]:
            return f"{folder} has results with {name}={before[name]}, this run has {run[name]}: give another --out"
    return None


def _machine() -> dict[str, str | None]:
    """Give the driver's version and clocks, and the commit (with "+" where files differ from it)."""
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    found = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    driver = None if found is None else found.splitlines()[0].split(", ")
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "rev-parse", "HEAD")
    if commit is not None and _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no"):
        commit += "+"
    return {
        "driver": None if driver is None else driver[0],
        "clocks_and_power": None if driver is None else ", ".join(driver[1:]),
        "commit": commit,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _write(path: Path, values: object) -> None:
    write_whole(path, json.dumps(values, indent=1), "file of figures")
