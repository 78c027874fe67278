"""Programs beside the measurements: the tests on the GPU, ncu on single kernels, compute-sanitizer on small layers."""

import csv
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence

from bench.gpu.children import run_program, tail
from bench.gpu.workbench import Workbench
from tritonmoe.runtime.files import Json

__all__ = [
    *("KERNEL_OF", "PROGRAM_LIMIT_S", "TESTS_LIMIT_S", "profile_with_ncu", "run_alone", "run_in_repository"),
    *("run_sanitizer", "run_tests"),
]

KERNEL_OF = {
    "up": "_up",
    "down": "_grouped_matmul",
    "down_grad": "_down_grad",
    "up_grad": "_grouped_matmul",
    "weight_grad W1": "_outer_sums",
    "gather_sum": "_gather_sum",
}
"""The operations that ncu looks at, and how their kernel's name begins."""
NCU = (
    *("ncu", "--set", "full", "--page", "raw", "--csv", "--launch-skip", "2", "--launch-count", "1"),
    *("--clock-control", "none"),  # else ncu locks the card's clocks, and what it leaves is measured later
)
PROGRAM_LIMIT_S = 240.0
TESTS_LIMIT_S = 240.0
NO_TESTS = 5
"""pytest's status where a file has no test for this machine."""
FIRST_TIER = "not thorough and not slow and not soak"
TEST_THAT_ENDED = re.compile(r"^(?=.*\[ *\d+%\]).*\b(PASSED|FAILED|ERROR)\b.*$", re.MULTILINE)
"""A line that `pytest -v` prints as soon as a test has ended, with and without xdist."""


def run_tests(bench: Workbench, file: str) -> Json:
    """Run the first tier of a file of tests, on a GPU as many at once as there are cores; passed where none failed."""
    if importlib.util.find_spec("pytest") is None:
        return {"left_out": "pytest is not installed"}
    bench.forget()  # the tests need the device's memory
    command = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "-p", "no:cacheprovider", "-m", FIRST_TIER, file]
    if not bench.setting.is_rehearsal and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(os.cpu_count()), "--dist", "load"]
    found = run_program(command, TESTS_LIMIT_S)
    output = found.pop("output")
    ended = [(line[1], line[0].strip()) for line in TEST_THAT_ENDED.finditer(output)]
    num_passed = sum(outcome == "PASSED" for outcome, _ in ended)
    failures = re.findall(r"^(?:FAILED|ERROR) .*$", output, re.MULTILINE)  # the summary, with reasons
    failures = failures or [line for outcome, line in ended if outcome != "PASSED"]
    problem = f"cut after {TESTS_LIMIT_S:.0f} s, when {num_passed} had passed" if found["status"] is None else ""
    return {
        **found,
        "passed": found["status"] in (0, NO_TESTS),
        "num_passed": num_passed,
        "failures": failures[:50],
        "problem": problem,
        "output": tail(output),
    }


def _tool(bench: Workbench, *command: str) -> list[str] | None:
    """Return a tool's command; none of it in a rehearsal, None where the tool isn't there."""
    if bench.setting.is_rehearsal:
        return []
    return list(command) if shutil.which(command[0]) else None


def profile_with_ncu(bench: Workbench, operation: str, num_tokens: int) -> Json:
    """Return all that ncu measures of one operation's kernel, by metric, stall reasons among them."""
    kernel = KERNEL_OF[operation]
    tool = _tool(bench, *NCU, "--kernel-name", f"regex:^{kernel}")
    if tool is None:
        return {"left_out": "ncu is not there"}
    found = _run_operation(bench, tool, operation, num_tokens)
    output = found.pop("output")
    if "ERR_NVGPUCTRPERM" in output:
        return {"left_out": "this user may not read the GPU's counters (ERR_NVGPUCTRPERM)"}
    metrics = {} if bench.setting.is_rehearsal else parse_ncu(output.splitlines())
    is_right = found["status"] == 0 if bench.setting.is_rehearsal else bool(metrics)
    return {**found, "metrics": metrics} if is_right else {**found, "failed": tail(output)}


def parse_ncu(lines: Sequence[str]) -> dict[str, str]:
    """Return the metrics of the last kernel in what ncu printed as CSV: value and unit, by name."""
    rows = [row for row in csv.reader(lines) if len(row) > 20]
    if len(rows) < 3:
        return {}
    names, units, *_, values = rows
    return {name: f"{value} {unit}".strip() for name, unit, value in zip(names, units, values, strict=True)}


def run_sanitizer(bench: Workbench, tool: str, operation: str, num_tokens: int) -> Json:
    """Run one operation of a small layer under compute-sanitizer; passed where it found nothing in the kernels.

    Errors of CUDA's API are left out: PyTorch asks for what it can do without.
    """
    command = _tool(bench, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no")
    if command is None:
        return {"left_out": "compute-sanitizer is not there"}
    found = _run_operation(bench, command, operation, num_tokens, "--small")
    output = found.pop("output")
    return {**found, "passed": found["status"] == 0, "output": tail(output)}


def _run_operation(bench: Workbench, tool: Sequence[str], operation: str, num_tokens: int, *more: str) -> Json:
    bench.forget()
    interpreted = "1" if bench.setting.is_rehearsal else None
    command = [*tool, sys.executable, "-m", "bench.gpu.one_operation", operation, str(num_tokens), *more]
    return run_program(command, PROGRAM_LIMIT_S, {"TRITON_INTERPRET": interpreted})


def run_in_repository(bench: Workbench, arguments: Sequence[str], variables: Mapping[str, str | None]) -> Json:
    """Run a program that prints what it has found as JSON, the last line most; give that, and why it failed, if so."""
    bench.forget()
    found = run_program([sys.executable, *arguments], PROGRAM_LIMIT_S, variables)
    output = found.pop("output")
    results = [line for line in output.splitlines() if line.startswith("{")]  # libraries print warnings around it
    found |= json.loads(results[-1]) if results else {}
    if found["status"] is None:
        return {**found, "failed": f"it took longer than {PROGRAM_LIMIT_S:.0f} s: {tail(output)}"}
    if found["status"] != 0 or not results:
        return {**found, "failed": tail(output) or "it printed nothing"}
    return found


def run_alone(bench: Workbench) -> Json:
    """Run exchanges and captured calls of a world of one rank, in a process of its own; passed where all are right."""
    flags = ["--rehearse"] if bench.setting.is_rehearsal else []
    found = run_in_repository(bench, ["-m", "bench.gpu.alone", *flags], {"TRITON_INTERPRET": None})
    if "failed" in found:
        return found
    wrong = [name for name, is_right in found["checks"].items() if not is_right]
    return {**found, "errors": wrong, "passed": not wrong}
