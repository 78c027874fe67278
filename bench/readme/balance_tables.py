"""The tables of what copies of hot experts gain."""

import statistics
from itertools import groupby

from bench.balance import make_parser
from bench.readme.results import load_all, spread, table_head, table_row, where
from tritonmoe.tools.benchmarks.overlap_report import is_noise

__all__ = ["balance_table"]

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
