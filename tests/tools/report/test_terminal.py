"""Heat maps, timelines and sparklines as text, from integers that a reader can check."""

import io
import sys

import pytest

from tritonmoe.tools.report import png
from tritonmoe.tools.report.png import new_figure
from tritonmoe.tools.report.terminal import TextStyle, heat_map, lane_timelines, sparkline, text_style
from tritonmoe.tools.report.timeline import PassTimeline, Span, Timeline

FORWARD = PassTimeline(
    (
        Span("experts local", "experts", -1, "compute", 0.0, 0.010, 0.0),
        Span("experts 0", "experts", 0, "compute", 0.020, 0.030, 0.020),
        Span("dispatch 0", "dispatch", 0, "comm", 0.0, 0.020, 0.0),
    ),
    0.030,
)
BACKWARD = PassTimeline((Span("weight_grad", "weight_grad", None, "compute", 0.005, 0.020, 0.005),), 0.020)
TIMELINE = Timeline("serial", 2, FORWARD, BACKWARD)


def test_heat_map_shades_and_numbers():
    drawn = heat_map([[0, 4], [2, 8]], TextStyle(unicode=False), row="from", column="to")
    assert drawn.splitlines() == [
        "    to    0    1",
        "from 0    0 :: 4",
        "from 1 .. 2 ## 8",
    ]


def test_heat_map_begins_at_the_least_count():
    drawn = heat_map([[100, 104], [102, 108]], TextStyle(unicode=False), row="from", column="to")
    assert drawn.splitlines() == [
        "    to      0      1",
        "from 0    100 :: 104",
        "from 1 .. 102 ## 108",
    ]


@pytest.mark.parametrize(
    ("rows", "limits"), [([[100, 104], [102, 108]], (100, 108)), ([[7, 7]] * 2, (7, 8)), ([], (0, 1))]
)
def test_the_picture_begins_at_the_least_count(rows, limits):
    figure = new_figure(4, 4)
    axes = figure.add_subplot()
    png._draw_heat_map(axes, rows or [[0]])
    assert axes.images[0].get_clim() == limits
    every = [value for values in rows or [[0]] for value in values]
    assert axes.get_title().endswith(f": {min(every)} (lightest) .. {max(every)}")


def test_heat_map_of_zeros_and_of_no_rows():
    assert heat_map([[0]], TextStyle(), row="from", column="to").splitlines() == ["    to    0", "from 0    0"]
    assert heat_map([], TextStyle(), row="from", column="to").strip() == "to"


def test_heat_map_leaves_out_numbers_that_do_not_fit():
    drawn = heat_map([[5] * 32] * 32, TextStyle(columns=80), row="from", column="to")
    *cells, scale = drawn.splitlines()
    assert len(cells) == 32
    assert all(line.split()[-1] == "█" * 64 for line in cells)
    assert scale == "darkest is 5, brightest 5"


def test_heat_map_refuses_ragged_rows():
    with pytest.raises(ValueError, match=r"one length, got \[2, 1\]"):
        heat_map([[1, 2], [3]], row="from", column="to")


def test_timeline_is_drawn_to_scale():
    # Of 51 columns, 9 go to "1000.0 ms", 7 to "compute" and 3 to spaces: 32 are left for 30 ms.
    drawn = lane_timelines([TIMELINE], TextStyle(columns=51)).splitlines()
    assert drawn == [
        "forward, one character is 0.94 ms",
        " serial    compute eL█████████··········e0█████████",
        " 30.0 ms   comm    d0▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒···········",
        "backward, one character is 0.94 ms",
        " serial    compute ·····w███████████████",
        " 20.0 ms   comm    ·····················",
    ]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_timeline_and_plain_text_fit_the_columns(columns):
    drawn = lane_timelines([TIMELINE, TIMELINE], TextStyle(columns=columns))
    assert max(map(len, drawn.splitlines())) <= columns
    assert "\x1b" not in drawn


def test_color_adds_only_escape_sequences_that_end():
    style = TextStyle(color=True)
    for drawn in (lane_timelines([TIMELINE], style), heat_map([[1, 2]], style, row="from", column="to")):
        assert "\x1b[48;5;" in drawn
        assert all(line.endswith("\x1b[0m") for line in drawn.splitlines() if "\x1b[48" in line)


def test_timeline_without_backward():
    drawn = lane_timelines([Timeline("only", 0, FORWARD, PassTimeline((), 0.0))])
    assert "backward" not in drawn


def test_sparkline():
    assert sparkline([0, 7]) == "▁█"
    assert sparkline([3, 3, 3]) == "▁▁▁"
    assert sparkline([]) == ""
    assert sparkline([8, 8, 1, 1], width=2) == "█▁"
    assert len(sparkline(list(range(1000)), width=60)) == 60


class _Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_style_of_a_pipe_and_of_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    assert text_style(io.TextIOWrapper(io.BytesIO(), "utf-8")) == TextStyle(120, color=False)
    assert text_style(_Terminal(io.BytesIO(), "utf-8")) == TextStyle(120, color=True)
    assert text_style(_Terminal(io.BytesIO(), "ascii")).unicode is False
    monkeypatch.setenv("NO_COLOR", "1")
    assert text_style(_Terminal(io.BytesIO(), "utf-8")).color is False
    assert text_style(sys.stdout).color is False
