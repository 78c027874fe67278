"""What `tritonmoe bench overlap` says: figures that can't be, words that are explained, how long it will take."""

import statistics
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tritonmoe.runtime.progress import Progress, duration
from tritonmoe.tools.benchmarks import argument_types
from tritonmoe.tools.benchmarks.overlap import make_parser
from tritonmoe.tools.benchmarks.overlap_report import (
    TERMS,
    TERMS_OF_PICTURE,
    as_table,
    as_terms,
    headline,
    mark_contention,
    noise_notes,
    overlap_page,
    summarize_overlap,
)
from tritonmoe.tools.benchmarks.overlap_report import marks as judged
from tritonmoe.tools.benchmarks.timing import quartiles, summarize
from tritonmoe.tools.benchmarks.transformers import main as bench_transformers
from tritonmoe.tools.cli import main
from tritonmoe.tools.report.timeline import PassTimeline, Span, Timeline

SUSPECTS = ["bound_ratio", "pass_bound_ratio", "hidden_share", "exposed_ms", "speed_up"]


def results_of(
    overlapped_ms: float,
    communication_ms: float = 40.0,
    passes: tuple = ((40, 60), (10, 30)),
    serial_ms: float = 140.0,
) -> dict:
    """Return the results of three rounds, of compute that takes 100 ms; "auto" takes 120."""
    times = {"compute": 100.0, "communication C=1": communication_ms, "serial C=1": serial_ms}
    times |= {"overlapped C=2": overlapped_ms, "auto": 120.0}
    report = SimpleNamespace(forward=SimpleNamespace(compute_s=0.03), num_chunks=2)
    measured: Any = SimpleNamespace(
        seconds={name: [time_ms / 1e3] * 3 for name, time_ms in times.items()},
        pass_seconds={
            name: [[time_ms / 1e3] * 3 for time_ms in of_passes]
            for name, of_passes in zip(("compute", "communication C=1"), passes, strict=True)
        },
        reports={name: [report] * 3 for name in ("compute", "overlapped C=2", "auto")},
        experts_s={name: ([0.045, 0.04, 0.9], [0.03, 0.036, 0.03]) for name in ("overlapped C=2", "auto")},
    )
    summary = summarize_overlap(measured)
    about = {"link": "a link", "model": "tiny", "tokens": 9, "routing": "uniform", "pass": "forward", "rounds": 7}
    nothing: dict = {
        "wire_dtype": None,
        "compute_ratio": None,
        "variants": {},
        "predicted_ms": {},
        "sent_bytes": None,
        "uplink_bytes": {},
    }
    return {**about, **nothing, "summary": summary}


@pytest.mark.parametrize(
    ("overlapped_ms", "too_noisy"),
    [
        (120.0, []),
        (100.0, []),
        (99.7, []),  # a call at its bound, as well as it can be measured
        (99.4, ["hidden_share"]),  # 1.015 of the communication, which is the shorter one
        (73.6, SUSPECTS),  # hidden 1.66
    ],
)
def test_faster_than_compute_is_too_noisy(overlapped_ms: float, too_noisy: list[str]) -> None:
    results = results_of(overlapped_ms)
    assert results["summary"]["overlapped"]["marks"] == dict.fromkeys(too_noisy, "too noisy")
    assert results["summary"]["auto"]["marks"] == ({"over_best": "too noisy"} if "bound_ratio" in too_noisy else {})
    text, picture = as_table(results), headline(results)
    rows = {line.split()[0]: line for line in text.partition("\n\n")[0].splitlines()}
    for name in SUSPECTS:
        assert ("too noisy: " in rows[name]) == (name in too_noisy)
    assert ("hidden_share too noisy: " in picture) == ("hidden_share" in too_noisy)
    assert "%" not in text
    notes = noise_notes(results)
    assert len(notes) == bool(too_noisy) + ("bound_ratio" in too_noisy)
    assert all(note in text for note in notes)
    for note in notes[:1]:
        assert f"too noisy ({', '.join(too_noisy)})" in note
        assert f"overlapped C=2 took {overlapped_ms:.2f} ms, beside 100.00 ms of compute and 40.00 ms of comm" in note
        assert note.endswith(
            "Measure more rounds (--rounds), on an idle machine, or a larger layer (--tokens, --model)."
        )


