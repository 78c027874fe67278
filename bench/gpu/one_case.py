"""`python -m bench.gpu.one_case MEASURE ARGUMENTS`: one measure alone in a process, which prints its result as JSON."""

import argparse
import json
from collections.abc import Sequence

from bench.gpu.setting import DAY, REHEARSAL
from bench.gpu.workbench import Workbench
from bench.gpu.worker import measures

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the result as the last line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.one_case", description=__doc__)
    parser.add_argument("measure", choices=sorted(measures()))
    parser.add_argument("arguments", type=json.loads, help="an object of JSON")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on this CPU")
    arguments = parser.parse_args(argv)
    bench = Workbench(REHEARSAL if arguments.rehearse else DAY)
    found = measures()[arguments.measure](bench, **arguments.arguments)
    bench.clocks.close()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
