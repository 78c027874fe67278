"""A Cluster's TOML file: read with every mistake named by line and key, and written with a comment on every number."""

import dataclasses
import re
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

from tritonmoe.config.numbers import is_integer, is_number
from tritonmoe.runtime.files import Json, check_depth_of_names, nests_too_deep, read_bytes
from tritonmoe.tools.planner.cluster import PRODUCTS, SOURCES, SPREADS, Cluster, Estimate, Of, settings_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["parse_cluster", "read_cluster", "to_toml"]

MAX_TOML_BYTES = 1 << 20
MAX_MESSAGE = 600
"""Characters of a message: it quotes what stands in the file."""
SPREAD = Of("spread: four times of five it is value / (1 + spread) to value * (1 + spread)", 0.0, 100.0)


def read_cluster(path: Path) -> Cluster:
    """Return what a TOML file describes.

    Raises:
        ValueError: it is no TOML, lacks a key, has one that nobody knows, or a number that can't be. The message names
            file, line and key. OSError: it can't be read.
    """
    content = read_bytes(path, MAX_TOML_BYTES, "give the TOML file of a cluster")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    return parse_cluster(text, str(path))


def parse_cluster(text: str, path: str) -> Cluster:
    """Return what a TOML text describes; `path` stands in messages. Raises ValueError as read_cluster does."""
    check_depth_of_names(text, path)
    try:
        found = tomllib.loads(text)
    except RecursionError:
        raise nests_too_deep(path) from None
    except ValueError as error:  # that it is no TOML, or an integer of thousands of digits
        raise ValueError(f"{path}: {error}") from error
    return Cluster(**_Reader(path, text).settings(Cluster, found, ""))


