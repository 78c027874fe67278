"""Tables of the doctor and of the planner."""

import json
import statistics

from bench.foreign_scenarios import TRAINERS, is_held_out
from bench.plan_ourselves import TELLING, rank_pairs
from bench.readme.results import RESULTS, load, load_all, spread, table_head, table_row, where

__all__ = [
    "doctor_table",
    "foreign_table",
    "mended_recording",
    "plan_ourselves_table",
    "plan_rows_table",
    "plan_steps_table",
    "plan_table",
    "recording_table",
]


def doctor_table(prefix: str) -> str:
    """Return one column for every file of results whose name starts with `prefix`."""
    data = load_all(prefix)
    results = [one["results"] for one in data]
    titles, sizes = [], []
    for of in results:
        (where_run,) = {one["where"] for one in of["scenarios"]}
        titles.append(f"{WHERE_RUN[where_run]}, {of['kinds'].replace('_', ' ')} kinds")
        sizes.append(", ".join(map(str, sorted({one["ranks"] for one in of["scenarios"]}))))
    rows = {
        "kinds, scenarios": [f"{len({s['kind'] for s in of['scenarios']})}, {len(of['scenarios'])}" for of in results],
        "ranks": sizes,
    }
    for name in results[0]["summary"]:
        rows[name] = [as_cell(of["summary"][name]) for of in results]
    lines = [
        f"`python -m bench.doctor` on {where(data[0]['environment'])}: experts and the rest of the model sleep.",
        "",
        *table_head("", *titles),
        *(table_row(name, *cells) for name, cells in rows.items()),
    ]
    return "\n".join(lines)


