"""Cluster: the machines that a plan is for, read from TOML, every estimate with where it comes from."""

import dataclasses
import math
import random
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

from tritonmoe.config.layer import is_integer, is_number
from tritonmoe.runtime.files import Json, check_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "INTERVALS",
    "BetweenLink",
    "Cluster",
    "Estimate",
    "Gpu",
    "Host",
    "InsideLink",
    "Link",
    "parse_cluster",
    "read_cluster",
    "to_toml",
]

INTERVALS = {"assumed": 0.25, "probe": 0.08, "measured": 0.03}
"""Source of an estimate -> half of its 80 % interval, relative to its value: the one place that says so.

Assumed: from a data sheet or like machines. Probe: by `tritonmoe probe` on such a machine, for seconds. Measured: in
long runs of the job."""
NORMAL_90 = 1.2816
"""The 90 % quantile of the normal distribution: an 80 % interval ends there on both sides."""
MAX_TOML_BYTES = 1 << 20
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}


@dataclass(frozen=True)
class Estimate:
    """A number that nobody knows exactly, and where it comes from."""

    value: float
    source: str
    """assumed, probe or measured: a key of INTERVALS."""

    @property
    def sigma(self) -> float:
        """The standard deviation of the logarithm of what the number may really be."""
        return math.log1p(INTERVALS[self.source]) / NORMAL_90


class Of(NamedTuple):
    """What a setting is, and between which bounds it must lie where it is a number."""

    what: str
    least: float = 0.0
    most: float = 0.0


@dataclass(frozen=True)
class Gpu:
    """One GPU: its peaks are facts, what is reached of them are estimates."""

    memory_gb: Annotated[float, Of("memory, 1e9 bytes", 0.1, 1e5)]
    memory_tb_per_s: Annotated[float, Of("peak rate of that memory, 1e12 bytes a second", 1e-3, 1e4)]
    tflops: Annotated[
        Mapping[str, float], Of("peak of dense products, 1e12 FLOP/s by dtype; bf16 is needed", 1e-3, 1e6)
    ]
    gemm_efficiency: Annotated[Estimate, Of("share of the peak that large dense products reach", 1e-3, 1.0)]
    grouped_efficiency: Annotated[Estimate, Of("the same for the experts' grouped products", 1e-3, 1.0)]
    attention_efficiency: Annotated[
        Estimate, Of("the same for causal attention forward; its masked half doesn't count", 1e-3, 1.0)
    ]
    memory_efficiency: Annotated[Estimate, Of("share of memory_tb_per_s that copies and norms reach", 1e-3, 1.0)]
    contention: Annotated[Estimate, Of("share of its speed that compute loses beside an exchange", 0.0, 0.9)]


@dataclass(frozen=True, kw_only=True)
class Link:
    """The link of one GPU, in each direction."""

    gb_per_s: Annotated[float, Of("rate of one GPU in each direction, 1e9 bytes a second", 1e-4, 1e5)]
    efficiency: Annotated[Estimate, Of("share of it that an exchange of many bytes reaches", 1e-3, 1.0)]
    latency_us: Annotated[Estimate, Of("what an exchange takes however few the bytes, without its peers", 0.0, 1e6)]
    us_per_peer: Annotated[Estimate, Of("what each further peer of the exchange adds", 0.0, 1e4)]
    alone_share: Annotated[float, Of("share of the rate that one exchange alone reaches (gloo: half)", 0.01, 1.0)] = 1.0
    is_shared: Annotated[bool, Of("whether exchanges under way share the link (MPI) or take turns (NCCL)")] = False
    curve: Annotated[
        tuple[tuple[float, float], ...],
        Of("instead of rate and latency: measured [bytes that a GPU sends to others, us], ascending"),
    ] = ()

    @property
    def bytes_per_s(self) -> float:
        return self.gb_per_s * 1e9 * self.efficiency.value

    def line(self, num_bytes: float) -> tuple[float, float]:
        """Give (fixed seconds, seconds per byte) near so many bytes: of the curve's piece there, where there is one.

        A curve is taken as it was measured at an efficiency of 1.
        """
        if not self.curve:
            return self.latency_us.value * 1e-6, 1 / self.bytes_per_s
        pieces = list(pairwise(self.curve))
        (x0, y0), (x1, y1) = next((piece for piece in pieces if num_bytes <= piece[1][0]), pieces[-1])
        slope = (y1 - y0) / (x1 - x0) * 1e-6
        return max(0.0, y0 * 1e-6 - slope * x0), slope / self.efficiency.value


