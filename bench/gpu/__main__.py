"""`python -m bench.gpu --out FILE`: the day's plan, or what is left of it; `--rehearse` is the same on a CPU, tiny."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu.calls import Choice, calls, expected_s, run_call, words
from bench.gpu.children import ROOT
from bench.gpu.compilation import compile_missing, kernels_of
from bench.gpu.plan import Case, cases
from bench.gpu.setting import DAY, REHEARSAL, Setting
from bench.gpu.worker import Worker
from tritonmoe.ops.aot import architecture_named
from tritonmoe.ops.kernels import launch
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import output_file
from tritonmoe.tools.benchmarks.kept_results import KeptResults, identity, open_results, read_results, source_hash
from tritonmoe.tools.benchmarks.tile_candidates import redundant
from tritonmoe.tools.benchmarks.tuning import LEAST_GAIN, best_entries

__all__ = ["is_finished", "is_wrong", "main"]

HARNESS = source_hash(Path(__file__).parent, ROOT / "tests")
REHEARSED_TARGET = "sm_90"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing; give 0 when nothing is left, 3 when something is, 1 when one went wrong, 2 when it can't."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=output_file, required=True, help="file of results; a rerun goes on in it")
    parser.add_argument(
        "--budget-s", type=float, default=570.0, help="begin no case that may last longer than so many seconds (570)"
    )
    for name, what in (("only", "only cases"), ("skip", "no case")):
        parser.add_argument(
            f"--{name}", type=words, default=(), help=f"{what} of these stages, or with these words: A,D or tests"
        )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on this CPU")
    parser.add_argument(
        "--plan", metavar="TARGET", help="run nothing: say what each call would run on such a GPU (sm_90), and how long"
    )
    arguments = parser.parse_args(argv)
    choice = Choice(arguments.only, arguments.skip)
    if arguments.plan is not None:
        return _print_calls(arguments.plan, arguments.out, arguments.budget_s, choice)
    problem = _why_not(arguments.rehearse)
    if problem:
        print(f"python -m bench.gpu: {problem}", file=sys.stderr)
        return 2
    setting = REHEARSAL if arguments.rehearse else DAY
    target = REHEARSED_TARGET if arguments.rehearse else launch.architecture_of(launch.target_of(setting.device))
    try:
        architecture_named(target)
    except ValueError as error:
        print(f"python -m bench.gpu: {error}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + arguments.budget_s
    try:
        with open_results(arguments.out, {**identity(), "is_rehearsal": arguments.rehearse}) as results:
            return _run(setting, target, results, deadline, choice)
    except (OSError, ValueError) as error:
        print(f"python -m bench.gpu: {error}", file=sys.stderr)
        return 2


def _why_not(rehearse: bool) -> str:
    if launch.INTERPRETED:
        return (
            "unset TRITON_INTERPRET: kernels are compiled; the rehearsal switches the interpreter on where it needs it"
        )
    if not rehearse and not torch.cuda.is_available():
        return "there is no GPU: --rehearse goes through the plan without one"
    return ""


def is_finished(result: Json | None) -> bool:
    """Return whether a case needs no other run: a wrong one does once this folder or the tests have changed."""
    return result is not None and (not is_wrong(result) or result["harness"] == HARNESS)


def is_wrong(result: Json) -> bool:
    """Return whether a result speaks against the kernels or the harness."""
    return result.get("passed") is False or "failed" in result or bool(result.get("problem"))


def _print_calls(target: str, path: Path, budget_s: float, choice: Choice) -> int:
    """Print what each call that is to come would run, after those whose results are in the file."""
    try:
        architecture_named(target)
        lines = read_results(path)
    except (OSError, ValueError) as error:
        print(f"python -m bench.gpu: {error}", file=sys.stderr)
        return 2
    by_case = {line["case"]: line for line in lines if line["run"] == lines[-1]["run"]}
    plan = cases(DAY, target)
    left = [case for case in plan if choice.has(case) and not is_finished(by_case.get(case.name))]
    for number, call in enumerate(calls(left, plan, by_case, budget_s), 1):
        print(f"call {number}, {call}")
    print(f"{len(left)} of {len(plan)} cases are to be run, beside the compilation of their kernels")
    return 0


def _run(setting: Setting, target: str, results: KeptResults, deadline: float, choice: Choice) -> int:
    kernels = kernels_of(setting, target)
    plan = cases(setting, target)
    unfinished = [case for case in plan if not is_finished(results.by_case.get(case.name))]
    missing = [case for case in unfinished if choice.has(case)]
    print(
        f"run {results.run}: {len(plan) - len(unfinished)} of {len(plan)} cases are finished in {results.path}",
        flush=True,
    )
    worker, compiled = Worker(setting), 0

    def fits(case: Case) -> bool:
        return time.monotonic() + expected_s(case, plan, results.by_case) <= deadline

    def run(case: Case) -> bool:
        nonlocal compiled
        needed = [kernel for kernel in kernels if kernel.name[0] <= case.name[0]]
        if len(needed) > compiled and case.measure not in ("describe_machine", "measure_dense"):
            is_ready = compile_missing(needed, target, results, deadline, lambda text: print(text, flush=True))
            compiled = len(needed) if is_ready else compiled
            if not is_ready or not fits(case):
                return False
        started = time.monotonic()
        found = _run_case(case, setting, results, worker)
        seconds = round(time.monotonic() - started, 2)
        results.add(case.name, {"arguments": case.arguments, **found, "seconds": seconds, "harness": HARNESS})
        print(f"{case.name}: {_headline(found)} ({seconds:.1f} s)", flush=True)
        return True

    try:
        left = run_call(missing, fits, run)
    finally:
        worker.stop()
    if left:
        seconds = sum(expected_s(case, plan, results.by_case) for case in left)
        print(f"{len(left)} cases are left, of about {seconds:.0f} s: run the same command again")
        return 3
    names = [case.name for case in plan] + [kernel.name for kernel in kernels if kernel.candidate is None]
    wrong = {name: result for name in names if is_wrong(result := results.by_case.get(name, {}))}
    for name, result in wrong.items():
        why = next((result[word] for word in ("failed", "errors", "failures", "problem") if result.get(word)), result)
        print(f"WRONG: {name}: {why}"[:1000], file=sys.stderr)
    print(f"tiles that were faster, twice: {json.dumps(tuned_entries(results.by_case))}")
    chosen = [case for case in plan if choice.has(case)]
    print(f"all {len(chosen)} cases{' chosen' if chosen != plan else ''} are finished, {len(wrong)} of them wrong")
    return 1 if wrong else 0


def _run_case(case: Case, setting: Setting, results: KeptResults, worker: Worker) -> Json:
    arguments = dict(case.arguments)
    if case.measure == "try_tile":
        reasons = redundant(_fitness(results))
        if (name := case.name.removeprefix("C tile ")) in reasons:
            return {"left_out": reasons[name]}
    if case.needs_tuned:
        arguments["entries"] = tuned_entries(results.by_case)
    return worker.run(case.measure, arguments, case.limit_s)


def _fitness(results: KeptResults) -> dict[str, Json]:
    start = "A compile tile "
    return {case.removeprefix(start): line for case, line in results.by_case.items() if case.startswith(start)}


def tuned_entries(by_case: dict[str, Json]) -> dict[str, dict[str, int | str]]:
    """Return the tiles that stage C has found to be faster than the table's, by their keys.

    Once a product has been measured again its tile must have been faster then too.
    """
    tried = {
        case: {**line, **line["arguments"]}
        for case, line in by_case.items()
        if case.startswith("C tile ") and "gain" in line
    }
    entries = best_entries(tried)
    again = {key: by_case[name] for key in entries if (name := f"C again {key}") in by_case}
    slow = {key for key, line in again.items() if not line.get("agrees") or line["gain"] < LEAST_GAIN}
    return {key: fields for key, fields in entries.items() if key not in slow}


def _headline(found: Json) -> str:
    for name in ("failed", "out_of_memory", "left_out", "problem"):
        if isinstance(found.get(name), str) and found[name]:
            return f"{name}: {found[name].splitlines()[0][:200]}"
    if not found.get("passed", True):
        return "WRONG"
    if "times" in found:
        parts = [f"{name} {timed['us']:.1f} us{_rate(timed)}" for name, timed in found["times"].items()]
        return ", ".join([*parts, *(f"{name} left out: {why}" for name, why in found.get("left_out", {}).items())])
    if isinstance(found.get("left_out"), dict) and len(found) == 1:
        return ", ".join(f"{name} left out: {why}" for name, why in found["left_out"].items())
    if "passed" in found:
        return "passed"
    if "results" in found:
        return found["output"].strip().splitlines()[-1][:200]
    if "gain" in found:
        return f"{found['gain']:.3f} times" + ("" if found["agrees"] else ", WRONG")
    return "done"


def _rate(timed: Json) -> str:
    if "tflops" in timed:
        return f" ({timed['tflops']:.3g} TFLOP/s)"
    return f" ({timed['tokens_per_s']:.0f} tokens/s)" if "tokens_per_s" in timed else ""


if __name__ == "__main__":
    sys.exit(main())
