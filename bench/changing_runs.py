"""`python -m bench.changing_runs`: does the doctor say what changes in a run, since when, and for whom?

Traces of a plain MoE under DDP, made by the simulation of bench.synthetic_traces: all ranks or the network get slower
together, ranks and links are slow for a while, few ranks take turns, two are slow in different passes, steps warm up.
A third of the kinds is held out: nothing is tuned on those.
"""

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench.faults import Fault
from bench.foreign_scenarios import Scenario
from bench.synthetic_traces import write_traces
from tritonmoe.tools.benchmarks.argument_types import positive, seed
from tritonmoe.tools.doctor.attribution import Verdict, attribute
from tritonmoe.tools.doctor.reading import read_traces

STEPS, CLOSE = 16, 0.15
HELD_OUT = (
    "network growing slow", "all late from half-way", "slow from half-way", "two slow one after the other",
    "imbalance for a while", "healthy", "two late one after the other", "network slow for a while, one slow",
    "slow up to a step", "link slow for a while, another rank late",
)  # fmt: skip
"""Kinds on which nothing is tuned."""


class Expected(NamedTuple):
    """A finding that a verdict must have, with the ranks (empty: all) and the steps, as far as these are asked for."""

    kind: str
    ranks: tuple[int, ...]
    when: str
    since: int | None = None
    until: int | None = None


