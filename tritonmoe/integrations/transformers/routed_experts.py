"""Which modules of a model get routed tokens, which block routes them, and collect_statistics(), which counts them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.requirements import check_model, check_transformers
from tritonmoe.layer import MoELayer
from tritonmoe.placement.expert_shards import shards_of
from tritonmoe.routing import RoutingStatistics, routing_statistics
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.other_ranks import in_dummy_forward
from tritonmoe.runtime.wrappers import COPIES, INSIDE
from tritonmoe.transports import Transport

__all__ = [
    "COMPILED",
    "ModelStatistics",
    "RoutedExperts",
    "ScalarWriter",
    "collect_statistics",
    "refuse_compiler",
    "routed_experts",
    "routed_ids",
    "uncompiled_experts",
    "watched_routing",
]

COMPILED = (
    "compiled code doesn't call the hooks by which routing is recorded, replayed and counted: use the model without "
    "torch.compile meanwhile, and generate(..., disable_compile=True)"
)
WRAPPERS = {*INSIDE, "original_module", COPIES}
"""What wrappers call the module inside."""
PREFIXES = ("module.", "base_model.model.")
"""What DistributedDataParallel and PEFT put before the names of a whole model."""


@dataclass(frozen=True)
class RoutedExperts:
    """A module that gets rows, ids and weights."""

    experts: nn.Module
    block: nn.Module | None
    """The module around it whose forward runs the router, then the experts; None where there is none in the model."""
    layer: str
    """Its name without those that wrappers add: the same in a model, in DistributedDataParallel and under PEFT.

    A module and the copies that PEFT's modules_to_save made of it, of which one runs, share it.
    """
    num_experts: int
    """E, over all ranks."""
    transport: Transport | None
    """Over what its rows go; None where its experts are all here."""


def routed_experts(model: nn.Module) -> dict[str, RoutedExperts]:
    """Return the modules of a model that get routed tokens by name, in the model's order.

    Raises:
        ValueError: there are none, neither experts that go through transformers' registry, nor tritonmoe's own.
    """
    found: dict[str, RoutedExperts] = {}
    registered = experts_modules(model)
    for name, module in model.named_modules():
        if name in registered:
            num_experts, shards = registered[name].down_proj.shape[0], shards_of(module)
            transport = None if shards is None else shards.transport
            found[name] = RoutedExperts(module, _block(model, name), _layer(name), num_experts, transport)
        elif isinstance(module, MoELayer):
            own_name = f"{name}.experts" if name else "experts"
            num_experts, transport = module.config.num_experts, module.grouped_experts.transport
            found[own_name] = RoutedExperts(module.experts, module, _layer(own_name), num_experts, transport)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts that go through transformers' experts registry: `tritonmoe "
            "models` lists the families that have"
        )
    return found


def routed_ids(arguments: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the ids and weights (T, K) of a call of such a module."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    own = {**keywords, **dict(zip(names, arguments, strict=False))}
    return own["top_k_index"], own["top_k_weights"]


def uncompiled_experts(model: nn.Module) -> dict[str, RoutedExperts]:
    """Return routed_experts() of a model of transformers.

    Raises:
        ValueError: as routed_experts(); the model, or a module of it, is compiled.
        ImportError: transformers is missing or too old.
    """
    check_transformers()
    check_model(model)
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{name or 'the model'} ({type(module).__name__}) is compiled: {COMPILED}")
    return routed_experts(model)


def refuse_compiler() -> None:
    """Raise RuntimeError where torch.compile traces this code, or would trace what this code calls."""
    if torch.compiler.is_compiling() or eval_frame.get_eval_frame_callback() is not None:
        raise RuntimeError(COMPILED)


@contextmanager
def watched_routing(
    model: nn.Module, found: Mapping[str, RoutedExperts], see: Callable[[str, Tensor, Tensor, Tensor | None], None]
) -> Iterator[None]:
    """Call `see` with name, ids and weights in each call of experts of `model` while the context lasts.

    Its last argument is how many tokens had scores that are not finite; None of experts that aren't told.
    Recomputes are left out, and forwards by which a rank helps others to generate.

    Raises:
        RuntimeError: in a call that is being compiled. ValueError: at the end: nothing was seen.
    """
    was_seen = False

    def watch(name: str, module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        nonlocal was_seen
        if module is not found[name].experts or in_dummy_forward():  # a copy of the model has the hooks too
            return
        refuse_compiler()
        if not is_recomputing():
            was_seen = True
            see(name, *routed_ids(arguments, keywords), keywords.get("num_nonfinite_rows"))

    hooks = [
        routed.experts.register_forward_pre_hook(
            lambda module, arguments, keywords, name=name: watch(name, module, arguments, keywords), with_kwargs=True
        )
        for name, routed in found.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not was_seen:
        raise ValueError(f"no experts of {type(model).__name__} were called in this context; {COMPILED}")


def _block(model: nn.Module, name: str) -> nn.Module | None:
    parts = name.split(".")
    while _is_wrapper(parts, len(parts) - 1):
        parts.pop()
    return model.get_submodule(".".join(parts[:-1])) if parts != [""] else None


def _layer(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.removeprefix("module.").removeprefix("base_model.model.")
    parts = name.split(".")
    return ".".join(part for place, part in enumerate(parts) if not _is_wrapper(parts, place))


def _is_wrapper(parts: Sequence[str], place: int) -> bool:
    """Return whether a part of a module's name is what a wrapper calls what it wraps."""
    return parts[place] in WRAPPERS or (place > 0 and parts[place - 1] == COPIES)


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
        """Name of the experts module -> pairs of each expert; what report.png.write_load_png draws."""
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
