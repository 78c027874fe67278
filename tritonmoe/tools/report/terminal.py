"""Heat maps, lane timelines and sparklines as text: with colour on a terminal, plain where output is piped."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.report.timeline import LANES, NODE, Span, Timeline

__all__ = [
    "TEXT_COLUMNS",
    "TIMELINE_LEGEND",
    "TextStyle",
    "heat_map",
    "lane_timelines",
    "one_line",
    "refused",
    "short_name",
    "sparkline",
    "text_style",
    "visible",
    "wrapped",
]

MIN_COLUMNS, MAX_COLUMNS = 40, 160
TEXT_COLUMNS = 88
"""Sentences and tables are at most as wide: a terminal, a log and a page of the docs have room for them."""

SHORT_NAMES = {
    StepKind.METADATA: "m",
    StepKind.DISPATCH: "d",
    StepKind.GROUP: "g",
    StepKind.EXPERTS: "e",
    StepKind.COMBINE: "c",
    StepKind.REDUCE: "r",
    StepKind.COMBINE_BACKWARD: "d",
    StepKind.EXPERTS_BACKWARD: "e",
    StepKind.DISPATCH_BACKWARD: "c",
    StepKind.ROUTING_BACKWARD: "m",
    StepKind.WEIGHT_GRAD: "w",
    StepKind.REDUCE_BACKWARD: "r",
    StepKind.REDUCE_ROUTING_BACKWARD: "r",
    StepKind.COPIES: "k",
    StepKind.SPREAD_COPIES: "k",
    StepKind.COPY_EXPERTS: "e",
    StepKind.COPY_EXPERTS_BACKWARD: "e",
    StepKind.COPY_WEIGHT_GRAD: "w",
    StepKind.COPIES_BACKWARD: "k",
    StepKind.REDUCE_COPIES_BACKWARD: "r",
}
"""A backward's exchange of rows has the letter of the forward's in the same direction."""
TIMELINE_LEGEND = (
    "d dispatch (in backward: output gradients to the experts), e experts,",
    "c combine (in backward: input gradients home), w weight gradients, r sums at",
    "home, m routing data, g grouping, k weights of copied experts (backward: their",
    "gradients); 0 1 2 ...: chunk, L: rows that stay at home",
)

# 256-colour palette: from dark blue through violet to yellow, readable with white, then black text.
HEAT_COLORS = (17, 18, 54, 90, 126, 162, 167, 173, 179, 186)
LANE_COLORS = {"compute": (25, 32), "comm": (130, 172), NODE: (60, 97)}
OBEYED = (
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Characters that a terminal or a browser obeys instead of showing: controls of both kinds, the return of the carriage,
order of writing, what is invisible, other ends of lines; and halves of characters, as in names that are no UTF-8."""
GROUNDS = "|".join(map(str, sorted({*HEAT_COLORS, *(color for of in LANE_COLORS.values() for color in of)})))
_OURS_OR_OBEYED = re.compile(rf"(\x1b\[0m|\x1b\[48;5;(?:{GROUNDS});38;5;(?:231|16)m)|{OBEYED}")


def visible(text: str) -> str:
    """Return a text of which a terminal or a browser obeys nothing but our own colours and ends of lines.

    Names of files, of hosts and of events are others' texts. What would move the cursor, set the title, or turn the
    order of writing round, stands there as Python writes it, as in "\\x1b[2J".
    """
    return _OURS_OR_OBEYED.sub(lambda found: found[1] or _escaped(found[0]), text)


