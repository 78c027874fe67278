"""python -m tritonmoe.ops.aot: compile, print and say (as an exit status) whether every kernel is fit to run.

Exits with 1 when a kernel doesn't compile, spills in a loop or more than a few bytes, needs more shared memory than the
target has, has another matrix instruction in its loop than its target's, or fewer TMA loads than descriptors; with 2
where nothing can be compiled.
"""

import argparse
import json
import sys
from dataclasses import asdict

from tritonmoe.ops.aot import ARCHITECTURES, OTHER_ARCHITECTURES, VARIANTS, Compiled, architecture_named, compile_all
from tritonmoe.ops.aot.variants import DEFAULT_VARIANTS
from tritonmoe.ops.kernels import launch


def _cell(result: Compiled | None) -> str:
    if result is None:
        return "-"
    if result.error:
        return "error"
    sizes = f"{result.registers} / {result.spills} / {result.shared_bytes / 1024:.0f} / {result.occupancy}"
    return f"{sizes} {result.matrix}{' TMA' if result.tma_operands else ''}".rstrip()


def _print_tables(results: list[Compiled]) -> None:
    """Print one line per kernel and one column per target, then the instruction mixes of the loops."""
    targets = list(dict.fromkeys(result.target for result in results))
    kernels = list(dict.fromkeys(f"{result.variant}: {result.kernel}" for result in results))
    by_key = {(f"{result.variant}: {result.kernel}", result.target): result for result in results}
    width = max(map(len, kernels))
    print("registers / spills / shared KB / programs side by side, matrix instruction")
    print(" " * width, *(f"{target:>28}" for target in targets))
    for kernel in kernels:
        print(f"{kernel:<{width}}", *(f"{_cell(by_key.get((kernel, target))):>28}" for target in targets))
    print("\ninstructions in the innermost loop around the matrix instruction")
    for result in results:
        if result.matrix:
            mix = ", ".join(f"{count} {kind}" for kind, count in result.loop.items())
            print(f"{result.variant}: {result.kernel:<{width}} {result.target:<7} {mix}")
    print("\na step of that loop, that is neither the first nor the last of a tile")
    for result in results:
        if result.step:
            step = ", ".join(f"{name} {value}" for name, value in result.step.items())
            print(f"{result.variant}: {result.kernel:<{width}} {result.target:<7} {step}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tritonmoe.ops.aot", description=__doc__)
    parser.add_argument("--targets", nargs="+", default=[], help=f"default: {' '.join(ARCHITECTURES)}")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(DEFAULT_VARIANTS))
    parser.add_argument(
        "--all",
        action="store_true",
        help="every variant: layouts, activations, shapes, batch sizes; and, unless there are --targets, the default "
        f"variants for {', '.join(OTHER_ARCHITECTURES)}",
    )
    parser.add_argument("--kernels", nargs="+", default=(), help='only these, as printed: "up up" (default: all)')
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    options = parser.parse_args(arguments)
    for target in options.targets:
        try:
            architecture_named(target)
        except ValueError as error:
            parser.error(str(error))
    if launch.INTERPRETED:
        print("Triton's interpreter is on: nothing can be compiled. Unset TRITON_INTERPRET.", file=sys.stderr)
        return 2

    def progress(done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            print(f"compiled {done} of {total}", file=sys.stderr, flush=True)

    variants = list(VARIANTS) if options.all else options.variants
    targets = options.targets or list(ARCHITECTURES)
    results = compile_all(targets, variants, options.kernels, options.workers, progress)
    if options.all and not options.targets:
        others = list(OTHER_ARCHITECTURES)
        results += compile_all(others, DEFAULT_VARIANTS, options.kernels, options.workers, progress)
    if options.json:
        print(json.dumps([{**asdict(result), "problem": result.problem} for result in results], indent=1))
    else:
        _print_tables(results)
    problems = [result for result in results if result.problem]
    for result in problems:
        print(f"{result.variant}: {result.kernel} on {result.target}: {result.problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
