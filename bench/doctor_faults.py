"""Training jobs of bench.doctor, and what is wrong with them."""

import functools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.faults import Fault

__all__ = [
    "ANYWHERE",
    "FACTORS",
    "FREQUENCY",
    "MEASURED",
    "OF_NOBODY",
    "STEADY",
    "Job",
    "JobFault",
    "Layer",
    "drift_of",
    "read_job",
    "variants_of",
    "without",
]

MEASURED = "measured.json"
"""The file beside a recording with its job, and the seconds of the steps of every variant."""
STEADY = 0.10
"""Where steps without faults take so much longer at one time than at another, something else ran on the machine: what
the faults cost isn't known well enough then."""
FACTORS = ("slow rank", "slow link", "slow port", "bandwidth")
"""What is so many times as slow as otherwise; the other kinds take seconds, or a share of the tokens."""
OF_NOBODY = ("bandwidth", "latency", "chunk overhead", "host overhead")
"""What all ranks have."""
FREQUENCY = {"always": 1.0, "growing": 0.5, "at random": 0.3, "rare": 0.1, "flapping": 0.35}
ANYWHERE = -1


@dataclass(frozen=True)
class JobFault(Fault):
    """A fault of a job: its layer may be ANYWHERE, another place in each step."""

    moves: bool = False
    """Whether it is on another rank in each step."""

    def level(self, step: int, job: "Job") -> float:
        """Return how much of it there is in a step, from 0 to 1."""
        return self.share(step, job.num_steps, lambda: step in _chosen(self.when, job.num_steps, job.seed))

    def amount_at(self, step: int, rank: int | None, job: "Job") -> float | None:
        """Return how bad it is on a rank in a step, None: not at all."""
        level = self.level(step, job)
        if not level or (rank is not None and rank not in self.culprits(step, job)):
            return None
        return 1 + (self.amount - 1) * level if self.kind in FACTORS else self.amount * level

    def culprits(self, step: int, job: "Job") -> Sequence[int]:
        if self.moves:
            return (random.Random(f"{job.seed} who {step}").randrange(job.size),)
        return self.ranks or range(job.size)

    def is_in(self, phase: str, layer: int | None, step: int, job: "Job") -> bool:
        """Return whether the fault is in a phase of a layer; "" and None: wherever it is."""
        of_phase, of_layer = self.phase, self.layer
        if of_layer == ANYWHERE:
            place = random.Random(f"{job.seed} where {step}")
            of_phase, of_layer = place.choice(("forward", "backward")), place.randrange(len(job.layers))
        return (not phase or of_phase in ("", phase)) and (layer is None or of_layer in (None, layer))


