"""What one rank does in the expert_parallel benchmark: a training step of every variant once a round, together."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.model_halves import two_batches
from tritonmoe.overlap.tuning.tuner import SETTLING_CALLS
from tritonmoe.tools.benchmarks.namespaces import ask, interface_bytes
from tritonmoe.tools.benchmarks.ranks import slowest
from tritonmoe.tools.benchmarks.timing import Samples, synchronize
from tritonmoe.transports import Transport

__all__ = ["OURS", "PEERS", "RankSteps", "measure_steps", "num_settling_steps"]

FAST_LINK = 40e9
"""Bits per second of a link that takes next to no time, to see what a step takes besides."""


@dataclass(frozen=True)
class Variant:
    """An exchange (ep_implementation) and the experts between (experts_implementation)."""

    exchange: str
    experts: str
    is_halved: bool = False
    """Whether two halves of the batch run at once (two_batches)."""

    def __str__(self) -> str:
        return f"{self.exchange}, {self.experts}" + (", two batches" if self.is_halved else "")


Models: TypeAlias = dict[str, Any]
"""A language model of transformers by the exchange that it uses, all with the same weights."""
Step: TypeAlias = Callable[[Variant], Tensor]
"""Runs a training step of a variant and gives its loss."""

OURS = Variant("tritonmoe", "tritonmoe")
PEERS = (Variant("all_to_all", "grouped_mm"), Variant("all_to_all", "eager"))
MIXED = Variant("all_to_all", "tritonmoe")
"""Our experts without our exchange: what is not gained by overlap."""
HALVED = Variant("tritonmoe", "tritonmoe", is_halved=True)
"""Of batches of more than one sequence."""


@dataclass
class RankSteps:
    """What every rank knows after the rounds; times are the slowest rank's."""

    seconds: Samples
    seconds_on_fast_link: Samples
    """Empty where the link's rate can't be changed."""
    sent_mb: dict[str, float]
    """Megabytes (1e6 bytes) that this rank sends in a step, by variant; empty outside of network namespaces."""
    loss_difference: float
    """The largest relative difference of any variant's loss from that of all_to_all, on this rank."""
    gradient_difference: float
    """The same of its gradients: over all parameters, the norm of the difference over the norm."""


def measure_steps(transport: Transport, models: Models, ids: Tensor, rounds: int, rate: float | None) -> RankSteps:
    """Measure forward and backward of this rank's batch `ids`, in interleaved rounds; every rank makes the same call.

    Args:
        models: by exchange, with the same weights. rate: bits per second of the link; None: it is as it is.
    """
    variants = [OURS, *([HALVED] if ids.shape[0] > 1 else []), *PEERS, MIXED]

    def step(variant: Variant) -> Tensor:
        model = models[variant.exchange]
        model.set_experts_implementation(variant.experts)
        halved = two_batches(model) if variant.is_halved else None
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if halved is not None:
            halved.remove()
        return loss.detach()

    def timed(variant: Variant) -> float:
        for model in models.values():
            model.zero_grad(set_to_none=True)
        synchronize()
        transport.barrier()
        started = time.perf_counter()
        step(variant)
        synchronize()
        return time.perf_counter() - started

    loss_difference, gradient_difference = _differences(models, variants, step)
    for _ in range(num_settling_steps(len(experts_modules(models[OURS.exchange])))):
        step(OURS)
    rates = [None] if rate is None else [rate, FAST_LINK]
    samples: list[Samples] = [{str(variant): [] for variant in variants} for _ in rates]
    sent: dict[str, float] = {}
    shuffle = random.Random(0).shuffle  # the same order on every rank
    for _ in range(rounds):
        for bits, seconds in zip(rates, samples, strict=True):
            if bits is not None:
                if transport.rank == 0:
                    ask(f"rate {bits}")
                transport.barrier()
            shuffle(variants)
            for variant in variants:
                before = 0 if rate is None else interface_bytes()[1]
                seconds[str(variant)].append(timed(variant))
                if rate is not None:
                    sent[str(variant)] = (interface_bytes()[1] - before) / 1e6
    slowest_samples = [{name: slowest(transport, values) for name, values in one.items()} for one in samples]
    return RankSteps(
        slowest_samples[0],
        slowest_samples[1] if rate is not None else {},
        sent,
        loss_difference,
        gradient_difference,
    )


def num_settling_steps(num_layers: int) -> int:
    """Return the steps until "auto" has chosen its chunks: it takes some calls, and a step makes one for each layer."""
    return -(-SETTLING_CALLS // num_layers) + 1


def _differences(models: Models, variants: list[Variant], step: Step) -> tuple[float, float]:
    """Return the largest relative differences of losses and of gradients from the first peer's."""
    expected_loss, expected = _loss_and_gradients(models, PEERS[0], step)
    losses, gradients = [], []
    for variant in variants:
        loss, actual = _loss_and_gradients(models, variant, step)
        losses.append(abs(loss - expected_loss) / abs(expected_loss))
        square = sum(float((actual[name] - expected[name]).square().sum()) for name in expected)
        gradients.append((square / sum(float(grad.square().sum()) for grad in expected.values())) ** 0.5)
    return max(losses), max(gradients)


def _loss_and_gradients(models: Models, variant: Variant, step: Step) -> tuple[float, dict[str, Tensor]]:
    model = models[variant.exchange]
    model.zero_grad(set_to_none=True)
    loss = float(step(variant))
    gradients = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        gradients[name] = (grad.to_local() if hasattr(grad, "to_local") else grad).float().clone()
    return loss, gradients
