"""The planner against published tables: every row of them, measured and predicted, with the error."""

import argparse
import statistics

from bench.plan_fabrics import SHORTEST_S, errors_with_nothing_of_their_own
from bench.plan_links import link_tables
from bench.plan_products import four_layer_tables
from bench.published import Table
from tritonmoe.tools.benchmarks.argument_types import output_file
from tritonmoe.tools.benchmarks.timing import write_json

__all__ = ["main", "tables"]


def tables() -> list[Table]:
    """Return all tables. None is left out, and nothing is fitted but what each of them says."""
    return [*link_tables(), *four_layer_tables()]


def exchange_errors(found: list[Table]) -> dict[str, list[float]]:
    """Return the errors' sizes for all exchanges of 100 us and above, without and with rows of their own cluster."""
    rows = [row for table in found for row in table.rows if row.seconds is not None and row.seconds >= SHORTEST_S]
    return {
        "kernels that forward told by their row of two nodes": [
            abs(row.error) for row in rows if row.error is not None and not row.is_fitted
        ],
        "over nodes, nothing told by a row of their own": errors_with_nothing_of_their_own(),
    }


def main(argv: list[str] | None = None) -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--json", type=output_file, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    found = tables()
    print("\n\n".join(map(str, found)))
    for name, errors in exchange_errors(found).items():
        print(f"\nexchanges of 100 us and above, {name}: median error {statistics.median(errors):.1%} of {len(errors)}")
    write_json(arguments.json, "plan", [table.to_json() for table in found])


if __name__ == "__main__":
    main()
