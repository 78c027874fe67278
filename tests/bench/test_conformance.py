"""python -m bench.conformance: the committed table is of these cases, and what is wrong is called wrong."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from bench import conformance, conformance_cases
from bench.conformance_cases import CASES, outcome_of
from bench.readme import kernel_tables
from virtual_gpu.launcher import run_launch

TABLE = json.loads((Path(__file__).parents[2] / conformance.RESULT).read_text())
ROWS = TABLE["results"]


def case_named(start, **fields):
    return next(case for case in CASES if case.name.startswith(start) and vars(case).items() >= fields.items())


def test_the_table_is_of_these_cases():
    assert TABLE["cases_hash"] == conformance.cases_hash(), "stale: run python -m bench.conformance"
    assert [{"case": row["case"], "card": row["card"]} for row in ROWS] == conformance.cases_and_cards()
    assert all(list(row["outcomes"]) == TABLE["triton_versions"] for row in ROWS)
    assert TABLE["triton_versions"] == list(conformance.RELEASES)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("case", "card", "outcome", "versions"),
    [
        ("dot_scaled of e2m1, packed along rows", "sm_120", "wrong", ["3.6.0", "3.7.1", "3.8.0"]),
        ("dot_scaled of a batch", "sm_120", "not compiled", ["3.6.0", "3.7.1", "3.8.0"]),
        ("dot_scaled of e4m3, depth last, scale byte 0", "sm_90", "wrong", ["3.6.0", "3.7.1", "3.8.0"]),
        ("two dots of bf16, TMA", "sm_100", "fault", ["3.6.0", "3.7.1", "3.8.0"]),
        ("quantise, trans", "sm_90", "exact", list(conformance.RELEASES)),
    ],
)
def test_published_faults_are_in_the_table(case, card, outcome, versions):
    rows = [row["outcomes"] for row in ROWS if row["case"].startswith(case) and row["card"] == card]
    assert rows
    for outcomes in rows:
        assert [version for version, found in outcomes.items() if found["outcome"] == outcome] == versions


def test_spills_and_longer_loops_of_a_release_are_in_the_table():
    costs = {row["card"]: row["outcomes"] for row in ROWS if "registers" in row["outcomes"]["3.6.0"]}
    assert [bool(found["spills"]) for found in costs["gfx942"].values()] == [False, False, True, False]
    loops = [found["loop"] for found in costs["sm_89"].values()]
    assert max(loops[:2]) < 0.6 * min(loops[2:])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        ("", "", {"outcome": "exact"}),
        ("min.NaN.f32", "min.f32", {"outcome": "wrong", "detail": "2 of 2048 numbers differ"}),  # the one NaN, twice
        ("min.NaN.f32", "min.what.f32", "not known"),
    ],
)
def test_a_changed_result_is_called_wrong(before, after, outcome, monkeypatch):
    def changed(launch, target, keep):
        run_launch(launch, target, lambda assembly: keep(assembly).replace(before, after))

    monkeypatch.setattr(conformance_cases, "run_launch", changed)
    found = outcome_of(case_named("quantise, trans", warps=1), "sm_120")
    assert found == outcome or found["outcome"] == outcome


@pytest.mark.thorough
def test_a_missing_barrier_is_a_fault(monkeypatch):
    def changed(launch, target, keep):
        run_launch(launch, target, lambda assembly: keep(assembly).replace("bar.sync", "// bar.sync"))

    monkeypatch.setattr(conformance_cases, "run_launch", changed)
    assert outcome_of(case_named("dot of bf16", warps=4), "sm_120")["outcome"] == "fault"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("case", "card"),
    [
        ("dot, scaled blocks", "sm_90"),  # sums that nobody has written before the product
        ("dot_scaled of e4m3", "sm_89"),  # codes of 8 bits out of parts of registers
        ("dot of bf16, TMA gather", "sm_100"),
    ],
)
def test_cases_are_exact(case, card):
    assert outcome_of(case_named(case), card)["outcome"] == "exact"


def test_a_triton_that_is_not_installed_is_an_error(tmp_path, capsys):
    arguments = ["--triton-versions", "1.2.3", "--overlays", str(tmp_path), "--json", str(tmp_path / "table.json")]
    assert conformance.main(arguments) == 2
    said = capsys.readouterr().err
    assert f"python -m pip install --no-deps --target {tmp_path / '1.2.3'} triton==1.2.3" in said
    assert not (tmp_path / "table.json").exists()


def test_a_compiler_that_ends_its_process_is_an_outcome(tmp_path, monkeypatch):
    places = conformance.cases_and_cards()
    firsts = []

    class Done:
        stderr = "what it said"

    def run(command, **keywords):
        first = int(command[-1])
        firsts.append(first)
        done, last = Done(), first + 2 if len(firsts) == 1 else len(places)
        done.returncode = -6 if len(firsts) == 1 else 0
        done.stdout = "".join(json.dumps(place | {"outcome": "exact"}) + "\n" for place in places[first:last])
        return done

    (tmp_path / "1.2.3" / "triton").mkdir(parents=True)
    monkeypatch.setattr(conformance.subprocess, "run", run)
    file = tmp_path / "table.json"
    arguments = ["--triton-versions", "1.2.3", "--overlays", str(tmp_path), "--json", str(file)]
    assert conformance.main(arguments) == 0
    assert firsts == [0, 3]
    rows = json.loads(file.read_text())["results"]
    assert [{"case": row["case"], "card": row["card"]} for row in rows] == places
    unlike = [row["outcomes"]["1.2.3"] for row in rows if row["outcomes"]["1.2.3"]["outcome"] != "exact"]
    assert unlike == [{"outcome": "not compiled", "detail": "the compiler ends with SIGABRT"}]
    monkeypatch.setattr(Done, "returncode", 1, raising=False)
    monkeypatch.setattr(
        conformance.subprocess,
        "run",
        lambda *_, **__: type("Failed", (), {"returncode": 1, "stdout": "", "stderr": "no torch"}),
    )
    assert conformance.main(arguments) == 2


def test_the_page_names_what_is_wrong(monkeypatch):
    right, wrong = {"outcome": "exact"}, {"outcome": "wrong", "detail": "3 of 4 numbers differ"}
    rows = [
        {"case": "dot of bf16", "card": "sm_90", "outcomes": {"3.6.0": right, "3.9.0": wrong}},
        {"case": "dot of fp16", "card": "sm_90", "outcomes": {"3.6.0": right, "3.9.0": right}},
    ]
    table = TABLE | {"triton_versions": ["3.6.0", "3.9.0"], "results": rows}
    monkeypatch.setattr(kernel_tables, "load", lambda name: table)
    text = kernel_tables.conformance_table("conformance")
    assert "| sm_90 | 2 exact | 1 exact, 1 wrong |" in text
    assert "| dot of bf16 | sm_90 | exact | wrong: 3 of 4 numbers differ |" in text
    assert "dot of fp16" not in text