@dataclass(frozen=True, kw_only=True)
class InsideLink(Link):
    """The link of one GPU to the others of its node."""


@dataclass(frozen=True, kw_only=True)
class BetweenLink(Link):
    """The link of one GPU to other nodes."""

    decay: Annotated[Estimate, Of("exponent g: n nodes reach (n / 2) ** -g of the rate that two reach", 0.0, 2.0)]


@dataclass(frozen=True)
class Host:
    """What the processor of the host costs."""

    us_per_layer: Annotated[
        Estimate, Of("to launch one layer's forward and backward; the GPU can't be faster", 0.0, 1e7)
    ]
    us_per_chunk: Annotated[Estimate, Of("what one more chunk adds to a pass: launches, ends of kernels", 0.0, 1e6)]
    ms_per_step: Annotated[Estimate, Of("once a step: data, logging, what no part below names", 0.0, 1e6)]


@dataclass(frozen=True)
class Cluster:
    """A number of equal nodes of equal GPUs."""

    name: Annotated[str, Of("what tables call it")]
    nodes: Annotated[int, Of("number of nodes", 1, 1e6)]
    gpus_per_node: Annotated[int, Of("GPUs of one node", 1, 4096)]
    usd_per_gpu_hour: Annotated[float, Of("price of one GPU for one hour, in any currency", 0.0, 1e6)]
    row_header_bytes: Annotated[int, Of("bytes that travel with each row beside its elements: 32 in DeepEP", 0, 1e6)]
    gpu: Annotated[Gpu, Of("one GPU")]
    inside: Annotated[InsideLink, Of("the link of one GPU to those of its node")]
    between: Annotated[BetweenLink, Of("the link of one GPU to other nodes")]
    host: Annotated[Host, Of("the host's processor")]

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def with_nodes(self, nodes: int) -> "Cluster":
        """Give the cluster with another number of nodes."""
        return replace(self, nodes=nodes)

    def estimates(self) -> Iterator[tuple[str, Estimate]]:
        """Give every estimate with its key, such as "gpu.gemm_efficiency"."""
        for part in PARTS:
            for name, value in vars(getattr(self, part)).items():
                if isinstance(value, Estimate):
                    yield f"{part}.{name}", value

    def scaled(self, factors: Mapping[str, float]) -> "Cluster":
        """Give the cluster whose estimates are so many times as large, each within what it can be at all."""
        parts = {}
        for part in PARTS:
            settings = getattr(self, part)
            changed = {}
            for name, about in _settings(type(settings)).items():  # type: ignore[arg-type]
                if (factor := factors.get(f"{part}.{name}")) is not None:
                    estimate: Estimate = getattr(settings, name)
                    changed[name] = replace(estimate, value=min(about.most, estimate.value * factor))
            parts[part] = replace(settings, **changed)
        return replace(self, **parts)

    def drawn(self, generator: random.Random) -> "Cluster":
        """Give a cluster as this one may really be: every estimate drawn from its own interval, log-normally."""
        return self.scaled({key: math.exp(generator.gauss(0.0, one.sigma)) for key, one in self.estimates()})


PARTS = ("gpu", "inside", "between", "host")
"""The tables of a cluster."""


