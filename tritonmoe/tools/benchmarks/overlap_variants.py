"""The ways in which the overlap benchmark runs a layer call: compute alone, communication alone, serial, overlapped."""

import statistics
from dataclasses import dataclass, replace
from typing import Literal

from tritonmoe.config.overlap import OverlapConfig, ramp_sizes
from tritonmoe.tools.benchmarks.timing import Samples

__all__ = ["Variant", "best", "overlapped_variants", "variants_of"]

GROWTHS = (2, 4)
"""The growths of the ramps in a sweep."""


@dataclass(frozen=True)
class Variant:
    """One way to run the layer call."""

    kind: str
    """"compute": one chunk, rows there at once. "free transport": the overlapped schedule with rows there at once.
    "communication": the overlapped schedule with experts that compute nothing. "serial", "overlapped", "auto".
    "two levels": overlapped, each token once to every other node; "auto on two levels"."""
    num_chunks: int | None = None
    """The number of chunks; None leaves it to the layer."""
    growth: int = 1
    """How many times the one before a chunk is, as in ramp_sizes()."""
    chunk_by: Literal["tokens", "experts"] = "tokens"

    def __str__(self) -> str:
        words = self.kind if self.num_chunks is None or self.kind == "compute" else f"{self.kind} C={self.num_chunks}"
        words = f"{words} ramp x{self.growth}" if self.growth > 1 else words
        return words if self.chunk_by == "tokens" else f"{words} of {self.chunk_by}"

    @property
    def series(self) -> str:
        """What a sweep over chunk counts calls it."""
        return str(replace(self, num_chunks=None))

    def config(self) -> OverlapConfig:
        if self.num_chunks is None:
            return OverlapConfig()
        is_serial = self.kind in ("serial", "compute")
        sizes = ramp_sizes(self.num_chunks, self.growth)
        return OverlapConfig(serial=is_serial, shape=sizes, chunk_by=self.chunk_by)


def variants_of(chunks: list[int], num_local_experts: int, two_levels: bool = False) -> list[Variant]:
    """Return everything that is measured for these chunk counts."""
    variants = [Variant("compute", 1), Variant("auto")]
    if two_levels:
        variants.append(Variant("auto on two levels"))
    for num_chunks in chunks:
        variants += [Variant(kind, num_chunks) for kind in ("communication", "serial")]
        if two_levels:
            variants.append(Variant("two levels", num_chunks))
    return variants + overlapped_variants(chunks, num_local_experts)


def overlapped_variants(chunks: list[int], num_local_experts: int) -> list[Variant]:
    """Return every overlapped plan of these chunk counts, and the free transport that tells what its steps cost."""
    variants = []
    for num_chunks in chunks:
        variants += [Variant("overlapped", num_chunks), Variant("free transport", num_chunks)]
        if num_chunks > 2:
            variants += [Variant("overlapped", num_chunks, growth) for growth in GROWTHS]
    of_experts = [num_chunks for num_chunks in chunks if 1 < num_chunks <= num_local_experts]
    variants += [Variant("overlapped", num_chunks, chunk_by="experts") for num_chunks in of_experts]
    if of_experts:
        variants += [Variant("free transport", n, chunk_by="experts") for n in (1, max(of_experts))]
    return variants


def best(seconds: Samples, kind: str) -> str:
    """Return the name of the variant of this kind with the smallest median."""
    return min((name for name in seconds if name.startswith(kind)), key=lambda name: statistics.median(seconds[name]))
