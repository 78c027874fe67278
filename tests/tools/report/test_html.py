"""The HTML reports: well-formed, whole in themselves, small, without foreign markup, with the numbers of their JSON."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from html_pages import check_page

from tests.support.synthetic_runs import Run, ones, write_run
from tritonmoe.tools.cli import main
from tritonmoe.tools.doctor.lanes import shown_of
from tritonmoe.tools.doctor.link_fit import LinkRatios
from tritonmoe.tools.doctor.page import RecordedPart, runs_page
from tritonmoe.tools.doctor.recorded_graph import graph_of
from tritonmoe.tools.doctor.recorded_run import RecordedRun, judge_recording
from tritonmoe.tools.doctor.run_figures import figures_of
from tritonmoe.tools.doctor.verdict import as_json, as_text, warnings_of
from tritonmoe.tools.planner import comparison as comparing
from tritonmoe.tools.planner import training_plan as planning
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.model_config import find_model
from tritonmoe.tools.planner.plan_page import comparison_page, plan_page
from tritonmoe.tools.planner.plan_text import comparison_as_json, plan_as_json
from tritonmoe.tools.recording.recording_reader import read_recording
from tritonmoe.tools.report.charts import Bars, Curve, Curves, Heat, Segment, Strip, compact, ticks
from tritonmoe.tools.report.figures import Figures, Number, Table, Words
from tritonmoe.tools.report.html import Page, Section, page_text


def as_data(one: RecordedRun) -> dict:
    return {**as_json(one, one.found, one.advice), **figures_of(one)}


def run_page(found: list[RecordedRun]) -> Page:
    figures = Figures([as_data(one) for one in found])
    parts = {
        str(one.recording.path): RecordedPart(one, shown_of(one.found), figures, str(n)) for n, one in enumerate(found)
    }
    return runs_page(parts, figures)


ROOT = Path(__file__).parents[3]
EVIL = "<script>alert('a & b')</script></script><!--"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    folder = tmp_path_factory.mktemp("slow")
    return judge_recording(read_recording(write_run(folder, [Run(slow_rank=(2, 1.5))] * 4)))


@cache
def comparison() -> comparing.Comparison:
    job = Job(find_model("Qwen3-30B-A3B"), micro_batches=2, recompute="full")
    draws, scales = planning.NUM_DRAWS, comparing.SCALES
    planning.NUM_DRAWS, comparing.SCALES = 4, (0.5, 1.0)
    try:
        return comparing.compare(job, [CLUSTERS["H100"].with_nodes(4), CLUSTERS["H200"].with_nodes(2)], (4, 8))
    finally:
        planning.NUM_DRAWS, comparing.SCALES = draws, scales


def test_a_run(slow: RecordedRun) -> None:
    page, data = check_page(page_text(run_page([slow])))
    assert data == json.loads(json.dumps([as_data(slow)]))
    assert "SLOW RANK: rank 2 computes 1.50 times as long as usual" in page.words
    assert {attributes["data-matrix"] for attributes, _ in page.matrices} == {
        "0/waits_for_ranks_s", "0/waits_s", "0/byte_ratios",
    }  # fmt: skip
    shown = {attributes["data-key"] for attributes, _ in page.numbers}
    assert {"0/measured_s", "0/findings/0/share", "0/median_call/backward/3/counts_left_s", "0/gap_s"} <= shown
    waits = data[0]["waits_s"]
    assert max(waits[0]) == waits[0][2] > 0
    trace = json.loads(page.scripts["trace"])["traceEvents"]
    assert {event["args"]["run"] for event in trace if event["ph"] == "X"} == {"measured", "replayed"}
    assert {event["pid"] for event in trace} == {0, 1, 2, 3}


def test_findings_that_may_be_noise_are_marked_as_on_the_terminal(slow: RecordedRun) -> None:
    (few,) = warnings_of(slow.found)
    assert few.startswith("4 steps may be too few")
    noisy = replace(slow, found=replace(slow.found, noise_s=0.2 * slow.found.replayed_s))
    warning, _ = warnings_of(noisy.found)
    assert "record again" in warning
    assert warning in as_text(noisy, noisy.found)
    (banner,) = run_page([noisy]).banners
    assert warning in banner.lines


def test_measured_and_replayed_lanes_agree(slow: RecordedRun) -> None:
    """The synthetic recording is the simulator's own: the replay must show the same lanes."""
    trace = run_page([slow]).trace
    assert trace is not None
    ends: dict[tuple, dict[str, float]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event["cat"] == "compute" and "backward" in event["name"]:
            ends.setdefault((event["pid"], event["name"]), {})[event["args"]["run"]] = event["ts"] + event["dur"]
    assert ends
    for of in ends.values():
        assert of["replayed"] == pytest.approx(of["measured"], rel=0.01)


def test_names_are_not_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / EVIL.replace("/", "_"), [Run()] * 3)
    for file in folder.iterdir():
        file.write_text(file.read_text().replace('"host": "node0"', f'"host": {json.dumps(EVIL)}'))
    text = page_text(run_page([judge_recording(read_recording(folder))]))
    page, data = check_page(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert EVIL in page.words
    assert "<script>alert" not in text
    assert data[0]["headers"][0]["host"] == EVIL


@pytest.mark.thorough
def test_64_ranks_fit(slow: RecordedRun, tmp_path: Path) -> None:
    """As many ranks as can be drawn. Of more calls only medians and sums are shown."""
    run = Run(size=64, slow_rank=(63, 1.5), rows=20.0)
    recording = read_recording(write_run(tmp_path, [run] * 2))
    of_byte = ones(64, 64).index_fill(0, torch.tensor([63]), 1.2345)
    ratios = LinkRatios(of_byte, of_byte, 0 * of_byte, True)
    costs = replace(slow.costs, steps=run.steps(), link=run.link(), ratios=ratios, slowness=(1.0,) * 63 + (1.5,))
    finding = replace(slow.found.findings[0], culprits=replace(slow.found.findings[0].culprits, ranks=(63,)))
    built = graph_of(recording)
    found = replace(slow.found, graph=built.graph, findings=(finding,))
    run_of_64 = replace(slow, recording=recording, built=built, calls=recording.calls * 4, costs=costs, found=found)
    page, _ = check_page(page_text(run_page([run_of_64])))
    assert "16 of 64 ranks are drawn" in page.words
    assert "rank 63" in page.words
    assert [len(rows) for _, rows in page.matrices] == [64, 64, 64]


def test_unknown_arrivals(slow: RecordedRun) -> None:
    """Where the transport doesn't tell when rows arrived there is no matrix, and the page says so."""
    ratios = replace(slow.costs.ratios, are_told_apart=False)
    page, data = check_page(page_text(run_page([replace(slow, costs=replace(slow.costs, ratios=ratios))])))
    assert (data[0]["waits_s"], data[0]["byte_ratios"], len(page.matrices)) == (None, None, 1)
    assert "doesn't tell when each rank's rows arrived" in page.words


def test_a_plan() -> None:
    plan = comparison().plans[0]
    page, data = check_page(page_text(plan_page(plan)))
    assert data == json.loads(json.dumps(plan_as_json(plan)))
    shown = {attributes["data-key"] for attributes, _ in page.numbers}
    assert {"choices/0/step_ms", "stays_best", "measure_next/0/swing", "estimates/gpu.gemm_efficiency/value"} <= shown


def test_a_comparison() -> None:
    page, data = check_page(page_text(comparison_page(comparison())))
    assert data == json.loads(json.dumps(comparison_as_json(comparison())))
    assert [[one["gpus"] for one in of] for of in data["by_gpus"]] == [[8, 16, 32, 64, 128], [8, 16, 32, 64]]
    (own,) = (one for one in data["by_gpus"][0] if one["gpus"] == 32)
    assert own["usd_per_million_tokens"] == data["usd_per_million_tokens"][0][1]
    assert {"by_gpus/1/1/step_ms", "is_cheapest/0"} <= {attributes["data-key"] for attributes, _ in page.numbers}


def test_a_comparison_with_a_cluster_on_which_nothing_fits() -> None:
    of = comparison()
    unfit = replace(of.plans[1], predictions=[replace(of.plans[1].best, fits=False)])
    page, data = check_page(
        page_text(comparison_page(replace(of, plans=[of.plans[0], unfit], is_cheapest=[None, None])))
    )
    assert data["break_even_usd_per_gpu_hour"][1] is None
    assert "H200: the job doesn't fit" in page.words
    assert "of the draws of the estimates" not in page.words.partition("H200: nothing fits")[2]


@pytest.mark.thorough
def test_commands_write_pages(slow: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = tmp_path / "run.html", tmp_path / "run.json"
    assert main(["doctor", str(slow.recording.path), "--html", str(paths[0]), "--json", str(paths[1])]) == 1
    _, data = check_page(paths[0].read_text())
    assert data == json.loads(paths[1].read_text())


def test_without_jinja2(
    slow: RecordedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path), "--html", str(tmp_path / "page.html")])
    assert "pip install 'tritonmoe[html]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'tritonmoe\[html\]'"):
        page_text(run_page([slow]))


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        page_text(Page("title", [], [], {"number": float("nan")}))


