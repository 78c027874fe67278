"""`python -m bench.foreign_traces`: does the doctor find what is wrong in traces of code that isn't ours?

Plain MoE layers of all_to_all_single under DDP run in network namespaces, with torch.profiler around them and faults in
them; the doctor reads the traces alone, and its verdict is compared with what was wrong, and the promised gain with
what steps without the faults took before and after. --synthetic makes the traces by a small simulation instead.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from bench.foreign_scenarios import HELD_OUT, KINDS, Judgement, Scenario, draw, judge, table
from bench.synthetic_traces import write_traces
from tritonmoe.benchmarks.argument_types import positive, seed
from tritonmoe.benchmarks.namespaces import Namespaces
from tritonmoe.doctor.attribution import attribute
from tritonmoe.doctor.reading import read_traces

__all__ = ["judge_kept", "main"]

START_RATE = 1e9
TIMEOUT_S = 300.0


def run_in_namespaces(scenarios: list[Scenario], folder: Path, num_ranks: int) -> None:
    """Run scenarios of as many ranks in network namespaces; each has a folder by its number then."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = folder / "scenarios.txt"
    drawn.write_text(json.dumps([scenario.plain() for scenario in scenarios]))
    command = [sys.executable, "-m", "bench.foreign_rank", str(drawn), str(folder)]
    with Namespaces(command, num_ranks, START_RATE) as namespaces:
        status = namespaces.run(TIMEOUT_S)
    if status:
        raise SystemExit(f"the ranks ended with status {status}")


def judge_kept(folder: Path) -> Judgement:
    """Judge what one scenario has left in a folder."""
    kept = json.loads((folder / "measured.txt").read_text())
    seconds = kept["seconds"]
    true_share = 1 - statistics.fmean(seconds["healthy"]) / seconds["ill"]
    return judge(Scenario.of(kept["scenario"]), attribute(read_traces(folder).graph), true_share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", choices=["known", "held-out", "all"], default="all", help="which kinds of scenarios")
    parser.add_argument("--each", type=positive, default=1, help="scenarios of each kind")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--ranks", type=positive, default=4)
    parser.add_argument("--synthetic", action="store_true", help="make the traces by a simulation")
    parser.add_argument("--keep", type=Path, help="keep what was recorded in this folder")
    parser.add_argument("--judge", type=Path, help="run nothing: judge again what --keep has kept there")
    arguments = parser.parse_args()
    if arguments.judge is not None:
        folders = sorted(found.parent for found in arguments.judge.rglob("measured.txt"))
        print(table([judge_kept(folder) for folder in folders]))
        return
    held = {"known": False, "held-out": True}
    kinds = [kind for kind in KINDS if arguments.kinds == "all" or (kind in HELD_OUT) == held[arguments.kinds]]
    seeds = range(arguments.seed, arguments.seed + arguments.each)
    scenarios = [draw(kind, number, arguments.ranks) for kind in kinds for number in seeds]
    folder = Path(tempfile.mkdtemp() if arguments.keep is None else arguments.keep).absolute()
    judged = []
    if arguments.synthetic:
        for number, scenario in enumerate(scenarios):
            share = write_traces(scenario, folder / str(number))
            judged.append(judge(scenario, attribute(read_traces(folder / str(number)).graph), share))
    else:
        run_in_namespaces(scenarios, folder, arguments.ranks)
        judged = [judge_kept(folder / str(number)) for number in range(len(scenarios))]
    print(table(judged))
    if arguments.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