def kinds_of(seed_: int) -> dict[str, tuple[int, tuple[Fault, ...], tuple[Expected, ...]]]:
    """Return by kind how many ranks run, what is wrong, and the findings that say so, the first one first."""
    draw = random.Random(seed_)
    size, half = draw.choice((2, 3, 4)), STEPS // 2
    all_of, one = tuple(range(size)), draw.randrange(size)
    a, b = draw.randint(3, 5), draw.randint(9, 12)
    first, second, third = draw.sample(range(8), 3)
    link = tuple(draw.sample(range(4), 2))

    def of(kind: str, ranks: tuple[int, ...], amount: float, when: str = "for a while", **more: Any) -> Fault:
        return Fault(kind, ranks, amount, when, **more)

    wide: dict[str, Any] = {"since": half}
    far: dict[str, Any] = {"since": a, "until": b}
    while_there = ("for a while", a, b)
    return {
        "all slow growing": (size, (of("slow rank", all_of, 2.5, "growing"),), (Expected("slower compute", (), ""),)),
        "all slow from half-way": (
            size,
            (of("slow rank", all_of, 1.8, **wide),),
            (Expected("slower compute", (), "for a while", half),),
        ),
        "all slow for a while": (
            size,
            (of("slow rank", all_of, 2.0, **far),),
            (Expected("slower compute", (), *while_there),),
        ),
        "all slow backward from half-way": (
            size,
            (of("slow rank", all_of, 2.0, phase="backward", **wide),),
            (Expected("slower compute", (), "for a while", half),),
        ),
        "network growing slow": (
            size,
            (of("slow network", all_of, 6.0, "growing"),),
            (Expected("slower exchanges", (), ""),),
        ),
        "network slow from half-way": (
            size,
            (of("slow network", all_of, 4.0, **wide),),
            (Expected("slower exchanges", (), "for a while", half),),
        ),
        "network slow for a while": (
            size,
            (of("slow network", all_of, 4.0, **far),),
            (Expected("slower exchanges", (), *while_there),),
        ),
        "all late growing": (size, (of("late rank", all_of, 0.15, "growing"),), (Expected("slower host", (), ""),)),
        "all late from half-way": (
            size,
            (of("late rank", all_of, 0.08, **wide),),
            (Expected("slower host", (), "for a while", half),),
        ),
        "all slow from half-way, one late": (
            size,
            (of("slow rank", all_of, 1.8, **wide), of("late rank", (one,), 0.08, "always")),
            (Expected("slower compute", (), "for a while", half), Expected("late rank", (one,), "always")),
        ),
        "slow for a while": (
            size,
            (of("slow rank", (one,), 3.0, **far),),
            (Expected("slow rank", (one,), *while_there),),
        ),
        "late for a while": (
            size,
            (of("late rank", (one,), 0.1, **far),),
            (Expected("late rank", (one,), *while_there),),
        ),
        "slow from half-way": (
            size,
            (of("slow rank", (one,), 3.0, **wide),),
            (Expected("slow rank", (one,), "for a while", half),),
        ),
        "late up to a step": (
            size,
            (of("late rank", (one,), 0.1, since=0, until=6),),
            (Expected("late rank", (one,), "for a while", None, 6),),
        ),
        "link slow for a while": (
            4,
            (of("slow link", link, 8.0, **far),),
            (Expected("slow link", link, *while_there),),
        ),
        "link slow from half-way": (
            4,
            (of("slow link", link, 8.0, **wide),),
            (Expected("slow link", link, "for a while", half),),
        ),
        "two slow one after the other": (
            8,
            (of("slow rank", (first,), 3.0, since=2, until=6), of("slow rank", (second,), 3.0, since=9, until=13)),
            (
                Expected("slow rank", (first,), "for a while", 2, 6),
                Expected("slow rank", (second,), "for a while", 9, 13),
            ),
        ),
        "two late of three, each for a while": (
            3,
            (of("late rank", (0,), 0.1, since=2, until=6), of("late rank", (2,), 0.1, since=8, until=12)),
            (Expected("late rank", (0,), "for a while", 2, 6), Expected("late rank", (2,), "for a while", 8, 12)),
        ),
        "first one slow, then the other": (
            2,
            (of("slow rank", (1,), 3.0, since=0, until=5), of("slow rank", (0,), 3.0, since=10)),
            (Expected("slow rank", (1,), "for a while", None, 5), Expected("slow rank", (0,), "for a while", 10)),
        ),
        "three slow backward, one after the other": (
            8,
            tuple(
                of("slow rank", (rank,), 4.0, since=5 * n, until=5 * n + 4, phase="backward")
                for n, rank in enumerate((5, 2, 7))
            ),
            (Expected("slow rank", (2,), "for a while", 5, 9), Expected("slow rank", (7,), "for a while", 10, 14)),
        ),
        "two of eight late by turns": (
            8,
            (of("late rank", (first, second), 0.1, "turns"),),
            (Expected("late rank", (first, second), ""),),
        ),
        "two of eight slow by turns": (
            8,
            (of("slow rank", (first, second), 3.0, "turns"),),
            (Expected("slow rank", (first, second), ""),),
        ),
        "three of four late by turns": (
            4,
            (of("late rank", (0, 1, 3), 0.1, "turns"),),
            (Expected("late rank", (-1,), ""),),
        ),
        "slow forward, another backward": (
            8,
            (
                of("slow rank", (first,), 4.0, "always", phase="forward"),
                of("slow rank", (second,), 2.5, "always", phase="backward"),
            ),
            (Expected("slow rank", (first,), "always"), Expected("slow rank", (second,), "always")),
        ),
        "late forward, another backward": (
            8,
            (
                of("late rank", (first,), 0.08, "always", phase="forward"),
                of("late rank", (third,), 0.08, "always", phase="backward"),
            ),
            (Expected("late rank", (first,), "always"), Expected("late rank", (third,), "always")),
        ),
        "warm-up of all": (
            size,
            (of("slow rank", all_of, 3.0, since=0, until=2),),
            (Expected("slower compute", (), "warm-up"),),
        ),
        "warm-up of one": (
            size,
            (of("late rank", (one,), 0.2, since=0, until=2),),
            (Expected("late rank", (one,), "warm-up"),),
        ),
        "imbalance for a while": (
            4,
            (of("imbalance", (one % 4,), 0.6, **far),),
            (Expected("imbalance", (one % 4,), *while_there),),
        ),
        "two late one after the other": (
            8,
            (of("late rank", (first,), 0.1, since=2, until=6), of("late rank", (second,), 0.1, since=9, until=13)),
            (
                Expected("late rank", (first,), "for a while", 2, 6),
                Expected("late rank", (second,), "for a while", 9, 13),
            ),
        ),
        "network slow for a while, one slow": (
            size,
            (of("slow network", all_of, 4.0, **far), of("slow rank", (one,), 2.5, "always")),
            (Expected("slower exchanges", (), *while_there), Expected("slow rank", (one,), "always")),
        ),
        "slow up to a step": (
            size,
            (of("slow rank", (one,), 3.0, since=0, until=7),),
            (Expected("slow rank", (one,), "for a while", None, 7),),
        ),
        "link slow for a while, another rank late": (
            4,
            (of("slow link", link, 8.0, **far), of("late rank", (({0, 1, 2, 3} - set(link)).pop(),), 0.08, "always")),
            (
                Expected("slow link", link, *while_there),
                Expected("late rank", (({0, 1, 2, 3} - set(link)).pop(),), "always"),
            ),
        ),
        "healthy": (size, (), ()),
    }


