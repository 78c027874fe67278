"""The table of what copies of hot experts gain."""

from itertools import groupby

from bench.readme.results import load, table_head, table_row

__all__ = ["balance_simulated_table"]


def balance_simulated_table(name: str) -> str:
    """Return what copies gain in the simulator, a row for each model, number of ranks and skew."""
    found = load(name)["results"]
    arguments, results = found["arguments"], found["results"]
    rates = list(dict.fromkeys(result["gb_per_s"] for result in results))
    lines = [
        f"`python -m bench.balance_simulated`, simulated: {arguments['tokens']} tokens a rank, bf16, at most "
        f"{arguments['max_copies']} copies on a rank, 400 TFLOP/s. How many times as fast forward and backward are "
        "with copies, and how many copies there are; 1.00 with 0 copies is where the planner declines.",
        "",
        *table_head("model", "ranks", "skew", "imbalance", *(f"{rate:g} GB/s" for rate in rates)),
    ]
    for (model, ranks, skew), of_links in groupby(results, lambda r: (r["model"], r["ranks"], r["skew"])):
        cases = list(of_links)
        gains = [f"{case['gain']:.2f} ({case['copies']})" for case in cases]
        lines.append(table_row(model, ranks, skew, f"{cases[0]['imbalance']:.2f}", *gains))
    return "\n".join(lines)