@cache
def _settings(kind: Any) -> dict[str, Of]:
    """Give what every setting of a table is."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(kind, include_extras=True).items()}


def read_cluster(path: Path) -> Cluster:
    """Give what a TOML file describes.

    Raises:
        ValueError: it is no TOML, lacks a key, has one that nobody knows, or a number that can't be. The message names
            file, line and key. OSError: it can't be read.
    """
    check_regular(path)
    if path.stat().st_size > MAX_TOML_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: a cluster's description needs a few thousand")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    return parse_cluster(text, str(path))


def parse_cluster(text: str, path: str) -> Cluster:
    """Give what a TOML text describes; `path` stands in messages. Raises ValueError as read_cluster does."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    return _Reader(path, text).settings(Cluster, found, "")


class _Reader:
    """Turns tables of TOML into settings, and says where in the file something is wrong."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.lines = text.splitlines()

    def settings(self, kind: type, found: Json, prefix: str) -> Any:
        about, types = _settings(kind), get_type_hints(kind)
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
        return kind(**values)

    def value(self, kind: Any, found: object, key: str, of: Of) -> Any:
        if kind is Estimate:
            return self.estimate(found, key, of)
        if dataclasses.is_dataclass(kind):
            if not isinstance(found, dict):
                raise self.error(key, f"must be a table, got {found!r}")
            return self.settings(kind, found, f"{key}.")  # type: ignore[arg-type]
        if kind in (str, bool):
            if not isinstance(found, kind) or found == "":
                raise self.error(key, f"must be {'a text' if kind is str else 'true or false'}, got {found!r}")
            return found
        if key.endswith(".curve"):
            return self.curve(found, key)
        if key.endswith(".tflops"):
            if not isinstance(found, dict) or "bf16" not in found or not set(found) <= set(DTYPE_BYTES):
                raise self.error(key, f"must give numbers for bf16 and any of {', '.join(DTYPE_BYTES)}, got {found!r}")
            return {dtype: self.number(peak, f"{key}.{dtype}", of) for dtype, peak in found.items()}
        if kind is int and not is_integer(found):
            raise self.error(key, f"must be a whole number ({of.what}), got {found!r}")
        number = self.number(found, key, of)
        return int(number) if kind is int else number

    def estimate(self, found: object, key: str, of: Of) -> Estimate:
        if not isinstance(found, dict) or set(found) != {"value", "source"} or found["source"] not in INTERVALS:
            sources = " | ".join(map(repr, INTERVALS))
            raise self.error(key, f"must be {{ value = ..., source = {sources} }}, got {found!r}")
        return Estimate(self.number(found["value"], key, of), found["source"])

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
        return ValueError(f"{self.path}{f', line {line}' if line else ''}: {key or 'the file'} {message}")

    def line_of(self, key: str) -> int | None:
        """Give the number of the line on which a key, or the table that it would stand in, is set."""
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
    """Give a commented TOML file that read_cluster reads.

    remarks: key, such as "gpu.tflops" -> what else its comment says.
    """
    widths = ", ".join(f"{source} +-{width:.0%}" for source, width in INTERVALS.items())
    lines = [
        "# A cluster, for `tritonmoe plan`. Facts stand as they are; an estimate says where it comes from, which sets",
        f"# the interval that holds it four times of five: {widths}.",
        "# `tritonmoe probe` writes such a file with what it measures. GB are 1e9 bytes.",
    ]
    _write(cluster, "", remarks or {}, lines)
    return "\n".join(lines) + "\n"


def _write(settings: Any, prefix: str, remarks: Mapping[str, str], lines: list[str]) -> None:
    tables = []
    for name, of in _settings(type(settings)).items():  # type: ignore[arg-type]
        value, key = getattr(settings, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, Estimate):
            tables.append((of, key, value))
            continue
        remark = f" ({remarks[key]})" if key in remarks else ""
        lines.append(f"# {of.what}{remark}")
        lines.append("# curve = [[1000000, 50.0], [100000000, 400.0]]" if value == () else f"{name} = {_toml(value)}")
    for of, key, value in tables:
        lines += ["", f"# {of.what}", f"[{key}]"]
        _write(value, f"{key}.", remarks, lines)


def _toml(value: object) -> str:
    if isinstance(value, Estimate):
        return f'{{ value = {_toml(value.value)}, source = "{value.source}" }}'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{value:.6g}" if isinstance(value, float) else str(value)
