"""collect_statistics(): how evenly a model spreads its tokens over the experts of each layer, for every family."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from tritonmoe.integrations.transformers.routed_experts import uncompiled_experts, watched_routing
from tritonmoe.routing import RoutingStatistics, routing_statistics

__all__ = ["ModelStatistics", "ScalarWriter", "collect_statistics"]

NUMBERS = ("max_violation", "coefficient_of_variation", "normalized_entropy", "num_dead_experts")


class ScalarWriter(Protocol):
    """What a logger must have: TensorBoard's SummaryWriter does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Log one number."""


class ModelStatistics:
    """The pairs of every expert of every layer since collect_statistics() began, or since reset().

    Counting reads nothing on the host; the numbers are read when they are asked for. Skipped ids are counted apart.
    Tokens are those of this process: padding tokens, which transformers routes like any other, included.
    """

    def __init__(self, num_experts: dict[str, int]) -> None:
        self._num_experts = num_experts
        self._counts: dict[str, torch.Tensor] = {}

    @property
    def layers(self) -> dict[str, RoutingStatistics]:
        """Name of the experts module -> its statistics, in the model's order; no entry before its first call."""
        return {name: RoutingStatistics(self._counts[name]) for name in self._num_experts if name in self._counts}

    @property
    def loads(self) -> dict[str, list[int]]:
        """Name of the experts module -> pairs of each expert; what report.load.write_load_png draws."""
        return {name: statistics.host_counts[:-1] for name, statistics in self.layers.items()}

    def reset(self) -> None:
        """Start counting anew."""
        self._counts.clear()

    def log_to(self, writer: ScalarWriter, step: int) -> None:
        """Write MaxVio, coefficient of variation, entropy and dead experts of each layer, and their means."""
        layers = self.layers
        for number in NUMBERS:
            values = {name: float(getattr(statistics, number)) for name, statistics in layers.items()}
            for name, value in values.items():
                writer.add_scalar(f"routing/{name}/{number}", value, step)
            if values:
                writer.add_scalar(f"routing/mean/{number}", sum(values.values()) / len(values), step)

    def __str__(self) -> str:
        width = max([len(name) for name in self._num_experts], default=5)
        lines = [f"{'layer':{width}}  {'pairs':>9}  {'largest':>9}  {'MaxVio':>7}  {'entropy':>7}  {'dead':>5}"]
        for name, layer in self.layers.items():
            lines.append(
                f"{name:{width}}  {layer.num_routed_pairs:>9}  {max(layer.host_counts[:-1]):>9}  "
                f"{layer.max_violation:>7.3f}  {layer.normalized_entropy:>7.3f}  {layer.num_dead_experts:>5}"
            )
        return "\n".join(lines)

    def _add(self, name: str, topk_ids: torch.Tensor) -> None:
        counts = routing_statistics(topk_ids, self._num_experts[name]).counts
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts


@contextmanager
def collect_statistics(model: nn.Module) -> Iterator[ModelStatistics]:
    """Count, while the context lasts, where the tokens of a transformers model go, under any experts implementation.

    Models upcycled in place are counted too. A forward that activation checkpointing runs again counts once. Forwards
    through code that was compiled before the context began are not counted: beside others, which are, nothing says so.

    Raises:
        ValueError: the model has no experts that go through transformers' registry, nor tritonmoe's own, or is
            compiled; at the end: no layer was called. RuntimeError: in a forward that is being compiled.
        ImportError: transformers is missing or older than 5.7.
    Example:
        with collect_statistics(model) as statistics:
            trainer.train()
        print(statistics)
        statistics.log_to(SummaryWriter(), step=1000)
    """
    found = uncompiled_experts(model)
    statistics = ModelStatistics({name: routed.num_experts for name, routed in found.items()})

    def count(name: str, topk_ids: torch.Tensor, *_: torch.Tensor | None) -> None:
        with torch.no_grad():
            statistics._add(name, topk_ids)

    with watched_routing(model, found, count):
        yield statistics
