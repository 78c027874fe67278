"""Cluster: the machines that a plan is for, every estimate with where it comes from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Annotated, NamedTuple, get_type_hints

from tritonmoe.config.precision import BLOCKS

__all__ = [
    "DTYPE_BYTES",
    "NORMAL_90",
    "PRODUCTS",
    "SOURCES",
    "SPREADS",
    "BetweenLink",
    "Cluster",
    "Estimate",
    "Gpu",
    "Host",
    "Link",
    "Of",
    "settings_of",
    "spread_of",
]

SPREADS = {"probe": 0.08, "measured": 0.03}
"""Source of a number that was measured -> its spread s: an 80 % interval is value / (1 + s) to value * (1 + s).

Probe: by `tritonmoe probe` on such a machine, for seconds. Measured: in long runs of the job. What is assumed, from a
data sheet or like machines, has a spread of its own for each setting (Of.assumed)."""
SOURCES = ("assumed", *SPREADS)
NORMAL_90 = 1.2816
"""The 90 % quantile of the normal distribution: an 80 % interval ends there on both sides."""
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 2}
"""Dtype of products -> bytes of an element of the rows and weights beside them; those of fp8 products are bf16."""
PRODUCTS = (*DTYPE_BYTES, *BLOCKS)
"""What a GPU may have a rate of products for: dtypes, and formats of an ExpertPrecision."""


@dataclass(frozen=True)
class Estimate:
    """A number that nobody knows exactly, and where it comes from."""

    value: float
    source: str
    """assumed, probe or measured: one of SOURCES."""
    spread: float | None = None
    """Of this number alone, such as of a probe whose samples scattered; None: that of its source."""


class Of(NamedTuple):
    """What a setting is, and between which bounds it must lie where it is a number."""

    what: str
    least: float = 0.0
    most: float = 0.0
    assumed: float = 0.25
    """The spread of an estimate that is only assumed."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: its peaks are facts, what is reached of them are estimates."""

    memory_gib: Annotated[float, Of("memory, 2**30 bytes, the GB of data sheets", 0.1, 1e5)]
    memory_tb_per_s: Annotated[float, Of("peak rate of that memory, 1e12 bytes a second", 1e-3, 1e4)]
    tflops: Annotated[
        Mapping[str, float],
        Of("peak of dense products, 1e12 FLOP/s by dtype and format of an ExpertPrecision; bf16 is needed", 1e-3, 1e6),
    ]
    gemm_efficiency: Annotated[Estimate, Of("share of the peak that large dense products reach", 1e-3, 1.0, 0.2)]
    grouped_efficiency: Annotated[Estimate, Of("the same for the experts' grouped products", 1e-3, 1.0, 0.5)]
    attention_efficiency: Annotated[
        Estimate, Of("the same for causal attention forward; its masked half doesn't count", 1e-3, 1.0, 0.4)
    ]
    memory_efficiency: Annotated[Estimate, Of("share of memory_tb_per_s that copies and norms reach", 1e-3, 1.0, 0.3)]
    contention: Annotated[Estimate, Of("share of its speed that compute loses beside an exchange", 0.0, 0.9, 1.0)]


@dataclass(frozen=True, kw_only=True)
class Link:
    """The link of one GPU, in each direction."""

    gb_per_s: Annotated[float, Of("rate of one GPU in each direction, 1e9 bytes a second", 1e-4, 1e5)]
    efficiency: Annotated[Estimate, Of("share of it that an exchange of many bytes reaches", 1e-3, 1.0, 0.5)]
    latency_us: Annotated[
        Estimate, Of("what an exchange takes however few the bytes, without its peers", 0.0, 1e6, 1.0)
    ]
    us_per_peer: Annotated[Estimate, Of("what each further peer of the exchange adds", 0.0, 1e4, 1.0)]
    alone_share: Annotated[float, Of("share of the rate that one exchange alone reaches (gloo: half)", 0.01, 1.0)] = 1.0
    is_shared: Annotated[bool, Of("whether exchanges under way share the link (MPI) or take turns (NCCL)")] = False
    curve: Annotated[
        tuple[tuple[float, float], ...],
        Of("instead of rate and latency, with an efficiency of 1: measured [bytes that a GPU sends, us], ascending"),
    ] = ()

    @property
    def bytes_per_s(self) -> float:
        return self.gb_per_s * 1e9 * self.efficiency.value

    def line(self, num_bytes: float) -> tuple[float, float]:
        """Return (fixed seconds, seconds per byte) near so many bytes: of the curve's piece there, where there is one.

        A curve is taken as it was measured at an efficiency of 1.
        """
        if not self.curve:
            return self.latency_us.value * 1e-6, 1 / self.bytes_per_s
        pieces = list(pairwise(self.curve))
        (x0, y0), (x1, y1) = next((piece for piece in pieces if num_bytes <= piece[1][0]), pieces[-1])
        slope = (y1 - y0) / (x1 - x0) * 1e-6
        return max(0.0, y0 * 1e-6 - slope * x0), slope / self.efficiency.value


