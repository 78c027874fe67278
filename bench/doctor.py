"""`python -m bench.doctor`: does the doctor find what slows a training job, and is its promise kept when that is gone?

`run` makes jobs of every kind of bench.doctor_kinds and records them: what is wrong with each is known, and what that
costs is measured, by the same job without it; two faults are also taken out one by one. Experts and the rest of the
model sleep. --emulated runs them on emulated ranks and links, in virtual time, --netns W on W processes in network
namespaces. `judge` has the doctor read what was recorded, and compares. What DIR has already is not run again. A third
of the kinds is held out: nothing is tuned on those.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.doctor_faults import MEASURED, STEADY, Job, drift_of, variants_of
from bench.doctor_job import TIMEOUT_S, run_emulated, run_real
from bench.doctor_kinds import KINDS, draw_job, kinds_of
from tritonmoe.runtime.files import write_whole
from tritonmoe.tools.benchmarks.argument_types import output_file, positive, seed
from tritonmoe.tools.benchmarks.namespaces import Namespaces, check_start, is_inside
from tritonmoe.tools.benchmarks.ranks import gather
from tritonmoe.tools.benchmarks.timing import write_json
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["main", "run_here"]

START_RATE = 1e9
UNDISTURBED = ("nice", "-n", "-15")
"""What else the machine does then takes little time from the ranks."""


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """Return the jobs that are asked for and can be run."""
    size, jobs = arguments.netns, []
    for kind in kinds_of(arguments.kinds, size is not None):
        if size is not None and max((spec.num for spec in KINDS[kind]), default=1) >= size:
            continue
        each = arguments.each if KINDS[kind] else arguments.healthy
        jobs += [draw_job(kind, arguments.seed + number, size is not None, size) for number in range(each)]
    return jobs


def folder_of(into: str, job: Job) -> Path:
    """Return a job's folder; what a run has left there that was ended before it had measured the job is removed."""
    folder = Path(into).absolute() / f"{job.kind.replace(' ', '_')}-{job.size}-{job.seed}"
    if not (folder / MEASURED).exists():
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def keep(folder: Path, where: str, job: Job, seconds: dict[str, list[float]]) -> None:
    """Write what was measured beside the recording."""
    kept = {"where": where, "job": asdict(job), "seconds": seconds}
    write_whole(folder / MEASURED, json.dumps(kept), "measurement")
    share = 1 - sum(seconds.get("without", seconds["with"])) / sum(seconds["with"])
    print(f"{folder.name}: {1e3 * sum(seconds['with']) / job.num_steps:.0f} ms a step, faults {share:.0%}", flush=True)


def keep_if_steady(folder: Path, job: Job, seconds: dict[str, list[float]], last_chance: bool) -> None:
    """Keep what was measured on real links, unless something else ran on the machine and it can be tried again."""
    if last_chance or drift_of(job, seconds) <= STEADY:
        keep(folder, "netns", job, seconds)
    else:
        shutil.rmtree(folder)


def run_here(arguments: argparse.Namespace) -> None:
    """Run all jobs on emulated ranks."""
    for job in jobs_of(arguments):
        folder = folder_of(arguments.into, job)
        if not (folder / MEASURED).exists():
            variants = variants_of(job).items()
            keep(
                folder,
                "emulated",
                job,
                {name: run_emulated(of, folder if of is job else None) for name, of in variants},
            )


def run_netns_rank(arguments: argparse.Namespace) -> None:
    """Run all jobs on this rank of the namespaces."""
    with torchrun_ranks(timeout_s=TIMEOUT_S) as transport:
        for job in jobs_of(arguments):
            begun = str(folder_of(arguments.into, job)) if transport.rank == 0 else None
            (name,) = set(gather(transport, begun)) - {None}
            folder = Path(name)
            if (folder / MEASURED).exists():
                continue
            for last_chance in (False, False, True):
                seconds = run_real(transport, job, variants_of(job), folder)
                if transport.rank == 0:
                    keep_if_steady(folder, job, seconds, last_chance)
                transport.barrier()
                if (folder / MEASURED).exists():
                    break


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    torch.set_num_threads(1)
    check_start(arguments.netns, {})
    if not arguments.netns:
        run_here(arguments)
        return 0
    if is_inside():
        run_netns_rank(arguments)
        return 0
    command = [*UNDISTURBED, sys.executable, "-m", "bench.doctor", *argv]
    with Namespaces(command, arguments.netns, START_RATE) as namespaces:
        return namespaces.run(TIMEOUT_S)


def judge(arguments: argparse.Namespace) -> int:
    from bench.doctor_judge import judge_all, summarize  # with the whole of tritonmoe, which no rank needs

    kinds = kinds_of(arguments.kinds, is_real=False)
    results = judge_all(Path(arguments.into), kinds)
    summary = summarize(results)
    for name, value in summary.items():
        print(f"  {name:24} {' of '.join(map(str, value.values())) if isinstance(value, dict) else value}")
    write_json(arguments.json, "doctor", {"kinds": arguments.kinds, "summary": summary, "scenarios": results})
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run jobs, or print a line for each that was run and the figures of all; gives the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.doctor", description=__doc__)
    commands = parser.add_subparsers(required=True)
    of_run, of_judge = commands.add_parser("run", help="run and record"), commands.add_parser("judge", help="compare")
    for command in (of_run, of_judge):
        command.add_argument("into", metavar="DIR", help="where recordings and seconds are kept")
        command.add_argument("--kinds", choices=["open", "held_out", "all"], default="all", help="(default all)")
    where = of_run.add_mutually_exclusive_group(required=True)
    where.add_argument("--emulated", action="store_true", help="on emulated ranks and links, in virtual time")
    where.add_argument("--netns", type=positive, metavar="W", help="W ranks in network namespaces (Linux, root)")
    of_run.add_argument("--each", type=positive, default=1, metavar="N", help="jobs of each kind (default 1)")
    of_run.add_argument("--healthy", type=positive, default=1, metavar="N", help="of each healthy kind (default 1)")
    of_run.add_argument("--seed", type=seed, default=0, help="of the first job of each kind (default 0)")
    of_run.set_defaults(call=lambda arguments: run(arguments, argv))
    of_judge.add_argument("--json", type=output_file, help="also write the figures to this file")
    of_judge.set_defaults(call=judge)
    arguments = parser.parse_args(argv)
    return arguments.call(arguments)


if __name__ == "__main__":
    sys.exit(main())
