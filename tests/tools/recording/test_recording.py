"""Reading recordings that are truncated, damaged, foreign, incomplete, or whose clocks jump."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.synthetic_runs import Run, write_run
from tritonmoe.tools.doctor.recorded_run import judge_recording
from tritonmoe.tools.recording.recording_reader import read_recording


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [Run(size=2)] * 3)


def change(file: Path, number: int, edit: Callable[[dict], None]) -> None:
    """Change line `number`, from 1 on, of a file of JSON lines."""
    lines = file.read_text().splitlines()
    values = json.loads(lines[number - 1])
    edit(values)
    lines[number - 1] = json.dumps(values)
    file.write_text("".join(line + "\n" for line in lines))


def test_a_last_line_that_was_not_finished_is_left_out(run: Path) -> None:
    file = run / "rank-0001.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    found = read_recording(run)
    assert [call.sequence for call in found.calls] == [0, 1]
    assert found.notes == (
        "rank-0001.jsonl ends in the middle of line 4, which is left out",
        "1 calls that not every rank has recorded are left out",
    )


def test_a_broken_line_in_the_middle(run: Path) -> None:
    file = run / "rank-0001.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[2] = lines[2][:-40]
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=re.escape(f"{file} line 3 is damaged")):
        read_recording(run)


BAD_LINES: dict[str, tuple[int, Callable[[dict], object], str]] = {
    "another format": (
        1,
        lambda v: v.update(format="trace"),
        "line 1: not a recording of tritonmoe.tools.recording.record(): format is 'trace'",
    ),
    "a later schema": (
        1,
        lambda v: v.update(schema=2),
        "line 1: schema 2 is of another version of tritonmoe, this one reads 1",
    ),
    "a rank too large": (1, lambda v: v.update(rank=7), "line 1: rank must lie in 0..1, got 7"),
    "another rank": (1, lambda v: v.update(rank=0), "line 1: the header says rank 0, the file's name another one"),
    "a key less": (3, lambda v: v.pop("row_bytes"), "line 3: row_bytes is missing"),
    "words for a number": (3, lambda v: v.update(row_bytes="many"), "line 3: row_bytes: must be a whole number"),
    "an unknown step": (
        4,
        lambda v: v["forward"]["steps"][0].update(kind="dance"),
        "line 4: forward: steps: a step: kind: 'dance' is not a valid StepKind",
    ),
    "a row too few": (3, lambda v: v["rows"].pop(), "line 3: rows: must be a list of 2"),
    "a plan that can't be": (3, lambda v: v["plan"].update(window=0), "line 3: plan: window must be 1..32, got 0"),
    "a clock that jumps": (
        3,
        lambda v: v["forward"].update(origin=v["forward"]["origin"] - 5),
        "line 3: the clock went back",
    ),
    "steps of two clocks": (
        3,
        lambda v: v["forward"]["steps"][1].update(end_s=-3.0),
        "line 3: forward: steps: dispatch 0: these are no times of a pass that takes",
    ),
    "a rank less": (
        4,
        lambda v: v["backward"]["steps"][0]["arrivals_s"].pop(),
        "line 4: backward: steps: a step: arrivals_s: must be a list of 2",
    ),
    "a wait that is no number": (
        3,
        lambda v: v["forward"]["steps"][1].update(load_s="long"),
        "line 3: forward: steps: a step: load_s: must be a finite number, got 'long'",
    ),
    "a wait that is longer than its pass": (
        3,
        lambda v: v["forward"]["steps"][1].update(load_s=9.0),
        "line 3: forward: steps: dispatch 0: these are no times of a pass that takes",
    ),
    "a step less": (3, lambda v: v["forward"]["steps"].pop(3), "line 3: forward: steps: the plan has the steps"),
    "other exchanges": (
        3,
        lambda v: v["backward"].update(
            steps=[s for s in v["backward"]["steps"] if s["kind"] not in ("dispatch_backward", "reduce_backward")]
        ),
        "line 3: call 1 has other exchanges than at",
    ),
    "a negative count": (3, lambda v: v["pairs"].__setitem__(0, -1), "line 3: pairs: must not be negative, got -1"),
    "a number that no count is": (4, lambda v: v.update(top_k=1 << 60), "line 4: top_k: must be a whole number"),
    "a word for a truth": (1, lambda v: v.update(shares_link="no"), "line 1: shares_link: must be true or false"),
    "another transport": (1, lambda v: v.update(transport="MPI"), "line 1: transport is 'MPI', and 'Synthetic' in"),
    "another call": (3, lambda v: v.update(layer=5), "line 3: call 1 is not the one of"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_does_not_fit_is_named(name: str, run: Path) -> None:
    number, edit, message = BAD_LINES[name]
    change(run / "rank-0001.jsonl", number, edit)
    with pytest.raises(ValueError, match=re.escape(f"{run / 'rank-0001.jsonl'} {message}")):
        read_recording(run)


def test_missing_ranks(run: Path) -> None:
    (run / "rank-0000.jsonl").unlink()
    with pytest.raises(ValueError, match=r"of 2 ranks \[0\] are missing"):
        read_recording(run)
    (run / "rank-0001.jsonl").unlink()
    with pytest.raises(ValueError, match="has no recording"):
        read_recording(run)


def test_two_recordings_in_one_folder(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", [Run(size=4)])
    (other / "rank-0003.jsonl").rename(run / "rank-0003.jsonl")
    with pytest.raises(ValueError, match="two recordings"):
        read_recording(run)


def test_an_empty_file(run: Path) -> None:
    (run / "rank-0001.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"rank-0001\.jsonl line 1: the file ends inside its header"):
        read_recording(run)


def shift(seconds: float) -> Callable[[dict], None]:
    """Return what lets a call be recorded so much later."""

    def edit(values: dict) -> None:
        for of in (values["forward"], values["backward"]):
            of["origin"] += seconds
            of["marks"] = {name: at + seconds for name, at in of["marks"].items()}

    return edit


@pytest.mark.parametrize("lines", [(2, 3, 4), (4,)], ids=["two runs of one plan", "a clock that jumps"])
def test_a_rank_that_hears_from_others_before_they_spoke(lines: tuple[int, ...], run: Path) -> None:
    for number in lines:
        change(run / "rank-0001.jsonl", number, shift(60.0))
    first = run / "rank-0000.jsonl"
    with pytest.raises(ValueError, match=re.escape(f"{first} line {lines[0]}: this rank has heard from all ")):
        read_recording(run)


HOURS_S = 2 * 3600.0


def test_a_forward_that_is_written_hours_later(run: Path) -> None:
    """As one is whose graph lives so long: lines are in the order in which calls ended."""
    for file in (run / "rank-0000.jsonl", run / "rank-0001.jsonl"):
        for number in (3, 4):
            change(file, number, shift(HOURS_S))
        header, first, *others = file.read_text().splitlines()
        file.write_text("".join(line + "\n" for line in (header, *others, first)))
    assert [call.sequence for call in read_recording(run).calls] == [0, 1, 2]


def test_the_clock_of_all_ranks_goes_back(run: Path) -> None:
    for file in (run / "rank-0000.jsonl", run / "rank-0001.jsonl"):
        for number in (2, 3):
            change(file, number, shift(HOURS_S))
    first = run / "rank-0000.jsonl"
    with pytest.raises(ValueError, match=re.escape(f"{first} line 4: the clock went back, to 10")):
        read_recording(run)


def test_what_is_no_folder(run: Path) -> None:
    for path in (run / "rank-0000.jsonl", run / "nowhere"):
        with pytest.raises(ValueError, match=re.escape(f"{path} is not a folder")):
            read_recording(path)


def test_clocks_of_two_hosts_are_aligned(run: Path) -> None:
    """Rank 1 is on another host, whose clock is 50 s behind."""
    file = run / "rank-0001.jsonl"
    change(file, 1, lambda values: values.update(host="there"))

    for number in (2, 3, 4):
        change(file, number, shift(-50.0))
    found = read_recording(run)
    assert found.notes == (
        "clocks of 2 hosts aligned, within 0 us",
        "a late link to the only rank of a host is taken for its clock",
    )
    for call in found.calls:
        first, second = call.ranks
        assert second.forward.origin == pytest.approx(first.forward.origin)
        assert second.forward.marks == pytest.approx(first.forward.marks)


def test_what_is_not_known_is_said_of_many_hosts_too(tmp_path: Path) -> None:
    """One note speaks of the clocks of all ranks."""
    run = write_run(tmp_path / "run", [Run(size=4, node_size=2, num_chunks=6, records_arrivals=False)] * 2)
    *_, last = (run / "rank-0003.jsonl").read_text().splitlines(keepends=True)
    (run / "rank-0003.jsonl").write_text((run / "rank-0003.jsonl").read_text().removesuffix(last))
    lines = judge_recording(read_recording(run)).limits
    assert any("fixed cost of a step is not known" in line for line in lines)
    assert sum("clocks of 2 hosts" in line for line in lines) == 1
    assert any("which link or port is slow is not known" in line for line in lines)


LATE_S = 0.03


def hear_late(values: dict) -> None:
    for of in (values["forward"], values["backward"]):
        of["origin"] += LATE_S
        of["marks"]["counts_left"] += LATE_S


@pytest.mark.parametrize("late", [0, 2], ids=["on the first host", "on the other host"])
def test_a_rank_that_counts_reach_late_does_not_move_a_clock(late: int, tmp_path: Path) -> None:
    """Two hosts of two ranks; the clock of the second one, which both of its ranks have, is 50 s behind."""
    run = write_run(tmp_path / "run", [Run(node_size=2)] * 3)
    expected = read_recording(run)
    for number in (2, 3, 4):
        for rank in (2, 3):
            change(run / f"rank-000{rank}.jsonl", number, shift(-50.0))
        change(run / f"rank-000{late}.jsonl", number, hear_late)
    found = read_recording(run)
    assert not any("only rank" in note for note in found.notes)
    for call, before in zip(found.calls, expected.calls, strict=True):
        for rank in range(4):
            for one, other in zip(call.ranks[rank].passes, before.ranks[rank].passes, strict=True):
                assert one.marks is not None
                assert other.marks is not None
                assert one.marks[:2] == pytest.approx(other.marks[:2])
                assert one.marks.counts_left - other.marks.counts_left == pytest.approx(LATE_S * (rank == late))


def test_large_files_are_read_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", [Run(num_chunks=2, noise=0.1)] * 3)
    with (folder / "rank-0001.jsonl").open("a") as file:
        file.write('{"call": 3')
    here = read_recording(folder)
    monkeypatch.setattr("tritonmoe.runtime.processes.SMALL_BYTES", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    there = read_recording(folder)
    assert there.notes == here.notes != ()
    assert [vars(call)["ranks"] for call in there.calls] == [vars(call)["ranks"] for call in here.calls]
    (folder / "rank-0002.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"rank-0002\.jsonl"):
        read_recording(folder)
