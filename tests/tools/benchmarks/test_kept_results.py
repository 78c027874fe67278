"""Results that a kill can't take: torn lines, other runs, damaged files, two writers."""

import multiprocessing

import pytest

from tritonmoe.tools.benchmarks import kept_results
from tritonmoe.tools.benchmarks.kept_results import open_results, read_results, source_hash

CARD = {"device": "a card", "driver": "1.2"}


def cases_in(path):
    return [line["case"] for line in read_results(path)]


def test_a_result_is_there_at_once_and_after_another_start(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    with open_results(path, CARD) as results:
        results.add("one", {"us": 1.5})
        assert cases_in(path) == ["identity", "one"]
    with open_results(path, CARD) as results:
        assert results.by_case["one"]["us"] == 1.5
        results.add("two", {"us": 2.5})
    assert cases_in(path) == ["identity", "one", "two"]
    assert read_results(path)[0] | CARD == read_results(path)[0]


@pytest.mark.parametrize("torn", [b'{"run"', b'{"run": "a", "case": "two"}', b"\x00\x00"])
def test_a_torn_last_line_is_dropped(torn, tmp_path):
    path = tmp_path / "results.jsonl"
    with open_results(path, CARD) as results:
        results.add("one", {})
    path.write_bytes(path.read_bytes() + torn)
    assert cases_in(path) == ["identity", "one"]
    with open_results(path, CARD) as results:
        assert "two" not in results.by_case
        results.add("three", {})
    assert cases_in(path) == ["identity", "one", "three"]


def test_results_of_another_run_stay_and_do_not_count(tmp_path):
    path = tmp_path / "results.jsonl"
    with open_results(path, CARD) as results:
        results.add("one", {})
    for other in ({**CARD, "driver": "1.3"}, {**CARD, "sources": "abc"}):
        with open_results(path, other) as results:
            assert list(results.by_case) == ["identity"]
    with open_results(path, CARD) as results:
        assert list(results.by_case) == ["identity", "one"]


def test_the_last_of_several_results_counts(tmp_path):
    with open_results(tmp_path / "results.jsonl", CARD) as results:
        results.add("one", {"failed": "x"})
        results.add("one", {"us": 1.0})
    with open_results(tmp_path / "results.jsonl", CARD) as results:
        assert "failed" not in results.by_case["one"]


def test_numbers_that_json_has_not(tmp_path):
    with open_results(tmp_path / "results.jsonl", CARD) as results:
        results.add("one", {"errors": [{"error": float("nan")}, (float("inf"), 1.0)]})
    assert read_results(tmp_path / "results.jsonl")[1]["errors"] == [{"error": "nan"}, ["inf", 1.0]]


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"tiles": {}}\n', "line 1 has no run and case"), ("[1]\n", "line 1 has no run"), ("{\n", "damaged")],
)
def test_a_file_that_is_none_of_results(content, words, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=words), open_results(path, CARD):
        pass
    assert path.read_text() == content


def hold(path, is_open, may_end):
    with open_results(path, CARD):
        is_open.set()
        may_end.wait(30)


def test_a_second_process_is_kept_out(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    is_open, may_end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(path, is_open, may_end))
    process.start()
    assert is_open.wait(30)
    monkeypatch.setattr(kept_results, "LOCK_TIMEOUT_S", 0.0)
    with pytest.raises(OSError, match="locked by another process"), open_results(path, CARD):
        pass
    may_end.set()
    process.join()
    with open_results(path, CARD):
        pass


def test_hash_of_sources(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    before = source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert source_hash(tmp_path) == before
    (tmp_path / "a" / "x.py").write_text("2")
    changed = source_hash(tmp_path)
    (tmp_path / "a" / "x.py").rename(tmp_path / "a" / "y.py")
    assert len({before, changed, source_hash(tmp_path)}) == 3


def test_the_hash_does_not_follow_docstrings_and_comments(tmp_path):
    hashes = []
    for file in (
        'def up():\n    """Return h.\n\n    Longer."""\n    # as in the paper\n    return "h"\n',
        '"""Products."""\n\n\ndef up():\n    """Return the hidden rows."""\n    return "h"\n',
        'def up():\n    return "a"\n',
    ):
        (tmp_path / "up.py").write_text(file)
        hashes.append(source_hash(tmp_path))
    assert hashes[0] == hashes[1] != hashes[2]