@dataclass(frozen=True, kw_only=True)
class BetweenLink(Link):
    """The link of one GPU to other nodes."""

    efficiency: Annotated[
        Estimate,
        Of("share of it that an exchange of many bytes reaches; NCCL over TCP may reach a 25th", 1e-3, 1.0, 1.0),
    ]
    decay: Annotated[Estimate, Of("exponent g: n nodes reach (n / 2) ** -g of the rate that two reach", 0.0, 2.0, 1.5)]


@dataclass(frozen=True)
class Host:
    """What the processor of the host costs."""

    us_per_layer: Annotated[
        Estimate, Of("what it adds to a layer's forward and backward: launches, waits for counts", 0.0, 1e7, 1.5)
    ]
    us_per_chunk: Annotated[
        Estimate, Of("what one more chunk adds to a pass: launches, ends of kernels", 0.0, 1e6, 1.0)
    ]
    ms_per_step: Annotated[Estimate, Of("once a step: data, logging, what no part below names", 0.0, 1e6, 2.0)]


@dataclass(frozen=True)
class Cluster:
    """A number of equal nodes of equal GPUs."""

    name: Annotated[str, Of("what tables call it")]
    nodes: Annotated[int, Of("number of nodes", 1, 1e6)]
    gpus_per_node: Annotated[int, Of("GPUs of one node", 1, 4096)]
    usd_per_gpu_hour: Annotated[float, Of("price of one GPU for one hour, in US dollars", 0.0, 1e6)]
    row_header_bytes: Annotated[int, Of("bytes that travel with each row beside its elements: 32 in DeepEP", 0, 1e6)]
    gpu: Annotated[Gpu, Of("one GPU")]
    inside: Annotated[Link, Of("the link of one GPU to those of its node")]
    between: Annotated[BetweenLink, Of("the link of one GPU to other nodes")]
    host: Annotated[Host, Of("the host's processor")]

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def with_nodes(self, nodes: int) -> "Cluster":
        """Return the cluster with another number of nodes."""
        return replace(self, nodes=nodes)

    def estimates(self) -> Iterator[tuple[str, Estimate]]:
        """Return every estimate with its key, such as "gpu.gemm_efficiency"."""
        for part in PARTS:
            for name, value in vars(getattr(self, part)).items():
                if isinstance(value, Estimate):
                    yield f"{part}.{name}", value

    def scaled(self, factors: Mapping[str, float]) -> "Cluster":
        """Return the cluster whose estimates are so many times as large, each within what it can be at all."""
        parts = {}
        for part in PARTS:
            settings = getattr(self, part)
            changed = {}
            for name, about in settings_of(type(settings)).items():  # type: ignore[arg-type]
                if (factor := factors.get(f"{part}.{name}")) is not None:
                    estimate: Estimate = getattr(settings, name)
                    changed[name] = replace(estimate, value=min(about.most, estimate.value * factor))
            parts[part] = replace(settings, **changed)
        return replace(self, **parts)


PARTS = {"gpu": Gpu, "inside": Link, "between": BetweenLink, "host": Host}
"""The tables of a cluster."""


def spread_of(key: str, estimate: Estimate) -> float:
    """Return the spread of the estimate with this key, such as "gpu.gemm_efficiency"."""
    if estimate.spread is not None:
        return estimate.spread
    part, name = key.split(".")
    return SPREADS.get(estimate.source, settings_of(PARTS[part])[name].assumed)


@cache
def settings_of(kind: type) -> dict[str, Of]:
    """Return what every setting of a table is."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(kind, include_extras=True).items()}
