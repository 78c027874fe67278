"""Recordings and traces as large as those of a real job, and what the doctor needs for them.

    python -m bench.large_runs recording /tmp/large          # 64 ranks, 16 layers, 100 steps: 2 GB
    python -m bench.large_runs traces /tmp/large FEW         # 64 traces of 100 MB, of the steps of those in FEW: 6.4 GB

Prints what the doctor finds first, how long it took, and the most memory that its own process, and each of those that
read files for it, have held. The folder is made, and removed when the doctor has ended.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.synthetic_runs import Run, write_run
from tritonmoe.runtime.files import Json
from tritonmoe.tools.doctor.trace_files import open_text
from tritonmoe.tools.recording.call_recording import file_name
from tritonmoe.tools.recording.rank_file_writer import DECIMALS

__all__ = ["write_large_run", "write_large_traces"]

TRACE_BYTES = 100_000_000
MADE_STEPS = 5
"""So many steps are simulated, and repeated later and later."""
MARKER = "<moment>"
STEP = re.compile(r'"user_annotation",\s*"name": "ProfilerStep#(\d+)"[^}]*?"ts": ([\d.]+),\s*"dur": ([\d.]+)')


def write_large_run(folder: Path, run: Run, num_steps: int, num_bytes: int | None = None) -> int:
    """Write a recording of so many steps of a run, or of so many bytes a rank, into a folder; return all bytes."""
    made = MADE_STEPS if num_bytes is not None else min(MADE_STEPS, num_steps)

    def parsed(line: str) -> Json:
        return json.loads(line, parse_float=lambda text: round(float(text), DECIMALS))

    with TemporaryDirectory(dir=folder.parent) as few:
        write_run(Path(few), [run] * made)
        period_s = _period_s([parsed(line) for line in _lines(Path(few), 0)[1:]], made)
        times = num_steps // made
        if num_bytes is not None:
            times = max(1, num_bytes // (Path(few) / file_name(0)).stat().st_size)
        for rank in range(run.size):
            header, *calls = _lines(Path(few), rank)
            _repeat(folder / file_name(rank), header, [parsed(line) for line in calls], times, period_s)
    return sum(file.stat().st_size for file in folder.iterdir())


def _lines(folder: Path, rank: int) -> list[str]:
    return (folder / file_name(rank)).read_text().splitlines()


def _period_s(calls: Sequence[Json], made: int) -> float:
    first = min(call["forward"]["marks"]["entered"] for call in calls)
    last = max(of["origin"] + of["total_s"] for call in calls for of in (call["forward"], call["backward"]))
    return (last - first) * (made + 0.1) / made


def _repeat(path: Path, header: str, calls: Sequence[Json], times: int, period_s: float) -> None:
    """Write the calls of a rank so many times, each time later and with numbers of their own."""
    texts, moments = [], []
    for call in calls:
        moments.append([call["call"]])
        call["call"] = MARKER
        for of in (call["forward"], call["backward"]):
            moments[-1] += [*of["marks"].values(), of["origin"]]
            of["marks"], of["origin"] = dict.fromkeys(of["marks"], MARKER), MARKER
        texts.append(json.dumps(call).split(f'"{MARKER}"'))
    with path.open("w") as file:
        file.write(header + "\n")
        for time in range(times):
            for text, (number, *at) in zip(texts, moments, strict=True):
                values = [number + time * len(calls), *(moment + time * period_s for moment in at)]
                filled = [
                    part
                    for both in zip(text, (repr(round(value, DECIMALS)) for value in values), strict=False)
                    for part in both
                ]
                file.write("".join([*filled, text[-1]]) + "\n")


def write_large_traces(folder: Path, few: Path, num_ranks: int, num_bytes: int) -> int:
    """Write torch.profiler's traces of so many ranks, each of so many bytes, into a folder; return the bytes of all.

    few: a folder with the traces of a few ranks, whose steps are repeated, later and later.
    Raises:
        ValueError: there are no traces in it, or one has no steps.
    """
    files = sorted(few.glob("*.trace.json*"))
    if not files:
        raise ValueError(f"{few} has no files *.trace.json or *.trace.json.gz: give a folder that torch.profiler wrote")
    for first, file in enumerate(files):
        with open_text(file) as opened:
            trace = _Trace(opened.read(), file)
        events = trace.repeated(num_bytes)
        for rank in range(first, num_ranks, len(files)):
            head = trace.head_of(rank, num_ranks, len(files))
            (folder / f"rank-{rank:04d}.trace.json").write_text(head + events + trace.tail)
    return sum(file.stat().st_size for file in folder.iterdir())


class _Trace:
    """A trace as Kineto writes it, whose events are repeated as text."""

    def __init__(self, text: str, file: Path) -> None:
        at, end = text.index('"traceEvents": [') + len('"traceEvents": ['), text.rindex("]")
        self.head, self.tail = text[:at], text[end:]
        steps = [(int(found[1]), float(found[2]), float(found[3])) for found in STEP.finditer(text)]
        if not steps:
            raise ValueError(f"{file} has no steps: profiler.step() was not called")
        self.num_steps, self.first_us = len(steps), min(start for _, start, _ in steps)
        last_us = max(start + us for _, start, us in steps)
        self.period_us = last_us - self.first_us + 1
        events = re.split(r'(?<=\}),\s*(?=\{\s*"ph": )', text[at:end].strip())
        self.events = [one for one in events if self.first_us <= _moment_us(one) <= last_us]

    def head_of(self, rank: int, num_ranks: int, few: int) -> str:
        """Return what stands before the events, of a rank of so many, where there were a few."""
        head = re.sub(r'"rank": \d+, "world_size": \d+', f'"rank": {rank}, "world_size": {num_ranks}', self.head)
        whole = f'"pg_size": {num_ranks}, "ranks": {list(range(num_ranks))}'
        head = head.replace(f'"pg_size": {few}, "ranks": {list(range(few))}', whole)
        return re.sub(r'"ranks": \[\d+\]', f'"ranks": [{rank}]', head)

    def repeated(self, num_bytes: int) -> str:
        """Return the events again and again, until they have so many bytes."""
        texts = [self._later(0)]
        while sum(map(len, texts)) < num_bytes:
            texts.append(self._later(len(texts)))
        return ",".join(texts)

    def _later(self, times: int) -> str:
        text = ",\n".join(self.events)
        text = re.sub(r'"ts": ([\d.]+)', lambda found: f'"ts": {float(found[1]) + times * self.period_us:.3f}', text)
        return re.sub(
            r"ProfilerStep#(\d+)", lambda found: f"ProfilerStep#{int(found[1]) + times * self.num_steps}", text
        )


def _moment_us(event: str) -> float:
    found = re.search(r'"ts": ([\d.]+)', event)
    return float(found[1]) if found else -1.0


def _judge(folder: Path) -> None:
    """Print the doctor's first lines on a run, and what it needed."""
    begin = time.monotonic()
    script = (
        "import resource, sys; from tritonmoe.tools.cli import main; code = main(['doctor', sys.argv[1]]);"
        "used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)];"
        "print(*(x for of in used for x in (of.ru_utime + of.ru_stime, of.ru_maxrss * 1024 / 1e9)));"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    lines = done.stdout.splitlines()
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    own_s, own_gb, readers_s, reader_gb = map(float, lines[-1].split())
    begin_of_verdict = next((n for n, line in enumerate(lines) if line.startswith("a step takes")), 1)
    print(lines[0], *lines[begin_of_verdict : begin_of_verdict + 2], sep="\n")
    print(f"{seconds:.1f} s; processor: {own_s:.1f} s in its own process, {readers_s:.1f} s in those that read files")
    print(f"at most {own_gb:.1f} GB in its own process, {reader_gb:.1f} GB in each of those that read files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recording", "traces"])
    parser.add_argument("folder", type=Path, help="is made, and removed")
    parser.add_argument("few", type=Path, nargs="?", help="a folder with torch.profiler's traces of a few ranks")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--megabytes", type=float, help="of each rank's file; of traces 100, else as --steps says")
    parser.add_argument("--layers", type=int, default=16, help="of a recording")
    parser.add_argument("--steps", type=int, default=100, help="of a recording")
    given = parser.parse_args()
    if (given.what == "traces") != (given.few is not None):
        parser.error("traces needs FEW, a folder with traces of a few ranks; recording takes none")
    if given.folder.exists():
        parser.error(f"{given.folder} is there already: give a new folder, it is removed afterwards")
    num_bytes = None if given.megabytes is None else int(given.megabytes * 1e6)
    given.folder.mkdir(parents=True)
    try:
        if given.what == "traces":
            total = write_large_traces(given.folder, given.few, given.ranks, num_bytes or TRACE_BYTES)
        else:
            slow = min(3, given.ranks - 1), 1.3
            run = Run(given.ranks, rows=50.0, num_layers=given.layers, is_chained=True, noise=0.02, slow_rank=slow)
            total = write_large_run(given.folder, run, given.steps, num_bytes)
        print(f"{given.ranks} files, {total / 1e6:.0f} MB")
        _judge(given.folder)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
