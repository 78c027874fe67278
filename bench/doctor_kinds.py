"""What can be wrong with a training job, as bench.doctor tries it: a table of kinds, and jobs drawn from it."""

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["KINDS", "Fault", "Job", "Layer", "draw_job", "is_held_out", "kinds_of", "without"]

FACTORS = ("slow rank", "slow link", "slow port", "bandwidth")
"""What is so many times as slow as otherwise; the other kinds take seconds, or a share of the tokens."""
LINKS = ("slow link", "late link", "slow port", "bandwidth", "latency")
OF_NOBODY = ("bandwidth", "latency", "chunk overhead", "host overhead")
"""What all ranks have."""
FREQUENCY = {"always": 1.0, "growing": 0.5, "at random": 0.3, "rare": 0.1, "flapping": 0.35}
ANYWHERE = -1


@dataclass(frozen=True)
class Fault:
    """Something that makes steps slow."""

    kind: str
    ranks: tuple[int, ...]
    """Who; of links sender and receiver, one pair after the other; empty: all, or another one in each step."""
    amount: float
    """How many times as slow, or seconds, or of an imbalance the share of tokens that choose the rank."""
    when: str = "always"
    period: int = 0
    moves: bool = False
    phase: str = ""
    """forward or backward alone; empty: both."""
    layer: int | None = None
    """In one layer alone, or before it; ANYWHERE: another place in each step."""

    def level(self, step: int, job: "Job") -> float:
        """Give how much of it there is in a step, from 0 to 1."""
        if self.when == "periodic":
            return float(step % self.period == self.period - 1)
        if self.when == "growing":
            return (step + 0.5) / job.num_steps
        return float(self.when == "always" or step in _chosen(self.when, job.num_steps, job.seed))

    def amount_at(self, step: int, rank: int | None, job: "Job") -> float | None:
        """Give how bad it is on a rank in a step, None: not at all."""
        level = self.level(step, job)
        if not level or (rank is not None and rank not in self.culprits(step, job)):
            return None
        return 1 + (self.amount - 1) * level if self.kind in FACTORS else self.amount * level

    def culprits(self, step: int, job: "Job") -> Sequence[int]:
        if self.moves:
            return (random.Random(f"{job.seed} who {step}").randrange(job.size),)
        return self.ranks or range(job.size)

    def is_in(self, phase: str, layer: int | None, step: int, job: "Job") -> bool:
        """Say whether it is in a phase of a layer; "" and None: wherever it is."""
        of_phase, of_layer = self.phase, self.layer
        if of_layer == ANYWHERE:
            place = random.Random(f"{job.seed} where {step}")
            of_phase, of_layer = place.choice(("forward", "backward")), place.randrange(len(job.layers))
        return (not phase or of_phase in ("", phase)) and (layer is None or of_layer in (None, layer))


@functools.cache
def _chosen(when: str, num_steps: int, seed: int) -> frozenset[int]:
    """Give the steps in which a fault is there that comes now and then."""
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
    faults: tuple[Fault, ...] = ()
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
        """Give (T, K) ids: nearly even over ranks, but for what is wrong."""
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
    """Give each token a number, so that those of low ones are spread over all."""
    return torch.arange(tokens) * 7919 % tokens


@functools.lru_cache(maxsize=256)
def _even_ids(tokens: int, top_k: int, num_experts: int, popularity: float, seed: str) -> Tensor:
    """Give ids of which a quarter is drawn, and the others are dealt out."""
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
    """Give the job without its faults of some kinds; of chunks' overhead there stays what one chunk has."""
    kept = [fault for fault in job.faults if fault.kind not in kinds]
    parts = job.layers[0].num_chunks + 2
    one = [replace(of, amount=of.amount / parts) for of in job.faults if of.kind == "chunk overhead" and of not in kept]
    return replace(job, faults=(*kept, *one))


@dataclass(frozen=True)
class Spec:
    """A fault before it is drawn who has it, and how bad it is."""

    kind: str
    num: int = 1
    when: str = "always"
    place: str = "all"
    """start: before a step's first layer; between: before a later one; behind: before a layer in backward; anywhere;
    of what isn't late: forward, backward, layer, layer's backward, or all."""
    moves: bool = False


