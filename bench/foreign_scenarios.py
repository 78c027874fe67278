"""Scenarios of other trainers: who runs, and what is wrong with it."""

import random
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.faults import Fault

__all__ = ["KINDS", "NODE_SIZE", "TRAINERS", "Scenario", "draw", "is_held_out", "level_on_rank", "series"]

NODE_SIZE = 2
"""Ranks of a host, where there are several."""
TRAINERS = ("ddp", "transformers", "fsdp2", "pipeline")


@dataclass(frozen=True)
class Scenario:
    """A run of a MoE under somebody's trainer, with what is wrong with it."""

    name: str
    seed: int
    num_ranks: int = 4
    num_layers: int = 2
    num_steps: int = 12
    faults: tuple[Fault, ...] = field(default=())
    trainer: str = "ddp"
    """ddp: all_to_all_single under DDP; transformers: its own expert parallelism with FSDP2; fsdp2: all_to_all_single
    under fully_shard; pipeline: two stages of torch.distributed.pipelining, 1F1B, experts spread within a stage."""
    is_unlike: bool = False
    """Whether a layer takes longer than the one before."""
    num_hosts: int = 1
    uplink_bits: float = 0.0
    """Bits per second between hosts, of a host's ranks together."""
    top_k: int = 2
    """How many experts a token of transformers' model has."""

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(plain: dict[str, Any]) -> "Scenario":
        faults = tuple(Fault(**{**one, "ranks": tuple(one["ranks"])}) for one in plain["faults"])
        return Scenario(**{**plain, "faults": faults})


def level_on_rank(fault: Fault, of: Scenario, step: int, rank: int) -> float:
    """Return how much of the fault there is on a rank in a step, from 0 to 1."""
    draw = random.Random(of.seed * 1000 + step)
    if not fault.ranks:
        if rank != draw.randrange(of.num_ranks):
            return 0.0
    elif fault.kind != "slow link" and rank not in fault.ranks:
        return 0.0
    if fault.when == "turns" and rank != fault.ranks[step % len(fault.ranks)]:
        return 0.0
    return fault.share(step, of.num_steps, lambda: draw.random() < 0.3)


KINDS = (
    "healthy", "healthy of many layers", "healthy of unlike layers", "slow rank", "slow backward", "slow in one layer",
    "slow periodic", "slow growing", "two slow", "late rank", "late in one layer", "late in backward", "late periodic",
    "late growing", "late moving", "late at random", "two late", "slow link", "two slow links", "imbalance",
    "host overhead", "host periodic", "slow and late", "late and slow link", "imbalance and slow",
)  # fmt: skip
MORE_RANKS = ("slow link", "two slow links", "two slow", "two late", "late and slow link")
"""Kinds that need others of the same work to be compared with."""


def is_held_out(kind: str) -> bool:
    """Return whether a kind is held out: about a third of all, by their names, on which nothing is tuned."""
    return zlib.crc32(kind.encode()) % 3 == 1


def draw(kind: str, seed: int, trainer: str = "ddp", num_ranks: int | None = None) -> Scenario:
    """Return a random scenario of a kind; num_ranks: None draws that too, from 2 to 4."""
    of = random.Random(f"{trainer} {kind} {seed}")
    if num_ranks is None:
        few = (4,) if trainer == "pipeline" else (3, 4)
        num_ranks = of.choice(few if kind in MORE_RANKS or "imbalance" in kind else (2, *few))
    one, other = of.sample(range(num_ranks), 2)
    link = other_link = (one, other)
    if trainer == "pipeline" and num_ranks == 4:
        other = one ^ 1 if "two" in kind else other
        link, other_link = (one, (one + 2) % 4), ((one + 2) % 4, one)
    elif num_ranks > 2:
        other_link = (next(rank for rank in range(num_ranks) if rank not in link), other)
    late, slow, rate = of.choice((0.06, 0.1)), of.choice((2.0, 3.0)), of.choice((4.0, 8.0))
    every, both = of.choice((3, 4, 5)), tuple(sorted((one, other)))
    all_ranks = tuple(range(num_ranks))
    faults: dict[str, tuple[Fault, ...]] = {
        "slow rank": (Fault("slow rank", (one,), slow),),
        "slow backward": (Fault("slow rank", (one,), 1 + 1.5 * (slow - 1), phase="backward"),),
        "slow in one layer": (Fault("slow rank", (one,), 1 + 3 * (slow - 1), layer=1),),
        "slow periodic": (Fault("slow rank", (one,), 2 * slow, "periodic", min(every, 4)),),
        "slow growing": (Fault("slow rank", (one,), 1 + 2 * (slow - 1), "growing"),),
        "two slow": (Fault("slow rank", both, slow),),
        "late rank": (Fault("late rank", (one,), late),),
        "late in one layer": (Fault("late rank", (one,), late, phase="forward", layer=1),),
        "late in backward": (Fault("late rank", (one,), late, phase="backward", layer=0),),
        "late periodic": (Fault("late rank", (one,), 4 * late, "periodic", every),),
        "late growing": (Fault("late rank", (one,), 2 * late, "growing"),),
        "late moving": (Fault("late rank", (), late),),
        "late at random": (Fault("late rank", (one,), 4 * late, "at random"),),
        "two late": (Fault("late rank", both, late),),
        "slow link": (Fault("slow link", link, rate),),
        "two slow links": (Fault("slow link", link, rate), Fault("slow link", other_link, rate)),
        "imbalance": (Fault("imbalance", (one,), 0.7),),
        "host overhead": (Fault("host overhead", (one,), late / 4),),
        "host periodic": (Fault("host overhead", all_ranks, late, "periodic", every),),
        "slow and late": (Fault("slow rank", (one,), slow), Fault("late rank", (other,), late)),
        "late and slow link": (Fault("late rank", (one,), late), Fault("slow link", link, rate)),
        "imbalance and slow": (Fault("imbalance", (one,), 0.6), Fault("slow rank", (other,), slow)),
    }
    layers = 4 if kind == "healthy of many layers" else of.choice((2, 3) if trainer in ("ddp", "fsdp2") else (2,))
    is_unlike = kind == "healthy of unlike layers"
    return Scenario(kind, seed, num_ranks, layers, 12, faults.get(kind, ()), trainer, is_unlike)


def series(trainers: Sequence[str], kinds: str, seeds: Sequence[int], num_ranks: int | None = None) -> list[Scenario]:
    """Return a scenario for each trainer, kind and seed; kinds: open, held_out or all."""
    wanted = [kind for kind in KINDS if kinds == "all" or is_held_out(kind) == (kinds == "held_out")]
    return [draw(kind, seed, trainer, num_ranks) for trainer in trainers for kind in wanted for seed in seeds]
