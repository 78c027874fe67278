"""A report as one HTML page that needs no network: tables, and charts in SVG, of numbers that it holds as JSON."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Literal

from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.tools.report.charts import Bars, Curves, Heat, Strips
from tritonmoe.tools.report.figures import Line, Table, Words
from tritonmoe.tools.report.terminal import visible

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["Banner", "Block", "Page", "Section", "page_text", "write_page"]

Block = Words | Table | Strips | Heat | Curves | Bars


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Banner:
    """A verdict that is seen from afar: bad in red, good in green, open where there is none."""

    tone: Literal["bad", "good", "open"]
    verdict: Line
    lines: Sequence[Line]
    name: str = ""
    unknown: Sequence[Line] = ()
    """What can't be told, which stands before the verdict."""


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    summary: Sequence[Line]
    sections: Sequence[Section]
    data: Json | list[Json]
    """The JSON with all numbers that are shown."""
    trace: Json | None = None
    """What chrome_trace gives; the page offers it as a file."""
    banners: Sequence[Banner] = ()


def page_text(page: Page) -> str:
    """Return the page as HTML. Raises ImportError without jinja2, ValueError for NaN or infinity in its data."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("a report needs jinja2, which is not installed: pip install 'tritonmoe[html]'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["embedded"] = _embedded
    template = environment.from_string((resources.files("tritonmoe.tools.report") / "page.html").read_text("utf-8"))
    return visible(template.render(page=page))


def _embedded(data: object) -> "Markup":
    """Return JSON that can stand inside a script element, whatever its strings hold."""
    from markupsafe import Markup

    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def write_page(path: str | os.PathLike, page: Page) -> None:
    """Write the page. Raises what page_text raises, and OSError where it could not be written, whole."""
    write_whole(path, page_text(page), "report")
