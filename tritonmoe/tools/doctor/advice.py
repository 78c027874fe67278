"""Advice: changes of a recorded run that the walk says would make its step shorter, and what each of them costs."""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, most_copies
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.plans.copies.copy_planner import CopyCosts, is_uneven, plan_copies
from tritonmoe.overlap.schedule import Schedule
from tritonmoe.overlap.simulation.cost_model import (
    CopyWork,
    EachLink,
    InsidePorts,
    LayerWork,
    backward_with,
    forward_with,
    gradient_parts,
)
from tritonmoe.overlap.simulation.simulator import MOST_LAYERS
from tritonmoe.overlap.steps import StepKind
from tritonmoe.overlap.tuning.search import search
from tritonmoe.tools.doctor.attribution import Cost
from tritonmoe.tools.doctor.conditions import (
    Conditions,
    Halves,
    Nodes,
    PassesBefore,
    conditions_of,
    measured_s,
    passes_before,
    walk,
    with_plan,
)
from tritonmoe.tools.doctor.costs import Costs, fit_costs
from tritonmoe.tools.recording.call_recording import RecordedCall, Recording, by_layer
from tritonmoe.transports.wire import WireFormat

__all__ = ["Advice", "advice_on", "setting_of"]

SMALLEST_SHARE = 0.03
"""Advice that gains a smaller share is not given."""
MOST_ERROR = 0.10
"""Calls that the walk is further off than this give no advice."""
MOST_WALKED = 6
"""So many calls are walked with each change, spread over layers and over the recording."""
NUM_SELECTIONS = 5
"""So many selections of the calls, drawn with replacement, tell how certain costs are ..."""
WALKED_OF_SELECTION = 2
NUM_DRAWN = 200
"""... and so many how much calls differ."""
INTERVAL = 0.8
FEW_CALLS = 3
PLANNING_S = 2e-3
"""What a call takes longer for being planned again, measured beside others on a CPU."""


@dataclass(frozen=True)
class Advice:
    """Something that would help."""

    words: str
    costs: str
    """What it costs, beside the work of doing it; empty where nothing is known."""
    gain: Cost
    """Seconds of a step."""


@dataclass(frozen=True)
class Proposal:
    """Something to change in a run."""

    words: str
    costs: str
    """What it costs, beside the work of doing it; empty where nothing is known."""
    change: Callable[[Conditions], Conditions]
    sends_less: bool = False
    """Whether it changes how long rows travel, and nothing else."""


def advice_on(
    recording: Recording, calls: Sequence[RecordedCall], costs: Costs, step_s: float, exposed_s: float
) -> list[Advice]:
    """Return what would help in a recording, whose calls like these take step_s in a step; each gain is above zero.

    calls: those that the costs were fitted to.
    exposed_s: what a step would save if rows travelled in no time. Costs that are fitted to noise may promise more.
    """
    if any(call.half for call in calls):
        return []  # the times of each half hold the other one's work
    before = passes_before(recording)
    walked = _spread(sorted(calls, key=lambda call: call.layer), MOST_WALKED)
    conditions = [conditions_of(call, before, costs) for call in walked]
    was_s = [walk(of).total_s for of in conditions]
    errors = [was / max(1e-9, measured_s(call, before)) - 1 for call, was in zip(walked, was_s, strict=True)]
    if abs(statistics.median(errors)) > MOST_ERROR:
        return []
    draw = random.Random(0)
    selections = []
    for _ in range(NUM_SELECTIONS if len(calls) >= FEW_CALLS else 0):
        selection = draw.choices(calls, k=len(calls))
        own = fit_costs(selection, recording)
        few = [conditions_of(call, before, own) for call in _spread(selection, WALKED_OF_SELECTION)]
        selections.append([(of, walk(of).total_s) for of in few])
    found = []
    for proposal in _proposals(calls, conditions[0], before):
        shares = [_gained(of, was, proposal) for of, was in zip(conditions, was_s, strict=True)]
        if statistics.fmean(shares) < SMALLEST_SHARE:
            continue
        by_costs = [statistics.fmean(_gained(of, was, proposal) for of, was in own) for own in selections]
        means = [statistics.fmean(draw.choices(shares, k=len(shares))) for _ in range(NUM_DRAWN)]
        # What is not known of the costs, and what differs from call to call, both move the gain.
        aside = statistics.fmean(by_costs) if by_costs else 0.0
        drawn = sorted(mean + (draw.choice(by_costs) - aside if by_costs else 0.0) for mean in means)
        out = int(NUM_DRAWN * (1 - INTERVAL) / 2)
        most_s = exposed_s if proposal.sends_less else float("inf")
        gain = Cost(*(min(share * step_s, most_s) for share in (statistics.fmean(shares), drawn[out], drawn[-1 - out])))
        if gain.low_s > 0 and gain.seconds >= SMALLEST_SHARE * step_s:
            found.append(Advice(proposal.words, proposal.costs, gain))
    return sorted(found, key=lambda one: -one.gain.seconds)