LATE = functools.partial(Spec, "late rank", place="start")
SLOW = functools.partial(Spec, "slow rank")
HOT = functools.partial(Spec, "imbalance")
LINK = functools.partial(Spec, "slow link")
PORT = functools.partial(Spec, "slow port")
KINDS: dict[str, tuple[Spec, ...]] = {
    "healthy": (),
    "healthy, drawn out start": (),
    "healthy, first steps in one chunk": (),
    "healthy, many unlike layers": (),
    "healthy, noisy": (),
    "healthy, one chunk": (),
    "healthy, one layer": (),
    "healthy, ragged": (),
    "healthy, steps of other lengths": (),
    "healthy, uneven experts": (),
    "late before a step": (LATE(),),
    "late between layers": (LATE(place="between"),),
    "late in backward": (LATE(place="behind"),),
    "late every n-th": (LATE(when="periodic"),),
    "late between layers every n-th": (LATE(when="periodic", place="between"),),
    "late growing": (LATE(when="growing"),),
    "late moving": (LATE(moves=True),),
    "late moving between layers": (LATE(moves=True, place="between"),),
    "late at random": (LATE(when="at random"),),
    "garbage collection on a rank": (LATE(when="rare", place="anywhere"),),
    "garbage collection on any rank": (LATE(when="at random", place="anywhere", moves=True),),
    "checkpoint of a rank": (LATE(when="rare"),),
    "two late": (LATE(2),),
    "two late in backward": (LATE(2, place="behind"),),
    "three late": (LATE(3),),
    "two late every n-th": (LATE(2, when="periodic"),),
    "slow": (SLOW(),),
    "slow in forward": (SLOW(place="forward"),),
    "slow in backward": (SLOW(place="backward"),),
    "slow in one layer": (SLOW(place="layer"),),
    "slow in one layer's backward": (SLOW(place="layer's backward"),),
    "slow every n-th": (SLOW(when="periodic"),),
    "slow growing": (SLOW(when="growing"),),
    "slow moving": (SLOW(moves=True),),
    "slow at random": (SLOW(when="at random"),),
    "two slow": (SLOW(2),),
    "three slow": (SLOW(3),),
    "link slow": (LINK(),),
    "link late": (Spec("late link"),),
    "link slow every n-th": (LINK(when="periodic"),),
    "link flapping": (LINK(when="flapping"),),
    "two links slow": (LINK(2),),
    "port slow": (PORT(),),
    "port growing slow": (PORT(when="growing"),),
    "port flapping": (PORT(when="flapping"),),
    "bandwidth": (Spec("bandwidth"),),
    "latency": (Spec("latency"),),
    "chunk overhead": (Spec("chunk overhead"),),
    "host overhead": (Spec("host overhead"),),
    "hot expert": (HOT(),),
    "hot expert in one layer": (HOT(place="layer"),),
    "hot expert growing": (HOT(when="growing"),),
    "hot expert moving": (HOT(moves=True),),
    "late and slow": (LATE(), SLOW()),
    "late and link slow": (LATE(), LINK()),
    "slow and hot expert": (SLOW(), HOT()),
    "late every n-th and slow": (LATE(when="periodic"), SLOW()),
    "slow in backward and late between layers": (SLOW(place="backward"), LATE(place="between")),
    "late, slow and link slow": (LATE(), SLOW(), LINK()),
}
NOT_REAL = ("link late", "latency", "link slow every n-th", "link flapping", "port growing slow")
"""What tc's buckets have not, or lose packets of."""


def is_held_out(kind: str) -> bool:
    """Say whether a kind is one of the third that nothing is tuned on: every third of the sorted names."""
    return sorted(KINDS).index(kind) % 3 == 0


def kinds_of(which: str, is_real: bool) -> list[str]:
    """Give the kinds that are "open", "held_out" or "all"."""
    return [
        kind
        for kind in KINDS
        if (which == "all" or is_held_out(kind) == (which == "held_out")) and not (is_real and kind in NOT_REAL)
    ]


def draw_job(kind: str, seed: int, is_real: bool, size: int | None = None) -> Job:
    """Draw a job of a kind; is_real: for processes and links that are slower than emulated ones by nature."""
    draw = random.Random(f"{kind} {seed}")
    specs = KINDS[kind]
    num_culprits = max((spec.num for spec in specs), default=1)
    size = size or draw.choice([size for size in (3, 4, 4, 8) if size > num_culprits])
    needs_several = any(spec.place in ("between", "layer", "layer's backward") for spec in specs)
    most = {3: 3, 4: 3, 8: 2}[size] if is_real else {3: 8, 4: 4, 8: 2}[size]
    least = 2 if needs_several else 1
    if kind == "healthy, many unlike layers":
        least = most
    num_layers = draw.choice([number for number in (1, 1, 2, 2, 3, 4, 8) if least <= number <= most])
    num_chunks = draw.choice((2, 2, 3))
    base_s = draw.uniform(0.03, 0.06) if is_real else draw.uniform(0.006, 0.014)
    tokens = draw.choice((256, 384, 512))
    layers = []
    for _ in range(num_layers):
        compute_s = base_s * draw.uniform(0.5, 2.0)
        layer_tokens, top_k = round(tokens * draw.choice((1.0, 1.0, 0.5))), draw.choice((1, 2, 2))
        before_s = base_s * draw.choice((0.2, 0.5, 1.0))
        layers.append(Layer(layer_tokens, top_k, num_chunks, compute_s / (layer_tokens * top_k), before_s))
    hidden_size = 1024 if is_real else 16
    rates = [_bytes_out(layer, size, hidden_size) / layer.compute_s() for layer in layers]
    rate = max(rates) / draw.uniform(0.12, 0.3) / 1e9
    job = Job(
        kind=kind,
        seed=seed,
        size=size,
        layers=tuple(layers),
        num_steps=12 if is_real else 14,
        rate=rate,
        latency_s=draw.uniform(3e-5, 2e-4),
        hidden_size=hidden_size,
        fixed_s=base_s * 0.005,
        one_chunk_steps=3 if draw.random() < 1 / 3 else 0,
    )
    job = replace(_as_named(job), faults=tuple(_faults(specs, job, draw)))
    return replace(job, num_steps=max(job.num_steps, 3 * max((fault.period for fault in job.faults), default=0)))