class _Reader:
    """Turns tables of TOML into settings, and says where in the file something is wrong."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.lines = text.splitlines()

    def settings(self, kind: type, found: Json, prefix: str) -> Json:
        about, types = settings_of(kind), get_type_hints(kind)
        for name in found:
            if name not in about:
                raise self.error(f"{prefix}{name}", f"is not a key of a cluster; here there are {', '.join(about)}")
        optional = {one.name for one in dataclasses.fields(kind) if one.default is not dataclasses.MISSING}
        values = {}
        for name, of in about.items():
            if name in found:
                values[name] = self.value(types[name], found[name], f"{prefix}{name}", of)
            elif name not in optional:
                raise self.error(prefix.rstrip("."), f"lacks {prefix + name!r}: {of.what}")
        return values

    def value(self, kind: type, found: object, key: str, of: Of) -> object:
        if kind is Estimate:
            return self.estimate(found, key, of)
        if dataclasses.is_dataclass(kind):
            if not isinstance(found, dict):
                raise self.error(key, f"must be a table, got {found!r}")
            return kind(**self.settings(kind, found, f"{key}."))
        if kind in (str, bool):
            if not isinstance(found, kind) or found == "" or (isinstance(found, str) and not found.isprintable()):
                raise self.error(
                    key, f"must be {'a text that can be printed' if kind is str else 'true or false'}, got {found!r}"
                )
            return found
        if key.endswith(".curve"):
            return self.curve(found, key)
        if key.endswith(".tflops"):
            if not isinstance(found, dict) or "bf16" not in found or not set(found) <= set(PRODUCTS):
                raise self.error(key, f"must give numbers for bf16 and any of {', '.join(PRODUCTS)}, got {found!r}")
            return {dtype: self.number(peak, f"{key}.{dtype}", of) for dtype, peak in found.items()}
        if kind is int and not is_integer(found):
            raise self.error(key, f"must be a whole number ({of.what}), got {found!r}")
        number = self.number(found, key, of)
        return int(number) if kind is int else number

    def estimate(self, found: object, key: str, of: Of) -> Estimate:
        keys = set(found) - {"spread"} if isinstance(found, dict) else set()
        if not isinstance(found, dict) or keys != {"value", "source"} or found["source"] not in SOURCES:
            sources = " | ".join(map(repr, SOURCES))
            raise self.error(
                key, f"must be {{ value = ..., source = {sources} }}, spread = ... if need be, got {found!r}"
            )
        spread = self.number(found["spread"], key, SPREAD) if "spread" in found else None
        return Estimate(self.number(found["value"], key, of), found["source"], spread)

    def number(self, found: object, key: str, of: Of) -> float:
        if not is_number(found) or not of.least <= found <= of.most:  # type: ignore[operator]
            raise self.error(key, f"must be a number of {of.least:g} to {of.most:g} ({of.what}), got {found!r}")
        return float(found)  # type: ignore[arg-type]

    def curve(self, found: object, key: str) -> tuple[tuple[float, float], ...]:
        is_list = isinstance(found, list) and len(found) != 1
        if not is_list or not all(
            isinstance(point, list) and len(point) == 2 and all(is_number(of) and of > 0 for of in point)
            for point in found  # type: ignore[attr-defined]
        ):
            raise self.error(key, f"must be a list of at least two [bytes, us], got {found!r}")
        points = tuple((float(num_bytes), float(us)) for num_bytes, us in found)  # type: ignore[attr-defined]
        if any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(points)):
            raise self.error(key, f"must ascend in bytes, and more bytes can't take less time, got {found!r}")
        return points

    def error(self, key: str, message: str) -> ValueError:
        line = self.line_of(key)
        message = message if len(message) < MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."
        return ValueError(f"{self.path}{f', line {line}' if line else ''}: {key[:99] or 'the file'} {message}")

    def line_of(self, key: str) -> int | None:
        """Return the number of the line on which a key, or the table that it would stand in, is set."""
        *tables, name = key.split(".")
        here: list[str] = []
        table_line = None
        for number, line in enumerate(self.lines, 1):
            if header := re.match(r"\s*\[([^\[\]]+)\]", line):
                here = [part.strip().strip("\"'") for part in header[1].split(".")]
                if here == key.split("."):
                    table_line = number
            elif setting := re.match(r"\s*([\w.\"'-]+)\s*=", line):
                own = [*here, *(part.strip("\"'") for part in setting[1].split("."))]
                if own == [*tables, name] or (len(own) < len(tables) + 1 and own == [*tables, name][: len(own)]):
                    return number
        return table_line


def to_toml(cluster: Cluster, remarks: Mapping[str, str] | None = None) -> str:
    """Return a commented TOML file that read_cluster reads.

    remarks: key, such as "gpu.tflops" -> what else its comment says.
    """
    measured = ", ".join(f"{source} {spread:g}" for source, spread in SPREADS.items())
    lines = [
        "# A cluster, for `tritonmoe plan`. Facts stand as they are; an estimate says where it comes from, which sets",
        "# its spread: four times of five it is value / (1 + spread) to value * (1 + spread). Spreads are",
        f"# {measured}; of what is assumed they stand beside each. spread = ... sets another one.",
        "# `tritonmoe probe` writes such a file with what it measures. GB are 1e9 bytes, GiB 2**30.",
    ]
    _write(cluster, "", remarks or {}, lines)
    return "\n".join(lines) + "\n"


def _write(settings: object, prefix: str, remarks: Mapping[str, str], lines: list[str]) -> None:
    tables = []
    for name, of in settings_of(type(settings)).items():  # type: ignore[arg-type]
        value, key = getattr(settings, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, Estimate):
            tables.append((of, key, value))
            continue
        remark = f" ({remarks[key]})" if key in remarks else ""
        if isinstance(value, Estimate) and value.source == "assumed" and value.spread is None:
            remark += f" (spread {of.assumed:g})"
        lines.append(f"# {of.what}{remark}")
        lines.append("# curve = [[1000000, 50.0], [100000000, 400.0]]" if value == () else f"{name} = {_toml(value)}")
    for of, key, value in tables:
        lines += ["", f"# {of.what}", f"[{key}]"]
        _write(value, f"{key}.", remarks, lines)


def _toml(value: object) -> str:
    if isinstance(value, Estimate):
        spread = "" if value.spread is None else f", spread = {value.spread:.3g}"
        return f'{{ value = {_toml(value.value)}, source = "{value.source}"{spread} }}'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{value:.6g}" if isinstance(value, float) else str(value)