def foreign_table(prefix: str) -> str:
    """Return a row for each trainer and kinds of scenarios, of the files of results whose names start with `prefix`."""
    data = load_all(prefix)
    lines = [
        f"`python -m bench.foreign_traces` on {where(data[0]['environment'])}:",
        "",
        "| trainer | scenarios | cause first, where it costs 15 % | ranks | pattern in time | healthy ones silent "
        "| cost within 15 % of the measured one |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = {False: "kinds that the readers were made with", True: "kinds held out"}
    columns = ("cause", "ranks", "when", "healthy silent", "gain")
    of_files = [one["results"] for one in data]
    sums = {name: [sum(of["totals"][-1][name][place] for of in of_files) for place in range(2)] for name in columns}
    rows = [
        (f"{total['of']}, {names[is_held_out(of['scenarios'][0]['scenario']['name'])]}", total)
        for of in of_files
        for total in of["totals"]
        if total["of"] in TRAINERS and total["scenarios"]
    ]
    rows.append(("**all**", {"scenarios": sum(len(of["scenarios"]) for of in of_files), **sums}))
    for title, total in rows:
        shares = [f"{right} of {count}" for right, count in (total[name] for name in columns)]
        lines.append(f"| {title} | {total['scenarios']} | {' | '.join(shares)} |")
    return "\n".join(lines)


WHERE_RUN = {"emulated": "emulated ranks and links", "netns": "network namespaces"}


def as_cell(value: dict[str, int] | float | None) -> str:
    if isinstance(value, dict):
        return f"{value['right']} of {value['of']}" + (f" ({value['right'] / value['of']:.0%})" if value["of"] else "")
    return "-" if value is None else f"{value:.1%}" if isinstance(value, float) else str(value)


def plan_table(name: str) -> str:
    """Return one row for every published table that the planner is compared with, and what was fitted to it."""
    lines = [
        *table_head("published table", "judged", "median error", "worst error", "targets", "fitted"),
    ]
    for table in load(name)["results"]:
        num_judged = sum(row["judged"] for row in table["rows"])
        source = table["source"].split(" and ")[0]
        cells = [f"[{table['name']}]({source})", f"{num_judged} of {len(table['rows'])} rows"]
        targets = []
        for kind in ("median", "worst"):
            error, target = table[f"{kind}_error"], table[f"{kind}_target"]
            cells.append("-" if error is None else f"{error:.2%}")
            if target is not None:
                targets.append(f"{kind} {target:.2%} {'met' if error <= target else '**missed**'}")
        lines.append(table_row(*cells, ", ".join(targets) or "-", table["fitted"]))
    return "\n".join(lines)


def plan_ourselves_table(prefix: str) -> str:
    """Return predicted and measured steps, a column for every file of results whose name starts with `prefix`."""
    files = load_all(prefix)
    sizes = [data["results"]["ranks"] for data in files]
    samples = " and ".join(str(data["results"]["cases"][0]["measured"]["samples"]) for data in files)
    lines = [
        f"`python -m bench.plan_ourselves --netns N` on {where(files[0]['environment'])}: forward and backward of the "
        "model of `tritonmoe bench expert_parallel` in network namespaces, one thread each, predicted from a probe "
        f"just before. Milliseconds, medians of {samples} interleaved rounds.",
        "",
        *table_head(
            "link", "schedule", *(t for size in sizes for t in (f"N = {size}: predicted", "measured", "error"))
        ),
    ]
    for cases in zip(*(data["results"]["cases"] for data in files), strict=True):
        cells = [
            f"{case['predicted_ms']:.0f} | {case['measured']['median_ms']:.0f} | {case['error']:+.1%}" for case in cases
        ]
        lines.append(table_row(cases[0]["rate"], cases[0]["plan"], *cells))
    for size, data in zip(sizes, files, strict=True):
        cases = data["results"]["cases"]
        errors = [abs(case["error"]) for case in cases]
        right, pairs = rank_pairs(cases)
        lines += [
            "",
            f"{size} ranks: {statistics.median(errors):.1%} off in the median, {max(errors):.1%} at worst; of pairs of "
            f"schedules whose times differ by {TELLING:.0%} or more {right} of {pairs} in the right order.",
        ]
    return "\n".join(lines)


def plan_rows_table(name: str) -> str:
    """Return every published row, measured and predicted."""
    lines = []
    for table in load(name)["results"]:
        lines += ["", f"{table['name']}:", ""]
        lines += table_head("", "measured", "predicted", "error", "")
        for row in table["rows"]:
            predicted = "-" if row["predicted"] is None else f"{row['predicted']:,.5g}"
            error = "-" if row["error"] is None else f"{row['error']:+.2%}"
            note = "fitted" if row["fitted"] else row["note"]
            lines.append(f"| {row['what']} | {row['measured']:,.5g} {row['unit']} | {predicted} | {error} | {note} |")
    return "\n".join(lines[1:])


def plan_steps_table(name: str) -> str:
    """Return every published step with its prediction and interval, and how many lie in theirs."""
    results = load(name)["results"]
    lines: list[str] = []
    lines += table_head("rows", "inside their 80 % interval", "median width, upper end over lower", "median error")
    for what, of in results["summaries"].items():
        inside = f"{of['inside']} of {of['rows']} ({of['coverage']:.0%})"
        lines.append(f"| {what} | {inside} | {of['median_width']:.2f} | {of['median_error']:.0%} |")
    fit = results["fit"]
    lines += ["", f"All of them ran. The planner says of {fit['inside']} of {fit['rows']} that they fit into memory."]
    lines += ["", '<details markdown="1"><summary>Every step</summary>']
    family = None
    for row in results["rows"]:
        if row["family"] != family:
            family = row["family"]
            lines += ["", f"[{family}]({row['source']}):", ""]
            lines += [
                *table_head("", "measured s", "predicted s", "80 % interval", "error", "inside"),
            ]
        cells = [row["what"], f"{row['measured_s']:.4g}", f"{row['predicted_s']:.4g}"]
        cells += [
            f"{row['low_s']:.4g} - {row['high_s']:.4g}",
            f"{row['error']:+.0%}",
            "yes" if row["inside"] else "**no**",
        ]
        lines.append(table_row(*cells))
    return "\n".join([*lines, "", "</details>"])


def recording_table(name: str) -> str:
    """Return what steps take while they are recorded, and otherwise."""
    data = load(name)
    samples = data["results"][0]["times"]["recorded"]["samples"]
    lines = [
        f"`python -m bench.recording` on {where(data['environment'])}: two processes over gloo on these cores, one MoE "
        "layer (E=64, K=8, D=512, F=256), forward and backward. Milliseconds, median (quartiles) of "
        f"{samples} interleaved rounds; a difference is the median of the rounds' own. What a process computes is "
        "the time of all of its threads on the cores.",
        "",
        *table_head(
            "tokens a rank",
            "recorded",
            "not recorded",
            "difference",
            "computed by a process, not recorded",
            "difference",
        ),
    ]
    for row in data["results"]:
        cells = [str(row["tokens_per_rank"])]
        cells += [spread(row["times"][variant]) for variant in ("recorded", "not recorded")]
        computed = row["computed"]
        cells += [f"{row['difference_us'] / 1e3:+.1f}", spread(computed["times"]["not recorded"])]
        cells += [f"{computed['difference_us'] / 1e3:+.2f} ({computed['share']:+.1%})"]
        lines.append(table_row(*cells))
    return "\n".join(lines)


def mended_recording(name: str) -> str:
    """Return in words what the calls of a committed recording took, and others beside them without the cause."""
    seconds = json.loads((RESULTS / "recordings" / name / "measured.json").read_text())["seconds"]
    slow, mended = (1e3 * statistics.median(seconds[variant]) for variant in ("with", "without"))
    return (
        f"Calls with that link mended, {len(seconds['with'])} of each in turn, took {mended:.0f} ms instead of "
        f"{slow:.0f}: {1 - mended / slow:.0%} less."
    )