def _as_named(job: Job) -> Job:
    """Give a healthy job what its name says."""
    one = tuple(replace(layer, num_chunks=1) for layer in job.layers)
    named = {
        "healthy, drawn out start": {"slow_start": 1.6},
        "healthy, first steps in one chunk": {"one_chunk_steps": 3},
        "healthy, noisy": {"noise": 0.08},
        "healthy, one chunk": {"layers": one, "rate": 6 * job.rate},
        "healthy, one layer": {"layers": job.layers[:1]},
        "healthy, ragged": {"ragged": 0.2},
        "healthy, steps of other lengths": {"swing": 0.3},
        "healthy, uneven experts": {"popularity": 0.4},
    }
    return replace(job, **named.get(job.kind, {}))  # type: ignore[arg-type]


def _bytes_out(layer: Layer, size: int, hidden_size: int) -> float:
    return layer.tokens * layer.top_k * (1 - 1 / size) * 4 * hidden_size


def _faults(specs: Sequence[Spec], job: Job, draw: random.Random) -> list[Fault]:
    ranks = draw.sample(range(job.size), job.size)
    pairs = draw.sample(list(itertools.permutations(range(job.size), 2)), 3)
    found = []
    for spec in specs:
        period = draw.randint(3, 4 if job.hidden_size > 16 else 7) if spec.when == "periodic" else 0
        is_link = spec.kind in ("slow link", "late link")
        who: tuple[int, ...] = ()
        if is_link:
            who = tuple(rank for pair in pairs[: spec.num] for rank in pair)
        elif not spec.moves and spec.kind not in OF_NOBODY:
            who = tuple(sorted(ranks.pop() for _ in range(spec.num)))
        phase, layer = _place(spec, job, draw)
        share = draw.uniform(0.22, 0.5) if len(specs) == 1 else draw.uniform(0.2, 0.35)
        frequency = 1 / period if period else FREQUENCY[spec.when]
        fault = Fault(spec.kind, who, 0.0, spec.when, period, spec.moves, phase, layer)
        found.append(replace(fault, amount=_amount(fault, share / (1 - share) / frequency, job)))
    return found


def _place(spec: Spec, job: Job, draw: random.Random) -> tuple[str, int | None]:
    """Give the phase and the layer of a fault."""
    last = len(job.layers) - 1
    return {
        "all": ("", None),
        "start": ("forward", 0),
        "between": ("forward", draw.randint(min(1, last), last)),
        "behind": ("backward", draw.randint(0, last)),
        "anywhere": ("", ANYWHERE),
        "forward": ("forward", None),
        "backward": ("backward", None),
        "layer": ("", draw.randint(0, last)),
        "layer's backward": ("backward", draw.randint(0, last)),
    }[spec.place]


def _amount(fault: Fault, times: float, job: Job) -> float:
    """Give how bad a fault is that takes about so many times the healthy step."""
    steps_s = sum(3 * (layer.before_s + layer.compute_s()) for layer in job.layers)
    cost_s = times * steps_s
    layers = [layer for number, layer in enumerate(job.layers) if fault.layer in (None, number)] or list(job.layers)
    passes = {"": 3, "forward": 1, "backward": 2}[fault.phase]
    compute_s = passes * sum(layer.compute_s() for layer in layers)
    all_s = 3 * sum(layer.compute_s() for layer in job.layers)
    sent_s = 4 * sum(_bytes_out(layer, job.size, job.hidden_size) for layer in job.layers) / (job.rate * 1e9)
    if fault.kind == "slow rank":
        return 1 + min(8.0, cost_s / compute_s)
    if fault.kind == "imbalance":
        top_k = sum(layer.top_k for layer in layers) / len(layers)
        return min(0.95, max(0.1, 1.2 * cost_s / compute_s * top_k / job.size))
    if fault.kind in ("slow port", "bandwidth"):
        return (all_s + cost_s) / sent_s
    if fault.kind == "slow link":
        return (job.size - 1) * (all_s + cost_s) / sent_s
    if fault.kind in ("late link", "latency"):
        return cost_s / (5 * len(job.layers))
    if fault.kind == "chunk overhead":
        return cost_s / (3 * len(job.layers))
    return cost_s / (len(job.layers) if fault.kind == "host overhead" else 1)