def _gained(of: Conditions, was_s: float, proposal: Proposal) -> float:
    return (was_s - walk(proposal.change(of)).total_s) / was_s if was_s else 0.0


def _spread(calls: Sequence[RecordedCall], count: int) -> list[RecordedCall]:
    """Return so many calls, evenly spread."""
    if len(calls) <= count:
        return list(calls)
    return [calls[(2 * n + 1) * len(calls) // (2 * count)] for n in range(count)]


def _proposals(calls: Sequence[RecordedCall], typical: Conditions, before: PassesBefore) -> Iterator[Proposal]:
    """Return what could be changed; whether it helps is for the walk to say.

    typical: the conditions of one of the calls.
    """
    yield from _other_plan(typical)
    yield from _narrower_rows(calls[0])
    yield from _other_placement(calls)
    yield from _copies(calls, typical)
    yield from _other_levels(calls[0], typical)
    yield from _fewer_ranks(typical)
    yield from _two_batches(calls, typical, before)


def _other_plan(typical: Conditions) -> Iterator[Proposal]:
    """Propose the plan that the tuner's search finds for these costs."""
    plan = typical.plan
    config = OverlapConfig(
        local_first=plan.local_first, wire_dtype=plan.wire_dtype, chunk_by=plan.chunk_by, capacity=plan.capacity
    )
    has_backward = len(typical.schedules) > 1
    found = search(config, typical.walked_work, typical.steps, typical.walked_link, backward=has_backward)
    best = replace(found[0][1], wire_dtype=plan.wire_dtype, capacity=plan.capacity)
    if best != plan:
        yield Proposal(f"{setting_of(best)}: {best}", "", lambda of: with_plan(of, best))


def setting_of(plan: OverlapPlan) -> str:
    """Return what gives a layer this plan, as Python."""
    values = ((of.name, getattr(plan, of.name)) for of in fields(plan) if getattr(plan, of.name) != of.default)
    return f"overlap=OverlapPlan({', '.join(f'{name}={value!r}' for name, value in values)})"


def _two_batches(calls: Sequence[RecordedCall], typical: Conditions, before: PassesBefore) -> Iterator[Proposal]:
    """Propose to run two halves of a batch at once, where it is known what else the model computes."""
    beside_s = tuple(_beside_s(calls, number, before) for number in range(len(typical.schedules)))
    if all(seconds > 0 for seconds in beside_s):
        num_layers = min(MOST_LAYERS, len({call.layer for call in calls}))
        halves = Halves(tuple(seconds / 2 for seconds in beside_s), num_layers)
        words = "tritonmoe.two_batches: each half of a batch computes during the other half's exchanges"
        yield Proposal(words, "every rank needs two sequences or more", lambda of: replace(of, halves=halves))


def _beside_s(calls: Sequence[RecordedCall], number: int, before: PassesBefore) -> float:
    """Return what lies between the passes of this number of one layer and the next, 0 where they don't follow.

    Of a recompute between two backwards the pass of the layer itself is left out.
    """
    found = []
    for call in calls:
        chain = [(call, number)]  # back in time
        while (earlier := before.get((chain[-1][0].sequence, chain[-1][1]))) is not None:
            chain.append(earlier)
            if number == 0 or earlier[1] == 1 or not earlier[0].is_recompute:
                break
        last, number_of_last = chain[-1]
        if number_of_last != number or last.layer == call.layer:
            continue
        for passes in zip(*(of.by_pass[which] for of, which in chain), strict=True):
            found.append(sum(later.entered - ended.end for later, ended in pairwise(passes)))
    return statistics.median(found) if found else 0.0


def _narrower_rows(call: RecordedCall) -> Iterator[Proposal]:
    """Propose the wire formats that send fewer bytes."""
    if call.plan.wire_dtype is not None or call.gradient_row_bytes != call.other_row_bytes:
        return  # in an ExpertPrecision, too, rows have a wire format
    width = call.sizes["hidden_size"]
    dtype = {4: torch.float32, 2: torch.bfloat16}.get(call.row_bytes // max(1, width))
    for wire_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        if dtype is None or wire_dtype == dtype:
            continue
        row_bytes = WireFormat(dtype, wire_dtype).row_bytes(width)
        other = row_bytes if wire_dtype == torch.bfloat16 else call.other_row_bytes
        where = "all rows" if wire_dtype == torch.bfloat16 else "dispatched rows"
        name = str(wire_dtype).removeprefix("torch.")

        def narrower(of: Conditions, row_bytes: int = row_bytes, other: int = other) -> Conditions:
            work = replace(of.work, row_bytes=row_bytes, other_row_bytes=other, gradient_row_bytes=other)
            return replace(of, work=work)

        yield Proposal(f"wire_dtype=torch.{name}", f"{where} are rounded", narrower, sends_less=True)


def _copies(calls: Sequence[RecordedCall], typical: Conditions) -> Iterator[Proposal]:
    """Propose copies of hot experts.

    A recording has the pairs of every expert, and those from each rank to each other, but not both at once: a rank's
    pairs are taken to be of another's experts in the shares in which all ranks' are.
    """
    size, slots, plan = len(calls[0].ranks), _slots_of(calls), typical.plan
    is_refused = plan.capacity is not None or plan.chunk_by != "tokens" or typical.nodes is not None
    is_even = not any(is_uneven(call.work.pairs.sum(0).int().tolist()) for call in calls)
    if not slots or is_refused or size == 1 or is_even:
        return
    by_work = {id(call.work): call for call in calls}

    def with_copies(of: Conditions) -> Conditions:
        call = by_work.get(id(of.work))
        return of if call is None else _with_copies(of, call)

    words = 'copies of hot experts for each call: OverlapConfig(balance="auto")'
    price = (
        f"each rank keeps up to {most_copies('auto', slots)} more experts of every layer in memory until the backward"
    )
    yield Proposal(words, price, with_copies)


def _slots_of(calls: Sequence[RecordedCall]) -> int:
    """Return how many experts each rank holds, 0 where that differs."""
    slots = {len(of.pairs_per_expert) for call in calls for of in call.ranks}
    return slots.pop() if len(slots) == 1 else 0


def _with_copies(of: Conditions, call: RecordedCall) -> Conditions:
    """Return a call as it would be with the copies that the planner makes for it; as it is where there are none."""
    costs = _costs(of, call)
    held = most_copies("auto", len(call.ranks[0].pairs_per_expert))
    copies = plan_copies(_counts(call), of.work.rows.long(), of.work.top_k, held, costs).copies
    if copies is None:
        return of
    first, *others = of.entries
    work = _work(of.work, copies, costs)
    return replace(
        of,
        work=work,
        steps=of.steps.with_copies(),
        schedules=tuple(_schedule(schedule, of.plan, work.copies) for schedule in of.schedules),
        entries=(replace(first, before_steps_s=first.before_steps_s + PLANNING_S), *others),
    )


def _counts(call: RecordedCall) -> Tensor:
    """Return (W, slots) int64: about how many pairs each rank's tokens have of each expert."""
    loads = torch.tensor([list(of.pairs_per_expert) for of in call.ranks], dtype=torch.float64, device="cpu")
    shares = loads / loads.sum(1, keepdim=True).clamp(min=1)
    return (call.work.pairs[:, :, None] * shares).round().long().flatten(1)


def _costs(of: Conditions, call: RecordedCall) -> CopyCosts:
    """Return what the planner is told; experts are taken to be gated, and their weights as wide as rows."""
    unit_s, work = of.steps.unit_s, of.work
    width, inner = call.sizes["hidden_size"], call.sizes["intermediate_size"]
    element_bytes = (work.other_row_bytes or work.row_bytes) // max(1, width)
    expert_bytes = 3 * width * inner * max(1, element_bytes)
    backward_s = unit_s.get(StepKind.EXPERTS_BACKWARD, 0.0) + unit_s.get(StepKind.WEIGHT_GRAD, 0.0)
    each = of.link.each_link
    byte_s = max(float(seconds.max()) for seconds in (each.port_out_s, each.port_in_s, each.link_s))
    return CopyCosts(
        forward_fs=round(unit_s.get(StepKind.EXPERTS, 0.0) * 1e15),
        backward_fs=round(backward_s * 1e15) if len(of.schedules) > 1 else 0,
        byte_fs=round(byte_s * 1e15),
        call_fs=round(PLANNING_S * 1e15),
        row_bytes=work.row_bytes,
        gradient_row_bytes=work.bytes_per_row(StepKind.COMBINE_BACKWARD),
        other_row_bytes=work.bytes_per_row(StepKind.COMBINE),
        expert_bytes=expert_bytes,
        gradient_bytes=expert_bytes if unit_s.get(StepKind.WEIGHT_GRAD) else 0,
    )


def _work(work: LayerWork, copies: ExpertCopies, costs: CopyCosts) -> LayerWork:
    """Return what is sent and computed with copies: a pair takes its part of a row to the copy's rank."""
    rows, pairs = work.rows.clone(), work.pairs.clone()
    tokens = work.pairs.sum(1) / max(1, work.top_k)
    of_pair = work.rows / work.pairs.clamp(min=1)
    new = (1 - work.rows / tokens.clamp(min=1)[:, None]).clamp(min=0)
    for copy in copies.copies:
        owner, moved = copies.owner(copy), torch.tensor(copy.pairs, dtype=torch.float64, device="cpu")
        pairs[:, owner] -= moved
        pairs[:, copy.rank] += moved
        rows[:, owner] -= moved * of_pair[:, owner]
        rows[:, copy.rank] += moved * new[:, copy.rank]
    copied = CopyWork(
        torch.tensor(copies.sent_copies, dtype=torch.float64, device="cpu"),
        torch.tensor(copies.copy_pairs, dtype=torch.float64, device="cpu"),
        costs.expert_bytes,
        gradient_parts(costs.gradient_bytes),
        relayed=copies.relayed if copies.are_relayed else None,
    )
    return replace(work, rows=rows.clamp(min=0), pairs=pairs.clamp(min=0), copies=copied)


def _schedule(schedule: Schedule, plan: OverlapPlan, copies: CopyWork | None) -> Schedule:
    """Return the schedule of a pass with copies."""
    kinds = [step.kind for step in schedule]
    if StepKind.METADATA in kinds:
        return forward_with(copies, plan, kinds.count(StepKind.FILLER))
    return backward_with(copies, plan, StepKind.DISPATCH_BACKWARD in kinds, StepKind.ROUTING_BACKWARD in kinds)


def _other_placement(calls: Sequence[RecordedCall]) -> Iterator[Proposal]:
    """Propose to spread the experts of each layer by their load, and to give hot ones replicas in one more slot."""
    size, slots = len(calls[0].ranks), _slots_of(calls)
    if not slots:
        return
    loads = {
        layer: torch.tensor([[of.pairs_per_expert for of in call.ranks] for call in of_layer], device="cpu").sum(0)
        for layer, of_layer in by_layer(calls).items()
    }
    of_each = "" if len(loads) == 1 else ", for each layer by its own load"
    # Replicas need one level.
    for num_slots in (slots,) if calls[0].levels is not None else (slots, slots + 1):
        if num_slots > size * slots:
            continue
        placements = {layer: ExpertPlacement.balanced(load.flatten(), size, num_slots) for layer, load in loads.items()}
        shares = {layer: _share_after(load, placements[layer]) for layer, load in loads.items()}

        def placed(of: Conditions, shares: Mapping[int, torch.Tensor] = shares) -> Conditions:
            # Rows follow their pairs: how many tokens need two experts of one rank is not known.
            work = of.work.scaled(shares[of.layer])
            return replace(of, work=work if of.plan.capacity is None else replace(work, rows=of.work.rows))

        if num_slots == slots:
            words = (
                f"another placement{of_each}: tritonmoe.rebalance(model, optimizer), or ExpertPlacement.balanced(load)"
            )
            yield Proposal(words, "experts and their optimizer state move between ranks once", placed)
        else:
            layer = max(loads, key=lambda layer: float(loads[layer].max() / loads[layer].sum().clamp(min=1)))
            hot, where = int(loads[layer].argmax()), f"in layer {layer} " if of_each else ""
            copies = sum(hot in of for of in placements[layer].experts_of_rank)
            balanced = f"ExpertPlacement.balanced(load, {size}, num_slots={num_slots}){of_each}"
            words = f"replicas: {balanced}, {where}the expert of slot {hot} on {copies} ranks"
            costs = (
                "each rank needs the memory of one more expert, and gradients of replicas are summed; over "
                "torch.distributed, only expert_parallel_mlp with parameters of your own trains replicas"
            )
            yield Proposal(words, costs, placed)


def _share_after(load: torch.Tensor, placement: ExpertPlacement) -> torch.Tensor:
    """Return (W,) how many times as many pairs each rank computes with a placement, of the load (W, L) of its slots."""
    ranks = placement.experts_of_rank
    copies = torch.tensor([sum(slot in of for of in ranks) for slot in range(load.numel())], device="cpu")
    of_copy = load.flatten().to(torch.float64) / copies
    return torch.stack([of_copy[list(of)].sum() for of in ranks]) / load.sum(1).clamp(min=1)


def _other_levels(call: RecordedCall, typical: Conditions) -> Iterator[Proposal]:
    """Propose one level instead of two, or two instead of one where it is known which ranks are neighbours."""
    plan, inside = typical.plan, typical.link.each_link.inside
    if typical.nodes is not None:
        yield Proposal(
            "one level: a transport over all ranks instead of a TwoLevelTransport",
            "",
            lambda of: replace(of, nodes=None),
        )
    elif inside is not None and plan.chunk_by == "tokens" and plan.capacity is None:
        node_size, row_bytes = inside.node_size, call.inside_row_bytes

        def over_nodes(of: Conditions) -> Conditions:
            by_node = of.work.rows.view(of.work.size, -1, node_size)
            to_nodes = _needing_any(list(by_node.unbind(2)), _tokens(of.work), of.work.top_k)
            return replace(of, nodes=Nodes.of(to_nodes, of.work, row_bytes))

        words = f"two levels: TwoLevelTransport with node_size={node_size}, which sends a token once to each node"
        yield Proposal(words, "rows are packed and summed a second time", over_nodes)


def _tokens(work: LayerWork) -> torch.Tensor:
    """Return the tokens (W, 1) of every rank, as its pairs tell."""
    return work.pairs.sum(1, keepdim=True) / work.top_k


def _needing_any(needed: Sequence[torch.Tensor], tokens: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return how many tokens need any of several owners, each of which so many of them need.

    Each of a token's experts is one of the first owner's, of the second's and so on, as often as these numbers say.
    """
    is_elsewhere = torch.ones_like(needed[0])
    for rows in needed:
        share = (rows / tokens.clamp(min=1)).clamp(max=1)
        is_elsewhere = is_elsewhere - (1 - (1 - share) ** (1 / top_k))
    return tokens * (1 - is_elsewhere.clamp(min=0) ** top_k)


def _fewer_ranks(typical: Conditions) -> Iterator[Proposal]:
    """Propose to spread the experts over half as many ranks, so that both halves of the ranks have all of them."""
    size, inside = typical.work.size, typical.link.each_link.inside
    are_whole_nodes = inside is None or inside.node_size % (size // 2) == 0 or size // 2 % inside.node_size == 0
    if size >= 4 and size % 2 == 0 and are_whole_nodes:
        yield Proposal(
            f"expert parallelism over {size // 2} ranks instead of {size}",
            "each rank needs twice the memory for experts; the gain doesn't include the time to sum their gradients "
            "over both groups",
            lambda of: max((_on_half(of, half) for half in range(2)), key=lambda half: walk(half).total_s),
        )


def _on_half(of: Conditions, number: int) -> Conditions:
    """Return the call of the first half of the ranks (0) or the other (1), which also own what the other half owned."""
    work, half = of.work, of.work.size // 2
    halves = slice(0, half), slice(half, None)
    ranks = halves[number]
    tokens = _tokens(work)[ranks]
    rows = _needing_any([work.rows[ranks, owners] for owners in halves], tokens, work.top_k)
    pairs = work.pairs[ranks, halves[0]] + work.pairs[ranks, halves[1]]
    each, inside = of.link.each_link, of.link.each_link.inside
    link = EachLink(
        each.port_out_s[ranks], each.port_in_s[ranks], each.link_s[ranks, ranks], each.latency_s[ranks, ranks]
    )
    nodes = of.nodes
    if inside is not None and half > inside.node_size:
        link = replace(link, inside=InsidePorts(inside.node_size, inside.out_s[ranks], inside.in_s[ranks]))
    elif inside is not None:  # they are all of one node
        link, nodes = replace(link, port_out_s=inside.out_s[ranks], port_in_s=inside.in_s[ranks]), None
    if nodes is not None:
        to_nodes = nodes.rows_of(work)[ranks].chunk(2, 1)
        fewer = replace(work, rows=rows, pairs=pairs)
        nodes = Nodes.of(_needing_any(to_nodes, tokens, work.top_k), fewer, nodes.row_bytes)
    return replace(
        of,
        work=replace(work, rows=rows, pairs=pairs),
        nodes=nodes,
        entries=tuple(entry.on(ranks) for entry in of.entries),
        steps=replace(of.steps, slowness={kind: values[ranks] for kind, values in of.steps.slowness.items()}),
        link=replace(of.link, each=link),
    )
