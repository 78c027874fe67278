"""read_recording: the files of all ranks as one Recording, matched call by call, on one clock."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from tritonmoe.dispatch.count_exchange import CallMarks
from tritonmoe.overlap.steps import Step
from tritonmoe.runtime.processes import read_files
from tritonmoe.tools.recording.call_recording import RankCall, RecordedCall, RecordedPass, Recording, file_name
from tritonmoe.tools.recording.pass_steps import StepColumns
from tritonmoe.tools.recording.rank_columns import CallLine, RankColumns
from tritonmoe.tools.recording.rank_file import read_rank_file

__all__ = ["is_recording", "read_recording"]

FILE = re.compile(r"rank-\d{4,}\.jsonl")
SAME_CLOCK_S = 5.0
"""By so little a rank may seem to have heard from another one before that spoke: it notes the time after it spoke."""
ALIKE = ("job_ranks", "transport", "node_size", "shares_link", "uses_rendezvous")
"""What the headers of all ranks must say alike."""


def is_recording(path: Path) -> bool:
    """Return whether a folder has files of `record`, or folders of groups of ranks, or nothing at all."""
    return path.is_dir() and (
        not any(path.iterdir())
        or any(FILE.fullmatch(file.name) for file in path.iterdir())
        or any(True for _ in path.glob("ranks-*/rank-*.jsonl"))
    )


def read_recording(path: Path) -> Recording:
    """Read a folder that `record` wrote.

    A last line that was not written to its end is left out, and so are calls that some rank has not recorded.

    Raises:
        ValueError: a file is no recording or damaged, a rank is missing, ranks recorded different calls, or a clock
            went back; the message names the file, and the line where there is one. OSError: a file can't be read.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: give the folder that record() wrote")
    files = sorted(file for file in path.iterdir() if FILE.fullmatch(file.name))
    if not files:
        of_groups = sorted({str(file.parent) for file in path.glob("ranks-*/rank-*.jsonl")})
        if of_groups:
            raise ValueError(
                f"{path} has recordings of groups of ranks, each with its own calls: give the folder of one, or of "
                f"several, as {' '.join(of_groups[:2])}"
            )
        raise ValueError(
            f"{path} has no recording: it has no file {file_name(0)}. The first call of an expert-parallel layer "
            "inside record() writes that file: call a layer over ranks there"
        )
    ranks: list[RankColumns] = []
    steps, begins = StepColumns(), []
    for of_rank in read_files(read_rank_file, files):
        ranks.append(of_rank)
        begins.append(steps.take(of_rank.steps))
    notes = list(dict.fromkeys(note for found in ranks for note in found.notes))
    size = ranks[0].size
    for found in ranks:
        if found.size != size:
            raise ValueError(
                f"{found.path} is of {found.size} ranks and {ranks[0].path} of {size}, so these are files of two "
                "recordings: give the files of one"
            )
        if found.path.name != file_name(found.rank):
            raise ValueError(
                f"{found.path} line 1: the header says rank {found.rank}, the file's name another one: give it the "
                "name that record() gave it"
            )
        for key in ALIKE:
            here, there = found.header.get(key), ranks[0].header.get(key)
            if here != there:
                raise ValueError(f"{found.path} line 1: {key} is {here!r}, and {there!r} in {ranks[0].path}")
    missing = sorted(set(range(size)) - {found.rank for found in ranks})
    if missing:
        raise ValueError(f"{path}: of {size} ranks {missing} are missing: copy the files of all ranks into one folder")
    lines = [found.calls(steps, at) for found, at in zip(ranks, begins, strict=True)]
    of_clocks = _align_clocks(ranks, lines)
    calls = _join_calls(lines, notes)
    return Recording(path, tuple(found.header for found in ranks), calls, (*notes, *of_clocks))


_Lines: TypeAlias = dict[int, CallLine]
"""Of a rank, by the numbers of calls."""


