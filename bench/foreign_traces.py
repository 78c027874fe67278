"""`python -m bench.foreign_traces`: does the doctor find what is wrong in traces of code that isn't ours?

Plain MoE layers of all_to_all_single under DDP and under FSDP2, transformers' own expert parallelism, and a pipeline of
two stages run in network namespaces, with torch.profiler around them and faults in them. The doctor reads the traces
alone; its verdict is compared with what was wrong, and the promised gain with what the same job took without the fault.
--synthetic makes traces of the first kind by a small simulation instead.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.foreign_hosts import TWO_LEVELS, move_clocks, of_hosts
from bench.foreign_judging import Judgement, judge, lines, totals
from bench.foreign_scenarios import NODE_SIZE, TRAINERS, Scenario, series
from bench.synthetic_traces import write_traces
from tritonmoe.tools.benchmarks.argument_types import positive, seed
from tritonmoe.tools.benchmarks.namespaces import Namespaces
from tritonmoe.tools.benchmarks.timing import write_json
from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.offers import offers_of
from tritonmoe.tools.doctor.reading import read_traces

__all__ = ["judge_kept", "main"]

START_RATE = 1e9
TIMEOUT_S = 1800.0


def run_in_namespaces(scenarios: list[Scenario], folder: Path) -> None:
    """Run scenarios of one trainer and as many ranks in network namespaces; each has a folder by its number then."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = folder / "scenarios.txt"
    drawn.write_text(json.dumps([scenario.plain() for scenario in scenarios]))
    command = [sys.executable, "-m", "bench.foreign_rank", str(drawn), str(folder)]
    num_ranks, has_hosts = scenarios[0].num_ranks, scenarios[0].num_hosts > 1
    with Namespaces(command, num_ranks, START_RATE, node_size=NODE_SIZE if has_hosts else None) as namespaces:
        status = namespaces.run(TIMEOUT_S)
    if status:
        raise SystemExit(f"the ranks ended with status {status}")
    if has_hosts:
        for number, scenario in enumerate(scenarios):
            move_clocks(folder / str(number) / "judged", scenario.seed)


def alike(scenarios: list[Scenario]) -> Iterator[tuple[str, list[Scenario]]]:
    """Return those of one trainer and number of ranks and hosts together, with a name."""
    for key in dict.fromkeys((one.trainer, one.num_ranks, one.num_hosts) for one in scenarios):
        name = f"{key[0]}-{key[1]}" + "-hosts" * (key[2] > 1)
        yield name, [one for one in scenarios if (one.trainer, one.num_ranks, one.num_hosts) == key]


def judge_kept(folder: Path) -> Judgement:
    """Judge what one scenario has left in a folder."""
    (found,) = folder.rglob("measured.txt")
    kept, folder = json.loads(found.read_text()), found.parent
    seconds = kept["seconds"]
    true_share = 1 - statistics.fmean(seconds["healthy"]) / seconds["ill"]
    scenario, graph = Scenario.of(kept["scenario"]), read_traces(folder).graph
    judged = judge(scenario, attribute(graph), true_share)
    has_slow_links = any(fault.kind == "slow link" for fault in scenario.faults)  # there they may help too
    if scenario.num_hosts > 1 and graph.routed and not has_slow_links:
        judged.two_levels = any("two levels" in one.words for one in offers_of(graph)) == (scenario.name == TWO_LEVELS)
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--kinds", choices=["open", "held_out", "all"], default="all", help="which kinds of scenarios")
    parser.add_argument("--each", type=positive, default=1, help="scenarios of each kind")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--ranks", type=positive, help="as many in all scenarios; else 2 to 4")
    parser.add_argument("--hosts", action="store_true", help="scenarios of two hosts, under ddp and transformers")
    parser.add_argument("--synthetic", action="store_true", help="make the traces by a simulation")
    parser.add_argument("--keep", type=Path, help="keep what was recorded in this folder")
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    parser.add_argument("--judge", type=Path, help="run nothing: judge again what --keep has kept there")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp() if arguments.keep is None else arguments.keep).absolute()
    if arguments.judge is not None:
        judged = [judge_kept(found.parent) for found in sorted(arguments.judge.rglob("measured.txt"))]
    else:
        seeds = range(arguments.seed, arguments.seed + arguments.each)
        drawn = series(arguments.trainers, arguments.kinds, seeds, arguments.ranks)
        scenarios = of_hosts(arguments.trainers, seeds) if arguments.hosts else drawn
        judged = []
        for name, together in alike(scenarios):
            if arguments.synthetic:
                for number, scenario in enumerate(together):
                    share = write_traces(scenario, folder / name / str(number))
                    judged.append(judge(scenario, attribute(read_traces(folder / name / str(number)).graph), share))
            else:
                run_in_namespaces(together, folder / name)
                judged += [judge_kept(folder / name / str(number)) for number in range(len(together))]
    print("\n".join(lines(judged)))
    for total in totals(judged):
        words = (" of ".join(map(str, value)) if isinstance(value, list) else value for value in total.values())
        print(", ".join(f"{name} {value}" for name, value in zip(total, words, strict=True)))
    results = {"totals": totals(judged), "scenarios": [one.plain() for one in judged]}
    write_json(arguments.json, "foreign_traces", results)
    if arguments.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
