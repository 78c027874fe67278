"""Programs beside the measurements: benchmarks of `tritonmoe bench`, a world of one rank, the tests on the GPU."""

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.gpu.children import run_program, tail
from bench.gpu.workbench import Workbench
from tritonmoe.runtime.files import Json

__all__ = ["PROGRAM_LIMIT_S", "TESTS_LIMIT_S", "run_alone", "run_benchmark", "run_in_repository", "run_tests"]

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


def run_benchmark(bench: Workbench, arguments: Sequence[str]) -> Json:
    """Run `tritonmoe bench` with these arguments in a process of its own; return the results that it writes as JSON."""
    bench.forget()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "tritonmoe", "bench", *arguments, "--json", str(path)]
        found = run_program(command, PROGRAM_LIMIT_S, {"TRITON_INTERPRET": None})
        output = tail(found.pop("output"))
        if found["status"] != 0:
            why = "" if found["status"] is not None else f"it took longer than {PROGRAM_LIMIT_S:.0f} s: "
            return {**found, "failed": why + output}
        return {**found, "results": json.loads(path.read_text())["results"], "output": output}


def run_alone(bench: Workbench) -> Json:
    """Run exchanges and captured calls of a world of one rank, in a process of its own; passed where all are right."""
    flags = ["--rehearse"] if bench.setting.is_rehearsal else []
    found = run_in_repository(bench, ["-m", "bench.gpu.alone", *flags], {"TRITON_INTERPRET": None})
    if "failed" in found:
        return found
    wrong = [name for name, is_right in found["checks"].items() if not is_right]
    return {**found, "errors": wrong, "passed": not wrong}