def _align_clocks(ranks: Sequence[RankColumns], lines: Sequence[_Lines]) -> list[str]:
    """Move the times of every host to the clock of rank 0's.

    On one host all processes have one clock. Between hosts all ranks leave a count exchange at about the same moment,
    but for those that a message reaches late: of each host the first rank counts, of all calls the median. Returns what
    is to be known of it.
    """
    hosts: dict[str, list[_Lines]] = {}
    for found, of_rank in zip(ranks, lines, strict=True):
        hosts.setdefault(str(found.header["host"]), []).append(of_rank)
    here, *others = hosts.values()
    if not others:
        return []
    left_here = _left_first(here)
    spreads_s = []
    for there in others:
        ahead = [left - left_here[number] for number, left in _left_first(there).items() if number in left_here]
        if not ahead:
            paths = [ranks[next(n for n, one in enumerate(lines) if one is of[0])].path for of in (there, here)]
            raise ValueError(f"{paths[0]}: no exchange connects its clock with the clock of {paths[1].name}")
        shift_s = statistics.median(ahead)
        spreads_s.append(statistics.median(abs(one - shift_s) for one in ahead))
        for of_rank in there:
            for number, line in of_rank.items():
                of_rank[number] = line._replace(call=_shifted(line.call, shift_s))
    notes = [f"clocks of {len(hosts)} hosts aligned, within {max(spreads_s) * 1e6:.0f} us"]
    if any(len(of_host) == 1 for of_host in hosts.values()):
        notes.append("a late link to the only rank of a host is taken for its clock")
    return notes


def _left_first(of_host: Sequence[_Lines]) -> dict[int, float]:
    """Return by call when the first of a host's ranks had everybody's counts, where all of its ranks say it."""
    first: dict[int, float] = {}
    for number in set.intersection(*(set(found) for found in of_host)):
        marks = [found[number].call.forward.marks for found in of_host]
        left = [of.counts_left for of in marks if of is not None]
        if len(left) == len(of_host):
            first[number] = min(left)
    return first


def _shifted(call: RankCall, shift_s: float) -> RankCall:
    def shifted(layer_pass: RecordedPass) -> RecordedPass:
        marks = layer_pass.marks and CallMarks(*(moment - shift_s for moment in layer_pass.marks))
        return replace(layer_pass, marks=marks, origin=layer_pass.origin - shift_s)

    backward = None if call.backward is None else shifted(call.backward)
    return replace(call, forward=shifted(call.forward), backward=backward)


def _join_calls(ranks: Sequence[_Lines], notes: list[str]) -> tuple[RecordedCall, ...]:
    everywhere = set.intersection(*(set(found) for found in ranks))
    left_out = set.union(*(set(found) for found in ranks)) - everywhere
    if left_out:
        notes.append(f"{len(left_out)} calls that not every rank has recorded are left out")
    num_twice = sum(any(found[number].ran_twice for found in ranks) for number in everywhere)
    if num_twice:
        notes.append(
            f"{num_twice} of {len(everywhere)} calls overflowed their capacity and ran twice: what the first runs took "
            "is in none of these times"
        )
    joined = []
    for sequence in sorted(everywhere):
        lines = [found[sequence] for found in ranks]
        for line in lines[1:]:
            if line.agreed != lines[0].agreed:
                raise ValueError(
                    f"{line.where}: call {sequence} is not the one of {lines[0].where}: {line.agreed} there and "
                    f"{lines[0].agreed} here"
                )
            if not _are_alike(line.call, lines[0].call):
                raise ValueError(f"{line.where}: call {sequence} has other exchanges than at {lines[0].where}")
        _check_clocks(lines)
        joined.append(RecordedCall(sequence, *lines[0].agreed, tuple(line.call for line in lines)))
    return tuple(joined)


def _check_clocks(lines: Sequence[CallLine]) -> None:
    """Raise ValueError where a rank has heard from all before one of them spoke, by their times: these are no one's."""
    for passes in zip(*(line.call.passes for line in lines), strict=False):
        marks = [one.marks for one in passes if one.marks is not None]
        if len(marks) < len(lines):
            continue
        last = max(range(len(lines)), key=lambda rank: marks[rank].counts_posted)
        first = min(range(len(lines)), key=lambda rank: marks[rank].counts_left)
        early_s = marks[last].counts_posted - marks[first].counts_left
        if early_s > SAME_CLOCK_S:
            raise ValueError(
                f"{lines[first].where}: this rank has heard from all {early_s:.1f} s before the one of "
                f"{lines[last].where} sent its counts. A clock has jumped, or these are files of two runs"
            )


def _are_alike(call: RankCall, other: RankCall) -> bool:
    """Return whether two ranks' passes of a call have the same exchanges."""
    if all(a.steps.layout is b.steps.layout for a, b in zip(call.passes, other.passes, strict=False)):
        return True
    return all(here == there for here, there in zip(_exchanges(call), _exchanges(other), strict=False))


def _exchanges(call: RankCall) -> list[list[Step]]:
    """Return the exchanges of each pass, which are matched by their order."""
    layouts = [one.steps.layout for one in call.passes]
    return [[layout.steps[place] for place in layout.exchanges] for layout in layouts]
