"""The tables of what copies of hot experts gain."""

import json
import statistics
from itertools import groupby

from bench.balance import make_parser
from bench.readme.results import load, load_all, spread, table_head, table_row, where
from tritonmoe.tools.benchmarks.overlap_report import is_noise

__all__ = ["balance_simulated_table", "balance_table"]

LINKS = {"40gbit": "unshaped", "12gbit": "12 Gbit/s", "1gbit": "1 Gbit/s", "400mbit": "0.4 Gbit/s"}


def balance_table(prefix: str) -> str:
    """Return what was measured with copies and without, a row for each case, and what the simulator says of it."""
    found = load_all(prefix)
    first, places = found[0], groupby(found, lambda of: where(of["environment"]))
    commands = "; ".join(
        ", ".join(f"`{_command(of['results']['arguments'])}`" for of in here) + f" on {place}" for place, here in places
    )
    results = [(of["results"]["arguments"], case) for of in found for case in of["results"]["results"]]
    errors = [abs(ratio - 1) for _, case in results for ratio in case["predicted_over_measured"].values()]
    lines = [
        f"{commands}: {_ranks(first['results']['arguments'])}. Forward and backward "
        "of one layer's experts, D=512, F=256, E=64, K=8, fp32, in interleaved rounds; milliseconds of the slowest "
        "rank, median (quartiles). The ideal is the same routing with the hot experts spread evenly over the ranks "
        f"from the start{'' if 'netns' in prefix else ', which here is that of uniformly drawn experts'}. Where there "
        'are no copies, "auto" has declined them. A ratio with * is one of times whose quartiles overlap. Predictions '
        'miss the times without copies, with "auto" and with "always" by '
        f"{statistics.median(errors):.1%} in the median.",
        "",
        *table_head(
            "link",
            "tokens a rank",
            "hot experts",
            "max_copies",
            "busiest rank over the mean",
            "without",
            '"auto"',
            "ideal",
            '"auto" over ideal',
            '"auto" over without',
            'uniform routing, "auto" over without',
            "predicted",
        ),
    ]
    for arguments, case in results:
        calls = case["calls"]
        balance = f"{case['imbalance']:.2f}, then {case['imbalance_auto']:.2f} ({case['copies_auto']} copies)"
        ratios = (
            f"{case[f'{name}_over_{other}'.replace(', ', '_')]:.2f}{' *' * is_noise(calls[name], calls[other])}"
            for name, other in (("auto", "ideal"), ("auto", "without"), ("even, auto", "even"))
        )
        cells = (LINKS[case["rate"]], arguments["tokens"], case["hot"], arguments["max_copies"], balance)
        times = (spread(calls[name]) for name in ("without", "auto", "ideal"))
        lines.append(table_row(*cells, *times, *ratios, f"{case['predicted_ms']['auto']:.0f}"))
    return "\n".join(lines)


def _planning(results: list[dict]) -> str:
    """Return how long it takes to plan on so many ranks."""
    times: dict[tuple[int, str], list[float]] = {}
    for result in results:
        times.setdefault((result["ranks"], result["model"]), []).append(result["planning_ms"])
    found = [f"{statistics.median(of):.1f} ms on {ranks} ranks ({model})" for (ranks, model), of in times.items()]
    return ", ".join(found[:-1]) + f" and {found[-1]}"


def _ranks(arguments: dict) -> str:
    """Return on what ranks a result was measured."""
    if arguments["netns"] is None:
        return f"{arguments['ranks']} **emulated** ranks, whose experts sleep {3 * arguments['pair_us']:.0f} us a pair"
    return f"{arguments['netns']} network namespaces, one core and one thread each"


def _command(arguments: dict) -> str:
    """Return the command of a result, with what differs from its defaults."""
    words = ["python -m bench.balance"]
    for name, default in vars(make_parser().parse_args([])).items():
        value = arguments.get(name, default)
        if value != default:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


def balance_simulated_table(name: str) -> str:
    """Return what copies gain in the simulator, a row for each model, number of ranks and skew."""
    found = load(name)["results"]
    arguments, results = found["arguments"], found["results"]
    place = where(load(name)["environment"])
    rates = list(dict.fromkeys(result["gb_per_s"] for result in results))
    lines = [
        f"`python -m bench.balance_simulated` on {place}, simulated: {arguments['tokens']} tokens a rank, bf16, "
        f"`max_copies={json.dumps(arguments['max_copies'])}`, 400 TFLOP/s. How many times as fast forward and backward "
        "are with copies, and how many copies there are; 1.00 with 0 copies is where the planner declines. Planning "
        f"takes {_planning(results)} on one core of this machine, the median over the cases of each.",
        "",
        *table_head("model", "ranks", "skew", "imbalance", *(f"{rate:g} GB/s" for rate in rates)),
    ]
    for (model, ranks, skew), of_links in groupby(results, lambda r: (r["model"], r["ranks"], r["skew"])):
        cases = list(of_links)
        gains = [f"{case['gain']:.2f} ({case['copies']})" for case in cases]
        lines.append(table_row(model, ranks, skew, f"{cases[0]['imbalance']:.2f}", *gains))
    return "\n".join(lines)