def test_faster_than_communication_or_than_its_passes_is_too_noisy() -> None:
    assert set(results_of(190.0, 200.0, serial_ms=300.0)["summary"]["overlapped"]["marks"]) == {
        *("bound_ratio", "pass_bound_ratio", "hidden_share", "speed_up")
    }
    # The passes' longer sides: 40 of compute, 80 of communication.
    uneven = results_of(105.0, 90.0, ((40, 60), (10, 80)))["summary"]["overlapped"]
    assert uneven["pass_bound_ratio"] == 0.875
    assert uneven["marks"] == dict.fromkeys(("pass_bound_ratio", "hidden_share", "speed_up"), "too noisy")


def test_figures_of_a_time_within_the_quartiles_of_that_in_turn_are_too_noisy() -> None:
    """All take 120 ms in every round: nothing tells what is hidden or exposed, and nothing is beyond its bound."""
    results = results_of(120.0, serial_ms=120.0)
    everything = dict.fromkeys(sorted(SUSPECTS), "too noisy")
    assert [dict(sorted(results["summary"][kind]["marks"].items())) for kind in ("overlapped", "auto")] == [
        everything,
        everything,
    ]
    note, _ = noise_notes(results)
    assert "exposed_ms, bound_ratio, pass_bound_ratio, speed_up): the middle halves of its rounds and of T_ser" in note
    note, *_ = noise_notes(results_of(99.4, serial_ms=99.4))  # which hides 1.015 of the communication, besides
    assert "speed_up): neither a call nor one of its passes can be faster than" in note
    assert "; the middle halves of its rounds and of T_serial's overlap. " in note


@pytest.mark.parametrize(("spread_s", "is_marked"), [(0.02, False), (0.03, True)])
def test_figures_of_a_time_that_rounds_do_not_tell_are_too_noisy(spread_s: float, is_marked: bool) -> None:
    """Compute takes 100 ms in the median, in the other rounds so much less or more; speed_up needs no compute."""
    measured = drifting({"compute": [1.0] * 3, "communication C=1": [0.5] * 3, "serial C=1": [1.5] * 3} | {
        name: [1.2] * 3 for name in ("overlapped C=2", "auto")
    })  # fmt: skip
    measured.seconds["compute"] = [0.1 - spread_s, 0.1, 0.1 + spread_s]
    summary = summarize_overlap(measured)
    marked = {"bound_ratio", "pass_bound_ratio", "hidden_share", "exposed_ms"} if is_marked else set()
    assert {*summary["overlapped"]["marks"]} == marked
    if is_marked:
        about = results_of(120.0)
        note = noise_notes({**about, "summary": summary})[0]
        assert "the rounds of T_compute and T_pass_bound differ by more than half of the median" in note


def test_no_bound_of_the_passes_is_below_communication() -> None:
    """Communication alone may take longer outside its passes than compute does: here 40 of 110 ms, and nothing."""
    summary = results_of(120.0, 110.0, ((40, 60), (10, 60)))["summary"]
    assert summary["T_pass_bound"]["median_ms"] == summary["T_communication"]["median_ms"] == 110.0


@pytest.mark.parametrize(("asked", "is_missed"), [(None, False), (2.5, False), (2.1, False), (2.0, True), (3.1, True)])
def test_a_ratio_of_compute_that_is_missed_is_said(asked: float | None, is_missed: bool) -> None:
    """The times are 100 and 40 ms."""
    results = results_of(120.0) | {"compute_ratio": asked}
    notes = noise_notes(results)
    assert len(notes) == is_missed
    if is_missed:
        words = f"compute took 2.50 times as long as communication, and the link's rate was chosen for {asked:g} (--com"
        assert notes[0].startswith(words)
        assert notes[0] in as_table(results)


