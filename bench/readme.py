"""`python -m bench.readme [--check]`: write the README's tables from bench/results/*.json, or check that they match."""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def where(environment: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return f"{environment['device']}, {environment['cores']} cores, {versions}, {environment['date']}"


def spread(times: dict) -> str:
    return f"{times['median_ms']:.1f} ({times['lower_quartile_ms']:.1f} to {times['upper_quartile_ms']:.1f})"


def moe_mlp_table(name: str) -> str:
    data = load(name)
    lines = [
        f"`python -m bench.moe_mlp` on {where(data['environment'])}. Milliseconds, median (quartiles) of "
        f"{data['results'][0]['times']['tritonmoe']['samples']} interleaved rounds; ratio is the best other "
        "implementation's time over ours.",
        "",
        "| E, K, D, F | T | dtype | pass | tritonmoe | best of transformers | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in data["results"]:
        best = case["best_other"]
        lines.append(
            f"| {', '.join(map(str, case['E_K_D_F']))} | {case['T']} | {case['dtype']} | {case['pass']} | "
            f"{spread(case['times']['tritonmoe'])} | {best} {spread(case['times'][best])} | {case['ratio']:.2f} |"
        )
    return "\n".join(lines)


def fixed_experts_table(name: str) -> str:
    data = load(name)
    lines = [
        f"`python -m bench.fixed_experts` on {where(data['environment'])}: 2 **emulated** ranks and link, experts of "
        f"a fixed duration. Milliseconds, median (quartiles) of {data['results'][0]['samples']} interleaved rounds.",
        "",
        "| variant | time | multiple of max(compute, communication) |",
        "| --- | --- | --- |",
    ]
    for row in data["results"]:
        lines.append(f"| {row['variant']} | {spread(row)} | {row['multiple_of_bound']:.2f} |")
    return "\n".join(lines)


def scheduler_table(name: str) -> str:
    data = load(name)
    lines = [
        f"`python -m bench.scheduler` on {where(data['environment'])}, one chunk, LocalTransport, against moe_mlp.",
        "",
        "| E, K, D, F | T | pass | moe_mlp | through the executor | overhead |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in data["results"]:
        lines.append(
            f"| {', '.join(map(str, case['E_K_D_F']))} | {case['T']} | {case['pass']} | "
            f"{spread(case['times']['bare'])} | {spread(case['times']['executor'])} | {case['overhead']:+.1%} |"
        )
    return "\n".join(lines)


TABLES = {"moe_mlp": moe_mlp_table, "fixed_experts": fixed_experts_table, "scheduler": scheduler_table}


def render(text: str) -> str:
    """Give the README with everything between `<!-- table NAME -->` and `<!-- end -->` made anew."""

    def table(match: re.Match) -> str:
        kind, name = match.group(1), match.group(2)
        return f"<!-- table {kind} {name} -->\n{TABLES[kind](name)}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) ([\w.-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where the README is not what would be written")
    arguments = parser.parse_args()
    text = README.read_text()
    rendered = render(text)
    if arguments.check:
        sys.exit(None if rendered == text else "README.md is stale: run python -m bench.readme")
    README.write_text(rendered)


if __name__ == "__main__":
    main()