def test_a_heat_map_of_nothing() -> None:
    names = ["0", "1"]
    heat = Heat("nothing", "of", [[0, 0], [None, 0]], "count", "from", "to", names, names)
    curves = Curves("none", "x", "y", [Curve("of one point", [(1.0, 0.0)])], None)
    text = page_text(
        Page("title", ["nothing"], [Section("all", [heat, curves, Words(["a", "b"])])], {"of": [[0, 0]] * 2})
    )
    assert "<path" not in text
    assert 'cy="100.00%"' in text


def test_cells_are_square_and_hold_numbers() -> None:
    names = ["0", "1"]
    values = [[0.0, 0.0123], [0.0012, None]]
    heat = Heat("waits", "of", values, "s", "from", "to", names, names)
    assert heat.numbers == [(0, 1, "12", True), (1, 0, "1.2", False)]
    text = page_text(Page("title", ["x"], [Section("all", [heat])], {"of": values}))
    assert 'width="100.4" height="98"' in text  # cells of 40 by 40, beside names
    assert "numbers in cells are ms" in text
    assert not heat.is_upright
    assert Heat("", "", values, "s", "", "", names, ["rank dp 0", "rank dp 1"]).is_upright
    many = [str(n) for n in range(64)]
    assert Heat("", "", [[1.0] * 64] * 64, "s", "", "", many, many).cell == 15
    wide = [str(n) for n in range(256)]
    assert Heat("", "", [[1.0] * 256], "times", "", "", ["0"], wide).numbers == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, ""), (0.04, ""), (0.26, "0.3"), (1.0, "1"), (9.96, "10"), (123.4, "123"), (999.7, "1k"), (1234, "1.2k")],
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