def is_held_out(kind: str) -> bool:
    return kind in HELD_OUT


def judged(found: Verdict, expected: tuple[Expected, ...]) -> list[bool]:
    """Return whether the first cause is right, every expected one is there with its ranks, and with its steps."""
    if not expected:
        return [not found.findings] * 3
    of_kind = [[one for one in found.findings if one.kind == of.kind] for of in expected]
    named = [
        [one for one in own if (one.culprits.moves if of.ranks == (-1,) else set(one.culprits.ranks) == set(of.ranks))]
        for own, of in zip(of_kind, expected, strict=True)
    ]

    def is_near(one: int | None, other: int | None) -> bool:
        return one == other or (one is not None and other is not None and abs(one - 1 - other) <= 1)

    timed = [
        any(
            not of.when
            or (
                one.when.when == of.when
                and (
                    of.when != "for a while"
                    or (is_near(one.when.since, of.since) and is_near(one.when.until, of.until))
                )
            )
            for one in own
        )
        for own, of in zip(named, expected, strict=True)
    ]
    first = found.findings[0].kind if found.findings else None
    return [first in {of.kind for of in expected}, all(named), all(timed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", choices=["open", "held_out", "all"], default="all", help="which kinds")
    parser.add_argument("--each", type=positive, default=1, help="runs of each kind")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--only", help="one kind alone")
    arguments = parser.parse_args()
    right = [0, 0, 0, 0]
    count = 0
    for number in range(arguments.seed, arguments.seed + arguments.each):
        for kind, (size, faults, expected) in kinds_of(number).items():
            is_asked = arguments.kinds == "all" or is_held_out(kind) == (arguments.kinds == "held_out")
            if (arguments.only is not None and arguments.only != kind) or not is_asked:
                continue
            scenario = Scenario(kind, number, size, 2, STEPS, faults)
            with tempfile.TemporaryDirectory() as folder:
                share = write_traces(scenario, Path(folder))
                found = attribute(read_traces(Path(folder)).graph)
            promised = found.together.share(found.replayed_s)
            marks = [*judged(found, expected), not faults or abs(promised - share) <= CLOSE]
            right = [total + mark for total, mark in zip(right, marks, strict=True)]
            count += 1
            said = "; ".join(
                f"{one.kind} {list(one.culprits.ranks)}{' moves' if one.culprits.moves else ''} {one.culprits.phase} "
                f"{one.when}, {one.cost.share(found.replayed_s):.0%}"
                for one in found.findings
            )
            names = zip(("cause", "who", "when", "gain"), marks, strict=True)
            print(
                f"{kind} (seed {number}, {size} ranks): "
                + " ".join(f"{name} {'right' if mark else 'WRONG'}" for name, mark in names)
                + f"; true {share:.0%}, promised {promised:.0%}; said: {said or 'healthy'}"
            )
    print(f"of {count} runs: cause {right[0]}, who {right[1]}, when {right[2]}, gain within 15 points {right[3]}")


if __name__ == "__main__":
    main()
