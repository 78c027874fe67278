"""Recordings and traces as large as those of a real job, to see what the doctor needs for them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.synthetic_runs import Run, write_run
from tritonmoe.diagnosis.call_recording import file_name
from tritonmoe.diagnosis.rank_file_writer import DECIMALS
from tritonmoe.runtime.files import Json

__all__ = ["write_large_run"]

MADE_STEPS = 5
"""So many steps are simulated, and repeated later and later."""
MARKER = "<moment>"


def write_large_run(folder: Path, run: Run, num_steps: int) -> int:
    """Write a recording of so many steps of a run; return its bytes."""
    folder.mkdir(parents=True)
    made = min(MADE_STEPS, num_steps)

    def parsed(line: str) -> Json:
        return json.loads(line, parse_float=lambda text: round(float(text), DECIMALS))

    with TemporaryDirectory(dir=folder.parent) as few:
        write_run(Path(few), [run] * made)
        period_s = _period_s([parsed(line) for line in _lines(Path(few), 0)[1:]], made)
        for rank in range(run.size):
            header, *calls = _lines(Path(few), rank)
            _repeat(folder / file_name(rank), header, [parsed(line) for line in calls], num_steps // made, period_s)
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
                filled = [part for both in zip(text, (repr(round(value, DECIMALS)) for value in values), strict=False) for part in both]
                file.write("".join([*filled, text[-1]]) + "\n")
