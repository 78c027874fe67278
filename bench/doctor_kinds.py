"""What can be wrong with a training job, as bench.doctor tries it: a table of kinds, and jobs drawn from it."""

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.doctor_faults import ANYWHERE, FREQUENCY, OF_NOBODY, Job, JobFault, Layer

__all__ = ["KINDS", "draw_job", "is_held_out", "kinds_of"]


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
    """Return whether a kind is held out: every third of the sorted names, on which nothing is tuned."""
    return sorted(KINDS).index(kind) % 3 == 0


def kinds_of(which: str, is_real: bool) -> list[str]:
    """Return the kinds that are "open", "held_out" or "all"."""
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
    most = {3: 2, 4: 2, 8: 2 if needs_several else 1}[size] if is_real else {3: 8, 4: 4, 8: 2}[size]
    least = 2 if needs_several else 1
    if kind == "healthy, many unlike layers":
        least = most
    num_layers = draw.choice([number for number in (1, 1, 2, 2, 3, 4, 8) if least <= number <= most])
    num_chunks = draw.choice((2, 2, 3))
    base_s = draw.uniform(0.04, 0.07) if is_real else draw.uniform(0.006, 0.014)
    tokens = draw.choice((192, 256) if is_real else (256, 384, 512))
    layers = []
    for _ in range(num_layers):
        compute_s = base_s * draw.uniform(0.5, 2.0)
        layer_tokens, top_k = round(tokens * draw.choice((1.0, 1.0, 0.5))), draw.choice((1, 2, 2))
        if is_real:  # a message is larger than tc's burst, for which a link is fast
            layer_tokens, top_k = tokens, 2
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
    """Return a healthy job what its name says."""
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


def _faults(specs: Sequence[Spec], job: Job, draw: random.Random) -> list[JobFault]:
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
        fault = JobFault(spec.kind, who, 0.0, spec.when, period, phase, layer, moves=spec.moves)
        found.append(replace(fault, amount=_amount(fault, share / (1 - share) / frequency, job)))
    return found


def _place(spec: Spec, job: Job, draw: random.Random) -> tuple[str, int | None]:
    """Return the phase and the layer of a fault."""
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


def _amount(fault: JobFault, times: float, job: Job) -> float:
    """Return how bad a fault is that takes about so many times the healthy step."""
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
