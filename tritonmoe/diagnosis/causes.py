"""Causes: what may make a recorded step slow, each with how its conditions are without it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tritonmoe.diagnosis.costs import Costs
from tritonmoe.diagnosis.messages import Reach
from tritonmoe.diagnosis.recording import RecordedCall, by_layer
from tritonmoe.diagnosis.replay import Conditions, PassesBefore, conditions_of
from tritonmoe.overlap.steps import StepKind, Unit
from tritonmoe.simulation.cost_model import LinkCosts, StepCosts

__all__ = ["Cause", "CauseKind", "causes_of"]

CauseKind = Literal[
    "slow link",
    "late link",
    "slow port",
    "slow rank",
    "late rank",
    "imbalance",
    "bandwidth",
    "latency",
    "chunk overhead",
    "host overhead",
    "exchange contention",
    "expert compute",
]

WALKED_CALLS = 4
"""Of so many last calls the lateness of ranks is taken."""


@dataclass(frozen=True)
class Cause:
    """Something that a step takes longer for, and that can be taken out of its conditions."""

    kind: CauseKind
    ranks: tuple[int, ...]
    words: str
    remove: Callable[[Conditions], Conditions]

    @property
    def key(self) -> tuple:
        """What tells it from others: there is one imbalance, whichever rank stands out most."""
        return self.kind, () if self.kind == "imbalance" else self.ranks


def causes_of(calls: Sequence[RecordedCall], costs: Costs, before: PassesBefore) -> Iterator[Cause]:
    """Give what may be taken out of calls with these costs."""
    yield from _slow_links(costs)
    yield from _slow_ranks(costs)
    yield from _late_ranks(calls, costs, before)
    yield _imbalance(calls)
    yield Cause("bandwidth", (), f"the links' rate, {_rate(costs.link)}", without_bandwidth)
    yield Cause("latency", (), f"{_latency(costs.link)} for every exchange", without_latency)
    steps = calls[0].plan.num_segments
    yield Cause("chunk overhead", (), f"what experts in {steps} parts cost over one", without_chunk_overhead)
    yield Cause("host overhead", (), "the host, before the first step and between steps", without_host_overhead)
    if costs.link.contention:
        words = f"compute loses {costs.link.contention:.0%} of its speed beside an exchange"
        yield Cause("exchange contention", (), words, without_contention)
    yield Cause("expert compute", (), "what the experts compute: the bound itself", without_experts)


def _rate(link: LinkCosts) -> str:
    rate = f"{link.bytes_per_s / 1e9:.3g} GB/s"
    inside = None if link.each is None else link.each.inside
    if inside is None or not bool((inside.out_s > 0).any()):
        return rate
    return f"{rate} between nodes, {1e-9 / float(inside.out_s.median()):.3g} GB/s inside"


def _latency(link: LinkCosts) -> str:
    latency = f"{1e6 * link.latency_s:.0f} us"
    if link.each is None or link.each.inside is None:
        return latency
    is_near = Reach.INSIDE.pairs(len(link.each.latency_s), link.each.inside.node_size)
    return f"{latency} between nodes and {1e6 * float(link.each.latency_s[is_near].median()):.0f} us inside"


def _slow_links(costs: Costs) -> Iterator[Cause]:
    ratios = costs.ratios
    for i, k in (ratios.link > 1).nonzero().tolist():
        words = f"from rank {i} to rank {k} a byte takes {float(ratios.link[i, k]):.1f} times as long as elsewhere"
        yield Cause("slow link", (i, k), words, partial(without_slow_link, i=i, k=k))
    for i, k in (ratios.excess_s > 0).nonzero().tolist():
        excess_s = float(ratios.excess_s[i, k])
        words = f"from rank {i} to rank {k} every message takes {1e6 * excess_s:.0f} us longer than elsewhere"
        yield Cause("late link", (i, k), words, partial(without_late_link, i=i, k=k, excess_s=excess_s))
    ports = {"out of it": ratios.port_out, "into it": ratios.port_in}
    if ratios.inside_out is not None and ratios.inside_in is not None:
        ports |= {"out of it inside its node": ratios.inside_out, "into it inside its node": ratios.inside_in}
    slow = torch.stack([ratio > 1 for ratio in ports.values()]).any(0)
    for rank in slow.nonzero()[:, 0].tolist():
        ways = {way: float(ratio[rank]) for way, ratio in ports.items()}
        said = " and ".join(f"{times:.1f} times as long {way}" for way, times in ways.items() if times > 1)
        words = f"at the port of rank {rank} a byte takes {said}"
        yield Cause("slow port", (rank,), words, partial(without_slow_port, rank=rank))


def _slow_ranks(costs: Costs) -> Iterator[Cause]:
    for rank, slowness in enumerate(costs.slowness):
        if slowness > 1:
            words = f"rank {rank} takes {slowness:.2f} times as long for the same pairs"
            yield Cause("slow rank", (rank,), words, partial(without_slow_rank, rank=rank))


def _late_ranks(calls: Sequence[RecordedCall], costs: Costs, before: PassesBefore) -> Iterator[Cause]:
    entries = [entry for call in calls[-WALKED_CALLS:] for entry in conditions_of(call, before, costs).entries]
    typical = torch.stack([entry.own_s for entry in entries]).median(0).values
    most = torch.stack([entry.own_s for entry in entries]).mean(0)
    for rank in (most > 0).nonzero()[:, 0].tolist():
        words = f"rank {rank} comes {1e3 * float(torch.maximum(typical, most)[rank]):.1f} ms after the others"
        yield Cause("late rank", (rank,), words, partial(without_late_rank, rank=rank))


def _imbalance(calls: Sequence[RecordedCall]) -> Cause:
    """Name the rank that stands out most in any layer, by the pairs that it computes or by the tokens that it has."""
    layers = by_layer(calls)
    found = []
    for layer, of_layer in layers.items():
        pairs = torch.stack([call.work.pairs for call in of_layer]).sum(0)
        for computes, of_ranks in ((True, pairs.sum(0)), (False, pairs.sum(1))):
            times = of_ranks / of_ranks.mean().clamp(min=1)
            found.append((float(times.max()), computes, int(times.argmax()), layer))
    most, computes, rank, layer = max(found, key=lambda one: one[0])
    where = f" in layer {layer}" if len(layers) > 1 else ""
    if not computes:
        words = f"rank {rank} has {most:.2f} times the mean rank's tokens{where}"
        return Cause("imbalance", (rank,), words, without_imbalance)
    of_slots = torch.tensor([call.ranks[rank].pairs_per_expert for call in layers[layer]], device="cpu").sum(0)
    total = max(1.0, sum(float(call.work.pairs.sum()) for call in layers[layer]))
    slot = rank * len(of_slots) + int(of_slots.argmax()) if len(of_slots) else 0
    words = (
        f"rank {rank} computes {most:.2f} times the mean rank's pairs{where}; the expert of slot {slot} has "
        f"{max(of_slots.tolist(), default=0) / total:.0%} of all"
    )
    return Cause("imbalance", (rank,), words, without_imbalance)


def without_slow_link(of: Conditions, i: int, k: int) -> Conditions:
    each = of.each_link
    link_s = each.link_s.clone()
    link_s[i, k] = 0.0
    return replace(of, link=replace(of.link, each=replace(each, link_s=link_s)))


def without_late_link(of: Conditions, i: int, k: int, excess_s: float) -> Conditions:
    latency_s = of.each_link.latency_s.clone()
    latency_s[i, k] -= excess_s
    return _with_latencies(of, latency_s)


def _with_latencies(of: Conditions, latency_s: Tensor) -> Conditions:
    """Let a message of no bytes take (W, W) seconds; counts are such messages too."""
    link = replace(of.link, each=replace(of.each_link, latency_s=latency_s))
    before_s, after_s = _held_up_s(of.link), _held_up_s(link)

    def sooner(counts_s: Tensor) -> Tensor:
        # Of a sender some transports don't wait until its counts have come: then it has nothing to gain.
        return torch.maximum(counts_s - (before_s - after_s), torch.minimum(counts_s, after_s))

    entries = tuple(replace(entry, counts_s=sooner(entry.counts_s)) for entry in of.entries)
    return replace(of, link=link, entries=entries)


def _held_up_s(link: LinkCosts) -> Tensor:
    """Give how long (W,) each rank has to wait for what all send each other at once, be it ever so small."""
    assert link.each is not None
    latency_s = link.each.latency_s.clone().fill_diagonal_(0)
    return torch.maximum(latency_s.amax(0), latency_s.amax(1))


def without_slow_port(of: Conditions, rank: int) -> Conditions:
    def mended(port_s: Tensor) -> Tensor:
        port_s = port_s.clone()
        port_s[rank] = port_s.median()
        return port_s

    each, inside = of.each_link, of.each_link.inside
    if inside is not None:
        inside = replace(inside, out_s=mended(inside.out_s), in_s=mended(inside.in_s))
    each = replace(each, port_out_s=mended(each.port_out_s), port_in_s=mended(each.port_in_s), inside=inside)
    return replace(of, link=replace(of.link, each=each))


def without_slow_rank(of: Conditions, rank: int) -> Conditions:
    def mended(slowness: Tensor) -> Tensor:
        slowness = slowness.clone()
        slowness[rank] = 1.0
        return slowness

    slowness = {kind: mended(values) for kind, values in of.steps.slowness.items()}
    return replace(of, steps=replace(of.steps, slowness=slowness))


def without_late_rank(of: Conditions, rank: int) -> Conditions:
    def in_time(own_s: Tensor) -> Tensor:
        own_s = own_s.clone()
        own_s[rank] = own_s[rank].clamp(max=0)
        return own_s

    return replace(of, entries=tuple(replace(entry, own_s=in_time(entry.own_s)) for entry in of.entries))


def without_imbalance(of: Conditions) -> Conditions:
    """Let every rank send as much to every rank and compute as much, the same in all."""
    work = of.work
    rows, pairs = (torch.full_like(values, float(values.mean())) for values in (work.rows, work.pairs))
    return replace(of, work=replace(work, rows=rows, pairs=pairs))


def without_bandwidth(of: Conditions) -> Conditions:
    each, inside = of.each_link, of.each_link.inside
    nothing = torch.zeros_like(each.port_out_s)
    if inside is not None:
        inside = replace(inside, out_s=nothing, in_s=nothing)
    each = replace(each, port_out_s=nothing, port_in_s=nothing, link_s=torch.zeros_like(each.link_s), inside=inside)
    return replace(of, link=replace(of.link, bytes_per_s=float("inf"), each=each))


def without_latency(of: Conditions) -> Conditions:
    without = _with_latencies(of, torch.zeros_like(of.each_link.latency_s))
    return replace(without, link=replace(without.link, latency_s=0.0))


def without_chunk_overhead(of: Conditions) -> Conditions:
    """Let the fixed costs of all steps of a kind together be those of one."""
    counts = Counter(str(step.kind) for schedule in of.schedules for step in schedule)
    fixed = {kind: cost / max(1, counts[kind]) for kind, cost in of.steps.fixed_s.items()}
    return replace(of, steps=replace(of.steps, fixed_s=fixed))


def without_host_overhead(of: Conditions) -> Conditions:
    """Let every rank send its counts as it enters, and start its first step when it has heard from all."""

    def at_once(values: Tensor) -> Tensor:
        return torch.zeros_like(values)

    def counted(values: Tensor) -> Tensor:
        return torch.minimum(values, _held_up_s(of.link))

    entries = tuple(
        replace(
            entry,
            before_counts_s=at_once(entry.before_counts_s),
            before_steps_s=at_once(entry.before_steps_s),
            counts_s=counted(entry.counts_s),
        )
        for entry in of.entries
    )
    return replace(of, entries=entries, gap_s=0.0)


def without_contention(of: Conditions) -> Conditions:
    return replace(of, link=replace(of.link, contention=0.0))


def without_experts(of: Conditions) -> Conditions:
    def nothing(costs: dict[str, float]) -> dict[str, float]:
        return {kind: 0.0 if StepKind.named(kind).unit is Unit.PAIRS else cost for kind, cost in costs.items()}

    steps = of.steps
    return replace(of, steps=StepCosts(nothing(dict(steps.fixed_s)), nothing(dict(steps.unit_s))))
