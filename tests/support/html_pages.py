"""What every page of report.html must be: well-formed, whole in itself, and with no other numbers than its JSON has."""

import json
from html.parser import HTMLParser
from typing import Any

from tritonmoe.tools.report.figures import UNITS, Figures

VOID = {"meta", "link", "br", "hr", "img", "input"}
SHAPES = {"circle", "line", "path", "polygon", "polyline", "rect"}
MAX_BYTES = 2_000_000


class Parsed(HTMLParser):
    """The elements, numbers and embedded JSON of a page. Raises AssertionError for a tag that is not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[dict[str, str | None], str]] = []
        self.matrices: list[tuple[dict[str, str | None], list[list[str]]]] = []
        self.scripts: dict[str | None, str] = {}
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), attrs
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.numbers.append((found, ""))
        if tag == "table" and "data-matrix" in found:
            self.matrices.append((found, []))
        if tag == "tr" and self._in_matrix and "tbody" in self.open:
            self.matrices[-1][1].append([])
        if tag == "table" and "data-matrix" not in found:
            self._plain = True
        if tag == "script":
            self.scripts[found.get("id")] = ""

    _plain = False

    @property
    def _in_matrix(self) -> bool:
        return "table" in self.open and bool(self.matrices) and not self._plain

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID | SHAPES, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag
        if tag == "table":
            self._plain = False

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        if self.open[-1] == "data":
            attributes, text = self.numbers[-1]
            self.numbers[-1] = attributes, text + data
        if self.open[-1] == "td" and self._in_matrix:
            self.matrices[-1][1][-1].append(data)
        if self.open[-1] == "script":
            name = self.tags[-1][1].get("id")
            self.scripts[name] += data
        elif self.open[-1] != "style":
            self.words += data


def check_page(text: str) -> tuple[Parsed, Any]:
    """Check a page; gives it, and its JSON."""
    assert len(text.encode()) < MAX_BYTES
    page = Parsed(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "@import" not in text
    assert "url(" not in text
    data = json.loads(page.scripts["data"])
    figures = Figures(data)
    assert page.numbers
    for attributes, shown in page.numbers:
        value = figures.at(attributes["data-key"] or "")
        assert value == float(attributes["value"] or "nan"), attributes
        assert shown == UNITS[attributes["data-unit"] or ""](value), attributes
    for attributes, rows in page.matrices:
        values, unit = figures.at(attributes["data-matrix"] or ""), UNITS[attributes["data-unit"] or ""]
        picked = json.loads(attributes.get("data-picked") or "null") or [range(len(rows)), range(len(rows[0]))]
        for i, row in zip(picked[0], rows, strict=True):
            for k, shown in zip(picked[1], row, strict=True):
                assert shown in (unit(values[i][k]), *["-"] * (i == k)), (attributes, i, k)
    return page, data