def test_many_segments_are_one_path() -> None:
    few, many = ([Segment(n / of, 1 / of, "c0", f"{n}") for n in range(of)] for of in (60, 61))
    assert Strip("few", few).paths == []
    ((color, path),) = Strip("many", many).paths
    assert (color, path.count("M")) == ("c0", 61)


def test_bars_stand_side_by_side() -> None:
    table = Table(["step"], [["1"]])
    bars = Bars("steps", "step", "ms", ["1", "2"], [1.0, 2.0], ["c0", "c6"], 1.0, [], table)
    assert bars.top == pytest.approx(2.1)
    assert bars.paths == [("c0", "M3.00 1000v-476.2h494.00V1000z"), ("c6", "M503.00 1000v-952.4h494.00V1000z")]


@pytest.mark.parametrize(("top", "texts"), [(7.0, ["0", "2", "4", "6"]), (0.11, ["0", "0.02", "0.04"]), (0.0, [])])
def test_ticks(top: float, texts: list[str]) -> None:
    found = ticks(top)
    assert [text for _, text in found][: len(texts)] == texts
    assert len(found) <= 6
    assert all(0 <= share <= 1 for share, _ in found)


def test_units() -> None:
    shown = [
        Number("", value, unit).text for value, unit in ((0.0123, "s"), (2e-5, "s"), (12.5, "s"), (0.123, "share"))
    ]
    assert shown == ["12.3 ms", "20.0 us", "12.5 s", "12.3 %"]


