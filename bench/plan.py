"""The planner against published tables: every row of them, measured and predicted, with the error."""

import argparse

from bench.plan_links import link_tables
from bench.plan_steps import step_tables
from bench.published import Table
from tritonmoe.benchmarks.argument_types import output_file
from tritonmoe.benchmarks.timing import write_json

__all__ = ["main", "tables"]


def tables() -> list[Table]:
    """Give all tables. None is left out, and nothing is fitted but what each of them says."""
    return [*link_tables(), *step_tables()]


def main(argv: list[str] | None = None) -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--json", type=output_file, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    found = tables()
    print("\n\n".join(map(str, found)))
    write_json(arguments.json, "plan", [table.to_json() for table in found])


if __name__ == "__main__":
    main()
