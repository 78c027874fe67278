"""The page of runs of any trainer: what it says first, its colors, its numbers; of one rank to 64, to 1000 steps."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from html_pages import Parsed, check_page

from bench.faults import Fault
from bench.foreign_scenarios import Scenario
from bench.synthetic_traces import write_traces
from tests.support.synthetic_runs import Run, write_run
from tritonmoe.tools.cli import main
from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.graph import Graph, Kind, Member
from tritonmoe.tools.doctor.graph import Run as Work
from tritonmoe.tools.doctor.lanes import Shown, shown_of, slow_steps
from tritonmoe.tools.doctor.page import _coarser
from tritonmoe.tools.doctor.reading import read_traces


def page_of(*folders: Path, status: int) -> tuple[Parsed, list]:
    html = folders[0].parent / f"{folders[0].name}.html"
    verdict = html.with_suffix(".verdict")
    command = ["doctor", *map(str, folders), "--html", str(html), "--json", str(verdict)]
    assert main(command) == status
    page, data = check_page(html.read_text())
    assert data == json.loads(verdict.read_text())
    return page, data


def tones(page: Parsed) -> list[str]:
    classes = [(attributes.get("class") or "").split() for tag, attributes in page.tags if tag == "div"]
    return [of[1] for of in classes if of[:1] == ["banner"]]


def late(folder: Path, seed: int = 1, **others: int) -> Path:
    write_traces(Scenario("", seed, faults=(Fault("late rank", (1,), 0.1),), **others), folder)
    return folder


def test_what_is_wrong(tmp_path: Path) -> None:
    folder = late(tmp_path / "late")
    (folder / "notes.txt").write_text("of Tuesday")
    page, (data,) = page_of(folder, status=1)
    assert tones(page) == ["bad"]
    order = ["What these files can't tell", "notes.txt", "1 finding: LATE RANK", "data loading", "costs a step"]
    places = [page.words.index(words) for words in order]
    assert places == sorted(places)
    waits = data["waits_for_ranks_s"]
    for rank in (0, 2, 3):  # all of them wait for the late one, as long as it costs
        assert waits[rank][1] == pytest.approx(0.1, rel=0.1)
        assert waits[rank][1] == max(waits[rank])
    assert waits[1][1] == 0
    assert {attributes["data-matrix"] for attributes, _ in page.matrices} == {"0/waits_for_ranks_s"}
    shown = {attributes["data-key"] for attributes, _ in page.numbers}
    assert {"0/findings/0/low_s", "0/findings/0/share", "0/measured_steps_s/11", "0/by_rank/3/sent_bytes"} <= shown


def test_what_ranks_do_adds_up_to_a_step(tmp_path: Path) -> None:
    found = attribute(read_traces(late(tmp_path)).graph)
    shown = shown_of(found)
    for of in shown.ranks:
        seconds = of.computing_s + of.host_s + of.waiting_s + of.rows_s
        assert seconds == pytest.approx(found.replayed_s, rel=0.02)
    for step, pieces in shown.lanes.items():
        assert {piece.step for piece in pieces} == {step}
        for before, after in pairwise(pieces):
            assert after.rank != before.rank or after.start_s >= before.end_s - 1e-9


@pytest.mark.thorough
def test_a_healthy_run_and_one_that_is_not_look_unlike(tmp_path: Path) -> None:
    write_traces(Scenario("", 1), tmp_path / "healthy")
    page, _ = page_of(tmp_path / "healthy", late(tmp_path / "late"), status=1)
    assert tones(page) == ["good", "bad"]
    assert "HEALTHY: if every operation took its usual time" in page.words


@pytest.mark.thorough
def test_recordings_and_traces_on_one_page(tmp_path: Path) -> None:
    own = write_run(tmp_path / "own", [Run(slow_rank=(2, 1.5))] * 4)
    page, data = page_of(own, late(tmp_path / "late"), status=1)
    assert tones(page) == ["bad", "bad"]
    assert [one["findings"][0]["kind"] for one in data] == ["slow rank", "late rank"]
    assert {attributes["data-matrix"] for attributes, _ in page.matrices} >= {"0/waits_s", "1/waits_for_ranks_s"}


def test_one_rank_alone(tmp_path: Path) -> None:
    late(tmp_path / "all", num_steps=2)
    (tmp_path / "one").mkdir()
    (tmp_path / "all" / "rank0.json").rename(tmp_path / "one" / "rank0.json")
    page, (data,) = page_of(tmp_path / "one", status=1)
    assert tones(page) == ["open"]
    assert "there is the file of one rank only" in page.words
    assert "NO VERDICT: there is nothing to compare two steps of one rank with" in page.words
    assert (data["waits_for_ranks_s"], page.matrices) == ([[0.0]], [])


@pytest.mark.slow
def test_64_ranks(tmp_path: Path) -> None:
    fault = Fault("late rank", (63,), 0.1)
    write_traces(Scenario("", 11, num_ranks=64, num_layers=4, faults=(fault,)), tmp_path / "late")
    page, (data,) = page_of(tmp_path / "late", status=1)
    ((_, rows),) = page.matrices
    assert (len(rows), len(rows[0])) == (64, 64)
    assert data["waits_for_ranks_s"][0][63] == pytest.approx(0.1, rel=0.2)
    dark = [attributes for tag, attributes in page.tags if tag == "text" and attributes.get("class") == "in-dark"]
    assert len(dark) >= 63  # all wait for the one rank


@pytest.mark.slow
def test_1000_steps_with_every_50th_slow(tmp_path: Path) -> None:
    fault = Fault("late rank", (1,), 0.4, "periodic", 50)
    write_traces(Scenario("", 11, num_ranks=2, num_steps=1000, faults=(fault,)), tmp_path / "long")
    page, (data,) = page_of(tmp_path / "long", status=1)  # with noise, which is not certain to be none
    assert not data["findings"]
    assert set(data["slow_steps"]) >= set(range(50, 1001, 50))
    assert "Slow are" in page.words


def test_waits_are_of_the_rank_that_comes_last() -> None:
    """Three ranks come after 1, 2 and 5 s to an exchange of 1 s."""
    graph = Graph([0, 1, 2], [7], begin_s=[0.0] * 3, measured_s=[6.0])
    for rank, seconds in enumerate((1.0, 2.0, 5.0)):
        graph.runs.append(Work(rank, 0, ("work",), seconds * 0.75, seconds * 0.25))
        graph.members.append(Member(rank, 0, 0, ("all_reduce", 0), 0, 0.0, 1.0))
        graph.programs.append([(Kind.RUN, rank), (Kind.POST, rank), (Kind.WAIT, rank), (Kind.STEP, 0)])
    graph.exchanges.append([0, 1, 2])
    shown = shown_of(attribute(graph))
    assert shown.waits_s == [[0.0, 0.0, 4.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
    assert [(of.computing_s, of.host_s, of.waiting_s, of.rows_s) for of in shown.ranks] == [
        (0.75, 0.25, 4.0, 1.0), (1.5, 0.5, 3.0, 1.0), (3.75, 1.25, 0.0, 1.0),
    ]  # fmt: skip
    assert _kinds(shown, 0) == ["computing", "host", "waiting", "rows"]
    coarse = _coarser([piece for piece in shown.lanes[0] if piece.rank == 0], 0.0, 1.0)
    assert [(piece.doing, piece.start_s, piece.end_s) for piece in coarse] == [
        ("computing", 0.0, 1.0), ("waiting", 1.0, 5.0), ("rows", 5.0, 6.0),
    ]  # fmt: skip


def _kinds(shown: Shown, rank: int) -> list[str]:
    return [piece.doing for piece in shown.lanes[shown.typical] if piece.rank == rank]


def test_slow_steps() -> None:
    assert slow_steps([1.0, 1.02, 0.98, 1.5, 1.01]) == [3]
    assert slow_steps([1.0, 1.3, 0.7, 1.2, 0.8]) == []
    assert slow_steps([1.0]) == []