def test_the_wheel_has_the_template() -> None:
    pytest.importorskip("setuptools")
    code = """if True:
        from setuptools import Distribution
        found = Distribution({'script_name': 'setup.py'})
        found.parse_config_files()
        build = found.get_command_obj("build_py")
        build.ensure_finalized()
        print(*(f"{package}/{name}" for package, _, _, names in build.data_files for name in names))
    """
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    others = {path for path in (ROOT / "tritonmoe").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    others = {path.relative_to(ROOT) for path in others if path.suffix not in (".py", ".pyc")}
    assert set(ended.stdout.split()) == {f"{'.'.join(path.parent.parts)}/{path.name}" for path in others}


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const problems = [];
window.addEventListener("error", (event) => problems.push(event.message));
window.addEventListener("load", () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const shown = [...document.querySelectorAll("data[data-key]")];
  for (const one of shown) {
    const value = one.dataset.key.split("/").reduce((found, name) => found[name], data);
    if (value !== Number(one.value)) problems.push(`${one.dataset.key}: ${value} is shown as ${one.value}`);
  }
  const saved = [];  // a real download would hold up the end of a browser without a window
  HTMLAnchorElement.prototype.click = function () { saved.push(this.download, this.href.slice(0, 5)); };
  const button = document.getElementById("save-trace");
  button?.click();
  if (button && saved.join() !== "trace.json,blob:") problems.push(`the button saves ${saved}`);
  for (const one of document.querySelectorAll("svg, figcaption, p, li, h1, h2, .strip, .box"))
    if (one.getBoundingClientRect().right > window.innerWidth + 1 && !one.closest(".box"))
      problems.push(`${one.tagName} ${one.className} ends at ${one.getBoundingClientRect().right}`);
  for (const one of document.querySelectorAll(".lanes .strip > span:first-child"))
    if (one.getClientRects()[0].height > 1.5 * parseFloat(getComputedStyle(one).lineHeight))
      problems.push(`a lane's name breaks: ${one.textContent}`);
  for (const one of document.querySelectorAll('.box[aria-label="The findings"]'))
    if (window.innerWidth > 1000 && one.scrollWidth > one.clientWidth)
      problems.push(`${one.ariaLabel} is cut: ${one.scrollWidth} px in ${one.clientWidth}`);
  const page = document.documentElement;
  window.parent.postMessage([window.innerWidth, page.scrollWidth, shown.length, problems], "*");
});
</script>"""
AROUND = """<!DOCTYPE html><title></title><body><script>
window.addEventListener("message", (event) => { document.title = JSON.stringify(event.data); });
</script><iframe src="page.html" style="border: 0; width: {width}px; height: 900px"></iframe>"""
"""A window of Chromium is at least 500 pixels wide."""


@pytest.mark.thorough
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("which", ["run", "plan", "comparison"])
@pytest.mark.parametrize("width", [390, 1100])
def test_in_a_browser(which: str, width: int, slow: RecordedRun, tmp_path: Path) -> None:
    if which == "run":
        page = run_page([slow])
    else:
        page = comparison_page(comparison()) if which == "comparison" else plan_page(comparison().plans[0])
    (tmp_path / "page.html").write_text(page_text(page).replace("<body>", f"<body>{PROBE}"))
    around = tmp_path / "around.html"
    around.write_text(AROUND.replace("{width}", str(width)))
    command = [
        *(CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900"),
        around.as_uri(),
    ]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert ended.returncode == 0, ended.stderr
    assert "CONSOLE" not in ended.stderr
    title = ended.stdout.partition("<title>")[2].partition("</title>")[0]
    inner, scroll, num_shown, problems = json.loads(title)
    assert problems == []
    assert inner == width
    assert scroll <= width
    assert num_shown > 20