@pytest.mark.parametrize(("contention", "is_marked"), [(1.4, False), (0.993, False), (0.61, True)])
def test_experts_that_are_faster_during_exchanges_are_too_noisy(contention: float, is_marked: bool) -> None:
    results = results_of(120.0)
    results["summary"]["auto"]["contention"] = contention
    mark_contention(results["summary"])
    assert ("contention" in results["summary"]["auto"]["marks"]) == is_marked
    assert "contention" not in results["summary"]["overlapped"]["marks"]
    assert (f"too noisy: {contention:.3f}" in as_table(results)) == is_marked


@pytest.mark.parametrize(
    ("overlapped_ms", "serial_ms", "marks"),
    [
        (140.3, 140.0, {}),  # as long as both in turn
        (158.0, 140.0, {"hidden_share": "nothing hidden"}),
        (158.0, 141.0, {"hidden_share": "nothing hidden"}),  # a time in series within 0.01 of its parts
        (158.0, 170.0, {"hidden_share": "too noisy", "speed_up": "too noisy"}),
        (120.0, 170.0, {"hidden_share": "too noisy", "speed_up": "too noisy"}),
        (120.0, 119.0, {}),  # both parts have what a call does once
    ],
)
def test_a_share_that_cannot_be_is_marked_everywhere(overlapped_ms: float, serial_ms: float, marks: dict) -> None:
    results = results_of(overlapped_ms, serial_ms=serial_ms)
    summary = results["summary"]
    assert summary["overlapped"]["marks"] == marks
    assert judged(summary["overlapped"], summary) == marks
    results |= {"ranks": 2, "traffic_rows": [[1, 2], [2, 1]], "sweep": [], "verdict": {"text": "A verdict."}}
    timeline = Timeline(
        "serial C=1", 0, *[PassTimeline((Span("experts", "experts", None, "compute", 0.0, 0.1, 0.1),), 0.1)] * 2
    )
    page = overlap_page(results, {"serial C=1": [timeline]})
    assert page.data["summary"]["overlapped"]["marks"] == marks
    (shares,) = (row for row in page.sections[0].blocks[0].table.rows if row[0] == "hidden_share")
    rows = {line.split()[0]: line for line in as_table(results).partition("\n\n")[0].splitlines()}
    said = f"{marks['hidden_share']}: {summary['overlapped']['hidden_share']:.3f}" if marks else None
    for text in (shares[1], rows["hidden_share"], headline(results)):
        assert (said in text) if said else ("too noisy" not in text and "nothing hidden" not in text)
    notes = noise_notes(results)
    assert set(notes) <= set(page.summary)
    if serial_ms == 170.0:
        assert "T_serial is longer than T_compute and T_communication together, as the verdict says" in notes[0]
    elif marks:
        assert notes == [
            "nothing hidden: overlapped C=2 took 158.00 ms, beside 100.00 ms of compute and 40.00 ms of communication "
            "alone. Its steps cost more than they hide."
        ]


def drifting(factors: dict[str, list[float]]) -> Any:
    """Return measurements on a machine whose speed drifts: 100 ms times the factors of each schedule's rounds."""
    seconds = {name: [0.1 * factor for factor in of_one] for name, of_one in factors.items()}
    rounds = len(next(iter(seconds.values())))
    report = SimpleNamespace(forward=SimpleNamespace(compute_s=0.03), num_chunks=2)
    return SimpleNamespace(
        seconds=seconds,
        pass_seconds={name: [[0.05] * rounds] for name in ("compute", "communication C=1")},
        reports={name: [report] * rounds for name in seconds},
        experts_s={name: ([0.03], [0.03]) for name in ("overlapped C=2", "auto")},
    )