@functools.cache
def _chosen(when: str, num_steps: int, seed: int) -> frozenset[int]:
    """Return the steps in which a fault is there that comes now and then."""
    draw = random.Random(f"{seed} {when}")
    if when == "flapping":
        return frozenset(
            3 * start + step for start in draw.sample(range(num_steps // 3), 3) for step in range(draw.choice((2, 3)))
        )
    return frozenset(draw.sample(range(num_steps), max(2, round(FREQUENCY[when] * num_steps))))


@dataclass(frozen=True)
class Layer:
    """An expert-parallel layer, and what the model does before it."""

    tokens: int
    top_k: int
    num_chunks: int
    pair_s: float
    """What the experts take for a pair, in the forward; a backward takes twice as long."""
    before_s: float

    def compute_s(self) -> float:
        return self.pair_s * self.tokens * self.top_k


@dataclass(frozen=True)
class Job:
    """A training job, with what is wrong with it."""

    kind: str
    seed: int
    size: int
    layers: tuple[Layer, ...]
    num_steps: int
    rate: float
    """GB/s."""
    latency_s: float
    hidden_size: int
    fixed_s: float
    """What the experts take for a chunk."""
    host_s: float = 2e-4
    noise: float = 0.03
    faults: tuple[JobFault, ...] = ()
    one_chunk_steps: int = 0
    """So many steps run in one chunk before the others, as the first ones of num_chunks="auto" do."""
    slow_start: float = 1.0
    """The first two steps take so many times as long, on all ranks."""
    swing: float = 0.0
    """By so large a part steps differ, on all ranks alike."""
    ragged: float = 0.0
    """Every rank comes to a layer later by a random part of what the model takes before it, up to this one."""
    popularity: float = 0.0
    """Of two experts of a rank one has so much more than the mean, the other so much less."""

    @property
    def num_experts(self) -> int:
        return 2 * self.size

    def pace(self, step: int) -> float:
        swing = random.Random(f"{self.seed} pace {step}").uniform(-self.swing, self.swing)
        return (self.slow_start if step < 2 else 1.0) * (1 + swing)

    def ids(self, step: int, rank: int, layer: int) -> Tensor:
        """Return (T, K) ids: nearly even over ranks, but for what is wrong."""
        of = self.layers[layer]
        ids = _even_ids(of.tokens, of.top_k, self.num_experts, self.popularity, f"{self.seed} {rank} {layer}")
        for fault in self.faults:
            share = fault.amount_at(step, None, self) if fault.kind == "imbalance" else None
            if share is not None and fault.is_in("", layer, step, self):
                hot = torch.tensor([2 * culprit for culprit in fault.culprits(step, self)])
                wanted = hot[torch.arange(of.tokens) % len(hot)]
                is_hot = _spread(of.tokens) < share * of.tokens
                is_new = is_hot & (ids != wanted[:, None]).all(dim=1)
                ids = torch.cat((torch.where(is_new, wanted, ids[:, 0])[:, None], ids[:, 1:]), dim=1)
        return ids


def _spread(tokens: int) -> Tensor:
    """Return each token a number, so that those of low ones are spread over all."""
    return torch.arange(tokens) * 7919 % tokens


@functools.lru_cache(maxsize=256)
def _even_ids(tokens: int, top_k: int, num_experts: int, popularity: float, seed: str) -> Tensor:
    """Return ids of which a quarter is drawn, and the others are dealt out."""
    generator = torch.Generator().manual_seed(random.Random(seed).randrange(1 << 30))
    dealt = (torch.arange(tokens)[:, None] + num_experts // top_k * torch.arange(top_k)) % num_experts
    scores = torch.rand(tokens, num_experts, generator=generator)
    is_drawn = _spread(tokens) < tokens / 4
    dealt[is_drawn] = scores.topk(top_k).indices[is_drawn]
    is_other = torch.rand(tokens, top_k, generator=generator) < popularity
    other = torch.where(is_other, dealt // 2 * 2, dealt)
    has_twice = (other.sort(dim=1).values.diff(dim=1) == 0).any(dim=1, keepdim=True)
    return torch.where(has_twice, dealt, other)


def without(job: Job, kinds: Sequence[str]) -> Job:
    """Return the job without its faults of some kinds; of chunks' overhead there stays what one chunk has."""
    kept = [fault for fault in job.faults if fault.kind not in kinds]
    parts = job.layers[0].num_chunks + 2
    one = [replace(of, amount=of.amount / parts) for of in job.faults if of.kind == "chunk overhead" and of not in kept]
    return replace(job, faults=(*kept, *one))


def variants_of(job: Job) -> dict[str, Job]:
    """Return the job with its faults, if it has any without all of them, and where there are several without each."""
    kinds = sorted({fault.kind for fault in job.faults})
    variants = {"with": job}
    if kinds:
        variants["without"] = without(job, kinds)
    if len(kinds) > 1:
        variants |= {f"without {kind}": without(job, [kind]) for kind in kinds}
    return variants


def read_job(plain: dict[str, Any]) -> Job:
    """Return the job that was written as plain values."""
    layers = tuple(Layer(**layer) for layer in plain["layers"])
    faults = tuple(JobFault(**{**fault, "ranks": tuple(fault["ranks"])}) for fault in plain["faults"])
    return Job(**{**plain, "layers": layers, "faults": faults})


def drift_of(job: Job, seconds: dict[str, list[float]]) -> float:
    """Return by how large a part steps on real links that have no faults differ in the mean: before the others, behind
    them and, of a healthy job, in between."""
    healthy = seconds.get("without", [])
    half = len(healthy) // 2
    parts = [healthy[:half], healthy[half:], *([] if job.faults else [seconds["with"]])]
    means = [statistics.fmean(part) for part in parts if part]
    return max(means) / min(means) - 1