def one_line(text: object) -> str:
    """Return a name or a message for the middle of a line: its own ends of lines are written as "\\n"."""
    return visible(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def refused(command: str, error: object) -> int:
    """Print in one line on stderr why a command can't run; return its exit status, 2."""
    print(f"tritonmoe {command}: {one_line(error)}", file=sys.stderr)
    return 2


@dataclass(frozen=True)
class TextStyle:
    """What the reader's screen can show."""

    columns: int = 80
    color: bool = False
    unicode: bool = True


def text_style(stream: TextIO) -> TextStyle:
    """Return the style for a stream: colour only on a terminal and without NO_COLOR, Unicode where it can be encoded.

    The width is that of the terminal or of the variable COLUMNS, and 80 where neither is known.
    """
    columns = shutil.get_terminal_size((80, 24)).columns
    color = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    try:
        "░▒▓█▁·│".encode(stream.encoding or "ascii")
        can_encode = True
    except (UnicodeEncodeError, LookupError):
        can_encode = False
    return TextStyle(max(MIN_COLUMNS, min(columns, MAX_COLUMNS)), color, can_encode)


def wrapped(text: str) -> str:
    """Return a text whose longer lines go on below, two columns further in; words and paths stay whole."""
    lines = []
    for line in text.split("\n"):
        behind = " " * (len(line) - len(line.lstrip()) + 2)
        pieces = textwrap.wrap(
            line, TEXT_COLUMNS, subsequent_indent=behind, break_long_words=False, break_on_hyphens=False
        )
        lines += pieces if len(line) > TEXT_COLUMNS else [line]
    return "\n".join(lines)


def heat_map(matrix: Sequence[Sequence[int]], style: TextStyle | None = None, *, row: str, column: str) -> str:
    """Draw a matrix of counts with one shaded cell each: darkest is the least count, brightest the largest.

    Args:
        matrix: rows of non-negative integers, all of one length.
        row, column: what a row and a column stand for: "from", "to".
    Raises:
        ValueError: the rows differ in length.
    """
    style = style or TextStyle()
    width = len(matrix[0]) if matrix else 0
    if any(len(values) != width for values in matrix):
        raise ValueError(f"a heat map's rows must have one length, got {[len(values) for values in matrix]}")
    every = [value for values in matrix for value in values]
    least, largest = min(every, default=0), max(every, default=0)
    digits = max([len(str(largest)), *(len(str(index)) for index in range(width))])
    labels = [f"{row} {index}" for index in range(len(matrix))]
    label_width = max((len(label) for label in labels), default=0)
    shades = " ░▒▓█" if style.unicode else " .:+#"
    # A cell is " 123 " on a coloured ground, or shade, number, space; where that is too wide, shade only.
    cell_width = digits + 4
    has_numbers = label_width + 1 + width * cell_width <= style.columns
    if not has_numbers:
        cell_width = 2

    def cell(value: int) -> str:
        level = (value - least) / (largest - least) if largest > least else float(largest > 0)
        if style.color:
            index = round(level * (len(HEAT_COLORS) - 1))
            text = f"{value:>{cell_width - 1}} " if has_numbers else " " * cell_width
            return f"\x1b[48;5;{HEAT_COLORS[index]};38;5;{231 if index < 7 else 16}m{text}\x1b[0m"
        shade = shades[round(level * (len(shades) - 1))]
        return f"{shade * 2} {value:>{digits}} " if has_numbers else shade * 2

    lines = []
    if has_numbers:
        # The label stands over the first column's numbers, the index over each column.
        names = "".join(f"{index:>{cell_width - 1}} " for index in range(width))
        lines.append(f"{column:>{label_width}} {names}".rstrip())
    for label, values in zip(labels, matrix, strict=True):
        lines.append(f"{label:>{label_width}} {''.join(cell(value) for value in values)}".rstrip())
    if every and not has_numbers:
        lines.append(f"darkest is {least}, brightest {largest}")
    return "\n".join(lines)


def short_name(span: Span) -> str:
    """Return one letter for a kind of step, the same inside a node and between nodes."""
    return SHORT_NAMES.get(StepKind.named(span.kind).twin, "?")


def _label(span: Span) -> str:
    """Return two or three characters for a step: "d0", "eL", "w"."""
    name = short_name(span)
    if span.chunk is None:
        return name
    return name + ("L" if span.chunk < 0 else str(span.chunk))


def _lane(spans: Sequence[Span], lane: str, end_s: float, scale_s: float, style: TextStyle) -> str:
    """Draw one lane up to end_s, one character per `scale_s` seconds."""
    idle = "·" if style.unicode else "."
    fill = dict(zip(LANES, "█▒▓" if style.unicode else "#=%", strict=True))
    used = round(end_s / scale_s)
    characters = [idle] * used
    colors: list[int | None] = [None] * used
    for number, span in enumerate(span for span in spans if span.lane == lane):
        first = round(span.start_s / scale_s)
        last = min(round(span.end_s / scale_s), used)
        if first >= last:
            continue
        ground = " " if style.color else fill[lane]
        characters[first:last] = _label(span)[: last - first].ljust(last - first, ground)
        shade = LANE_COLORS[lane][(number if span.chunk is None else span.chunk) % 2]
        colors[first:last] = [shade] * (last - first)
    if not style.color:
        return "".join(characters)
    pieces: list[str] = []
    current: int | None = None
    for character, color in zip(characters, colors, strict=True):
        if color != current:
            pieces.append("\x1b[0m" if color is None else f"\x1b[48;5;{color};38;5;231m")
            current = color
        pieces.append(character)
    return "".join(pieces) + "\x1b[0m"


def lane_timelines(timelines: Sequence[Timeline], style: TextStyle | None = None) -> str:
    """Draw the lanes of several runs, forward then backward, everything to one scale."""
    style = style or TextStyle()
    passes = [("forward", [timeline.forward for timeline in timelines])]
    if any(timeline.backward.spans for timeline in timelines):
        passes.append(("backward", [timeline.backward for timeline in timelines]))
    name_width = max((len(timeline.name) for timeline in timelines), default=0)
    name_width = max(name_width, len("1000.0 ms"))
    lane_width = max(map(len, LANES))
    cells = style.columns - name_width - lane_width - 3
    longest_s = max((part.total_s for _, parts in passes for part in parts), default=0.0)
    scale_s = longest_s / cells if longest_s > 0 else 1.0
    lines = []
    for title, parts in passes:
        lines.append(f"{title}, one character is {scale_s * 1e3:.2f} ms")
        for timeline, part in zip(timelines, parts, strict=True):
            labels = timeline.name, f"{part.total_s * 1e3:.1f} ms", ""
            for label, lane in zip(labels, timeline.lanes, strict=False):
                drawn = _lane(part.spans, lane, part.total_s, scale_s, style)
                lines.append(f" {label:<{name_width}} {lane:<{lane_width}} {drawn}".rstrip())
    return "\n".join(lines)


def sparkline(values: Sequence[float], style: TextStyle | None = None, *, width: int = 60) -> str:
    """Draw values as one line of bars, lowest value lowest; more values than `width` are averaged in groups.

    Example:
        sparkline([0, 7]) gives "▁█".
    """
    style = style or TextStyle()
    bars = "▁▂▃▄▅▆▇█" if style.unicode else "_.-=+*%#"
    count = min(len(values), width)
    groups = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = high - low
    return "".join(bars[round((mean - low) / span * (len(bars) - 1)) if span > 0 else 0] for mean in means)