def test_the_slower_schedule_has_the_smaller_speed_up() -> None:
    """The median of the rounds' own ratios says the opposite here: 1.5 for auto and 1.2 for the faster one."""
    factors = {"compute": [0.5, 0.5, 0.5], "communication C=1": [0.5, 0.5, 0.5], "serial C=1": [1.2, 1.5, 3.0]}
    factors |= {"overlapped C=2": [1.0, 0.8, 2.5], "auto": [0.8, 1.1, 2.0]}
    summary = summarize_overlap(drifting(factors))
    overlapped, auto = summary["overlapped"], summary["auto"]
    assert (overlapped["median_ms"], auto["median_ms"]) == (100.0, 110.0)
    assert overlapped["speed_up"] == 1.5
    assert auto["speed_up"] == round(150 / 110, 4)
    assert (
        statistics.median(s / t for s, t in zip(factors["serial C=1"], factors["overlapped C=2"], strict=True)) == 1.2
    )
    assert statistics.median(s / t for s, t in zip(factors["serial C=1"], factors["auto"], strict=True)) > 1.49
    assert auto["over_best"] == 1.1
    assert (overlapped["exposed_ms"], overlapped["bound_ratio"], overlapped["hidden_share"]) == (50.0, 2.0, 0.0)


def test_contention_is_beside_the_same_chunks_alone() -> None:
    assert results_of(120.0)["summary"]["overlapped"]["contention"] == 1.5  # 45 ms over 30, of each the median


def test_quartiles_of_few_rounds_are_within_them() -> None:
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([3.0, 1.0]) == (1.0, 3.0)
    assert quartiles([2.0, 3.0, 1.0]) == (1.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (1.5, 4.5)
    of_two = summarize([0.1, 0.5])
    assert (of_two["lower_quartile_ms"], of_two["upper_quartile_ms"]) == (100.0, 500.0)


def test_every_word_is_explained() -> None:
    usage = make_parser().format_help()
    assert as_terms(TERMS) in usage
    assert set(TERMS_OF_PICTURE) <= set(TERMS)
    explained = as_terms(TERMS_OF_PICTURE)
    said = headline(results_of(110.0)).partition(": ")[2].split(", ")
    assert [one.split()[0] for one in said] == ["bound_ratio", "hidden_share", "speed_up"]
    assert all(f"\n{one.split()[0]} " in explained for one in said)


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = Progress("measuring", 50)
    silent = Progress("measuring", 50, speaks=False)
    for _ in range(50):
        clock[0] += 1.5
        progress.advance()
        silent.advance()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "measuring: 50 calls ...",
        "measuring: 2 of 50 calls, about 1 min 12 s left",
        "measuring: 9 of 50 calls, about 1 min 2 s left",
        "measuring: 16 of 50 calls, about 51 s left",
        "measuring: 23 of 50 calls, about 40 s left",
        "measuring: 30 of 50 calls, about 30 s left",
        "measuring: 37 of 50 calls, about 20 s left",
        "measuring: 44 of 50 calls, about 9 s left",
        "measuring: done in 1 min 15 s",
    ]


@pytest.mark.parametrize(("seconds", "words"), [(59.4, "59 s"), (59.6, "1 min 0 s"), (7500.0, "2 h 5 min")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# Paths that can't be written are refused before anything is measured.


def test_a_picture_is_a_png(complaint_of, tmp_path) -> None:
    assert "'x.png', got 'x.txt'" in complaint_of(bench_transformers, ["--png", "x.txt"])
    for name in ("x.png", "x.PNG", "x", "new/x.png"):
        path = tmp_path / name
        assert argument_types.picture_file(str(path)) == path
    assert str(argument_types.picture_file("/dev/null")) == "/dev/null"
    assert list(tmp_path.iterdir()) == []


def test_a_picture_needs_matplotlib(complaint_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argument_types.importlib.util, "find_spec", lambda name: None)
    said = complaint_of(bench_transformers, ["--png", "x.png"])
    assert "matplotlib, which draws it, is not installed: pip install 'tritonmoe[demo]'" in said


@pytest.mark.parametrize("arguments", [["demo", "--out"], ["bench", "overlap", "--emulate", "2", "--png"]])
def test_no_permission(arguments: list[str], complaint_of, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(argument_types.os, "access", lambda place, mode: str(place) != str(tmp_path))
    for path in (tmp_path / "x.png", tmp_path / "new" / "x.png"):
        said = complaint_of(main, [*arguments, str(path)])
        assert f"can't be written: no permission to write to {tmp_path}" in said


def test_a_folder_is_no_file(complaint_of) -> None:
    assert "test_overlap_table.py is no directory" in complaint_of(main, ["demo", "--out", __file__])
