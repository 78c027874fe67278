"""judge_recording: why the steps of a recording of this package's layers take so long, and what would help."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.doctor.advice import Advice, advice_on
from tritonmoe.tools.doctor.attribution import Verdict, attribute
from tritonmoe.tools.doctor.causes import Known
from tritonmoe.tools.doctor.costs import Costs, fit_costs
from tritonmoe.tools.doctor.graph import LinkFault
from tritonmoe.tools.doctor.messages import Messages, Reach, find_messages, reaches
from tritonmoe.tools.doctor.reading import ReadRun
from tritonmoe.tools.doctor.recorded_graph import RecordedGraph, graph_of
from tritonmoe.tools.doctor.recorded_steps import events_of
from tritonmoe.tools.doctor.samples import LEAST_S
from tritonmoe.tools.recording.call_recording import RecordedCall, Recording

__all__ = ["RecordedRun", "judge_recording", "known_of"]

SMALLEST_RATIO = 1.5
"""In a step alone a link is slow if its messages take so many times as long as in others ..."""
FAR_OUT = 4.5
"""... and so many standard deviations longer."""
QUARTER, TENTH = 0.674, 1.282
"""The quantiles of a normal distribution."""
MOST_TYPICAL = 0.6
"""Where a quarter of all links take less than that part of what is typical by the fit, it is not."""
ONE_LINK, ONE_PORT, ONE_NODE = 0.75, 0.8, 0.8
"""A link, port or node is at fault if it has so large a share of what slow links cost."""
ONE_WAY = 0.9
MOVING, MOVING_STEPS = 0.65, 3
"""A fault moves if in no larger part of so many costly steps it is the same one."""
AMONG = 0.25
"""Of several links those count that cost so large a share of what the worst one costs."""


@dataclass
class _Pass:
    """The messages of a pass, those of a reach."""

    place: int
    step: int
    exchanges: list[int]
    """Their numbers in the pass."""
    sent: Messages
    begun: Tensor


def linked_of(recording: Recording, built: RecordedGraph, costs: Costs) -> tuple[Tensor, LinkFault | None]:
    """Find what slow links cost in a recording whose messages fit these costs, and which they are.

    Returns:
        By how much each exchange takes longer (M,), of the graph's members. None for the links where none is slow, or
        it is not known when each rank's rows had arrived.
    """
    nothing = torch.zeros_like(built.end)
    each = costs.link.each
    if not costs.ratios.are_told_apart or each is None:
        return nothing, None
    size, node_size = recording.size, recording.node_size

    def passes_at(place: int) -> list[_Pass]:
        """Return the messages of a pass; those of all passes together are too many to be kept."""
        of, found = built.passes[place], []
        events = events_of(of.call.plan, of.of_ranks[0])
        posting = [events.events[number] for number in events.exchanges]
        for reach in reaches(node_size):
            is_inside = recording.has_two_levels and reach is Reach.INSIDE
            own = [
                number
                for number, event in enumerate(posting)
                if event.kind not in (None, StepKind.REPLICA_BACKWARD) and event.is_inside == is_inside
            ]
            if own:
                sent = find_messages(of.call, of.number, reach, node_size)
                begun = sent.begun(each.latency_s, recording.uses_rendezvous)
                found.append(_Pass(place, of.step, own, sent, begun))
        return found

    places, num_steps = range(len(built.passes)), len(built.graph.steps)
    took, due = (torch.zeros(num_steps, size, size, dtype=torch.float64, device="cpu") for _ in range(2))
    typical_s = _typical_byte_s(costs, size, node_size)
    for place in places:
        for one in passes_at(place):
            known = one.sent.are_known
            seconds = (one.sent.arrived - one.begun - each.latency_s).clamp(min=0)
            took[one.step] += torch.where(known, seconds, 0.0).sum(0)
            due[one.step] += torch.where(known, one.sent.port_bytes * typical_s, 0.0).sum(0)
    times = _times_of_bytes(took, due, costs)
    if not bool((times > 1).any()) and not bool((costs.ratios.excess_s > 0).any()):
        return nothing, None
    held_up_s = torch.zeros(num_steps, size, size, dtype=torch.float64, device="cpu")
    seconds, is_used = nothing.clone(), torch.zeros(size, size, dtype=torch.bool, device="cpu")
    for place in places:
        of_pass = passes_at(place)
        if of_pass:
            _mend(of_pass, times, costs, built, recording, seconds, held_up_s[of_pass[0].step])
        for one in of_pass:
            is_used |= one.sent.are_known.any(0)
    return seconds, _fault_of_steps(held_up_s, is_used, costs, recording)


def _times_of_bytes(took: Tensor, due: Tensor, costs: Costs) -> Tensor:
    """Return (S, W, W): how many times as long as usual a byte takes on each link in each step; 1 where it is usual.

    took, due: (S, W, W), how long each link's messages took in a step, and how long they would on a typical link.
    """
    ratios = costs.ratios
    is_known = due.amax(0) > 0
    if not bool(is_known.any()):
        return torch.ones_like(due)
    of_step = torch.where(due > 0, took / due.clamp(min=1e-12), torch.nan)
    logarithms = of_step[:, is_known].clamp(min=1e-6).log()
    low, quarter = (float(logarithms.nanquantile(part)) for part in (0.1, 0.25))
    noise = (quarter - low) / (TENTH - QUARTER)  # of those that are not slow, be they ever so few
    usual = math.exp(quarter + QUARTER * noise)
    if usual < MOST_TYPICAL:  # the fit is of links of which most were slow at times
        of_step = of_step / usual
        usual = 1.0
    limit = max(SMALLEST_RATIO, math.exp(FAR_OUT * noise))
    own = of_step.nanquantile(0.25, dim=0)
    at_times = is_known & (of_step > limit * own.clamp(min=usual))
    is_slow = (ratios.of_byte > 1) & (of_step > 1)
    times = torch.where(is_slow, of_step, torch.where(at_times, of_step / own.clamp(min=1.0), 1.0))
    return times.nan_to_num(nan=1.0).clamp(min=1.0)


def _typical_byte_s(costs: Costs, size: int, node_size: int | None) -> Tensor:
    """Return (W, W) what a byte takes on links and ports like most others."""
    each = costs.link.each_link
    found = torch.full((size, size), 1 / costs.link.bytes_per_s, dtype=torch.float64, device="cpu")
    if each.inside is None or node_size is None:
        return found
    is_inside = Reach.INSIDE.pairs(size, node_size)
    return torch.where(is_inside, torch.minimum(each.inside.out_s.median(), each.inside.in_s.median()), found)


def _mend(
    passes: Sequence[_Pass],
    times: Tensor,
    costs: Costs,
    built: RecordedGraph,
    recording: Recording,
    seconds: Tensor,
    held_up_s: Tensor,
) -> None:
    """Add what slow links cost in the exchanges of a pass, and which links hold ranks up there."""
    each, late_s = costs.link.each_link, costs.ratios.excess_s
    size = recording.size
    arrived: dict[int, Tensor] = {}
    mended: dict[int, Tensor] = {}
    for one in passes:
        took = (one.sent.arrived - one.begun).clamp(min=0)
        of_bytes = (took - each.latency_s).clamp(min=0)
        then_s = took - of_bytes * (1 - 1 / times[one.step]) - torch.minimum(late_s, took)
        before = torch.full((size, size), -torch.inf, dtype=torch.float64, device="cpu")
        for number, exchange in enumerate(one.exchanges):
            here, sent = one.sent.arrived[number], one.sent
            begun = torch.maximum(sent.posted[number], before - (each.latency_s - late_s))
            if recording.uses_rendezvous:
                begun = torch.where(here > sent.before[number].T, torch.maximum(begun, before.T), begun)
            then = torch.minimum(begun, one.begun[number]) + then_s[number]
            before = torch.where(here.isnan(), before, then)
            here, then = (of.nan_to_num(nan=-torch.inf) for of in (here, then))
            arrived[exchange] = torch.maximum(arrived[exchange], here) if exchange in arrived else here
            mended[exchange] = torch.maximum(mended[exchange], then) if exchange in mended else then
    place = passes[0].place
    events = events_of(built.passes[place].call.plan, built.passes[place].of_ranks[0])
    rank = torch.arange(size)
    ended: dict[bool, Tensor] = {}
    """By level, when the exchange before would have ended."""
    for exchange, number in enumerate(events.exchanges):
        event = events.events[number]
        members = built.first_member[place, exchange] + built.place_in_exchange(event, rank)
        posted, since, end = built.posted[members], built.since[members], built.end[members]
        if event.kind is None:  # a message that is late is so with counts too, for both of its ends
            seconds[members] = torch.minimum(torch.maximum(late_s.amax(0), late_s.amax(1)), (end - since).clamp(min=0))
            continue
        if exchange not in arrived:
            continue
        here, then = arrived[exchange], mended[exchange]
        waits_for_sent = end > here.amax(0) + LEAST_S
        last, sooner = (
            torch.where(waits_for_sent, torch.maximum(of.amax(0), of.amax(1)), of.amax(0)) for of in (here, then)
        )
        more = torch.where(last.isfinite(), torch.minimum(last, end) - sooner, 0.0).clamp(min=0).nan_to_num(nan=0.0)
        sooner = end - more
        since_then = torch.maximum(posted, ended.get(event.is_inside, posted))
        ended[event.is_inside] = torch.maximum(sooner, since_then)
        seconds[members] = (end - since) - (sooner - since_then).clamp(min=0)
        # What only waits for a slow link's word, in the other direction, is not slow itself.
        is_slow = (times[passes[0].step] > 1) | (late_s > 0)
        held_up_s += torch.where(is_slow & (here > then), (here - torch.maximum(then, since)).clamp(min=0), 0.0)


def _fault_of_steps(held_up_s: Tensor, is_used: Tensor, costs: Costs, recording: Recording) -> LinkFault | None:
    """Return which end of which links is slow, without links or ranks where they change from step to step."""
    totals = held_up_s.sum((1, 2))
    costly = [step for step, total in enumerate(totals.tolist()) if total > 0.5 * float(totals.max())]
    if not costly:
        return None
    fault = _fault_of(held_up_s.sum(0), is_used, costs, recording)
    of_steps = [_fault_of(held_up_s[step], is_used, costs, recording) for step in costly]
    ranks, count = Counter(one.ranks for one in of_steps).most_common(1)[0]
    if len(of_steps) < MOVING_STEPS or count > MOVING * len(of_steps) or set(fault.ranks) == set(ranks):
        return fault
    (kind, _), *_ = Counter(one.kind for one in of_steps).most_common(1)
    return LinkFault(kind, (), (), "")


def _is_whole_port(is_slow: Tensor, rank: int, is_used: Tensor, node_size: int | None) -> bool:
    """Return whether most links out of a rank, or most into it, are slow: those inside its node, or all others."""
    if int(is_slow[rank].sum() + is_slow[:, rank].sum()) < 2:
        return False
    node_size = node_size or len(is_slow)
    is_near = torch.arange(len(is_slow), device="cpu") // node_size == rank // node_size
    return any(
        int((slow & reach).sum()) > int((used & reach).sum()) / 2
        for slow, used in ((is_slow[rank], is_used[rank]), (is_slow[:, rank], is_used[:, rank]))
        for reach in (is_near, ~is_near)
    )


def _fault_of(held_up_s: Tensor, is_used: Tensor, costs: Costs, recording: Recording) -> LinkFault:
    """Return which end of which links is slow, by how long (W, W) rows from rank i have held up rank k."""
    total, size = float(held_up_s.sum()), len(held_up_s)
    ratios = costs.ratios
    of_links = held_up_s.tolist()
    by_cost = sorted(held_up_s.nonzero().tolist(), key=lambda link: -of_links[link[0]][link[1]])
    sender, receiver = by_cost[0]
    if float(held_up_s[sender, receiver]) < ONE_LINK * total and size > 2:
        out, into = held_up_s.sum(1), held_up_s.sum(0)
        ports = out + into
        rank = int(ports.argmax())
        if float(ports[rank]) >= ONE_PORT * total and _is_whole_port(
            held_up_s >= AMONG * held_up_s.max(), rank, is_used, recording.node_size
        ):
            one_way = "out of its port" if float(out[rank]) > ONE_WAY * total else "into its port"
            is_one_way = max(float(out[rank]), float(into[rank])) > ONE_WAY * total
            ways = one_way if is_one_way else "through its port, both ways,"
            return LinkFault("slow port", (), (rank,), f"moves bytes {ways} more slowly than other ranks")
        node_size = recording.node_size
        if node_size is not None and recording.size > 2 * node_size:
            own = [slice(first, first + node_size) for first in range(0, size, node_size)]
            nodes = ports.view(-1, node_size).sum(1) - torch.stack([held_up_s[of, of].sum() for of in own])
            node = int(nodes.argmax())
            if float(nodes[node]) >= ONE_NODE * total:
                ranks = tuple(range(node * node_size, (node + 1) * node_size))
                words = "share a node that exchanges bytes with other nodes more slowly than those do"
                return LinkFault("slow port", (), ranks, words)
    worst = float(held_up_s[sender, receiver])
    links = tuple((i, k) for i, k in by_cost if of_links[i][k] >= AMONG * worst)
    is_late = all(float(ratios.excess_s[i, k]) > 0 and float(ratios.link[i, k]) <= 1 for i, k in links)
    ranks = tuple(dict.fromkeys(rank for link in links for rank in link))
    return LinkFault("late link" if is_late else "slow link", links, ranks, "")


MOST_FITTED = 24
"""Costs are fitted to so many calls, spread over the recording."""


@dataclass(kw_only=True)
class RecordedRun(ReadRun):
    """A recording, and why its steps take as long as they do."""

    recording: Recording
    built: RecordedGraph
    costs: Costs
    """What steps and exchanges cost, by the calls below."""
    calls: tuple[RecordedCall, ...]
    found: Verdict
    advice: list[Advice]
    """What would help, by its gain."""


def judge_recording(recording: Recording) -> RecordedRun:
    """Find why the steps of a recording take as long as they do.

    Raises:
        ValueError: there is no call that all ranks have recorded, or only one rank.
    """
    built = graph_of(recording)
    known = known_of(recording, built)
    found = attribute(built.graph, known)
    limits, advice = [*built.notes, *recording.notes, *known.costs.notes], list[Advice]()
    if bool(built.graph.tables.load_s.any()):
        limits.append(
            "experts are read from files: what would help is not known, and lanes are replayed without these waits"
        )
    elif any(call.part for call in known.calls):
        limits.append("calls run in parts (memory_budget_bytes): what would help such calls is not known")
    else:
        advice = advice_on(recording, known.calls, known.costs, known.share * found.replayed_s, found.exposed_s)
    return RecordedRun(
        recording.path, built.graph, {"recording": recording.size}, "recording",
        limits, recording=recording, built=built, costs=known.costs, calls=known.calls, found=found, advice=advice,
    )  # fmt: skip


def known_of(recording: Recording, built: RecordedGraph) -> Known:
    """Find what is known of a recording beside its graph, and which links are slow, which the graph gets."""
    calls, share = _fitted_calls(built)
    costs = fit_costs(calls, recording)
    built.graph.linked_s, built.graph.fault = linked_of(recording, built, costs)
    return Known(built.step_s, built, costs, tuple(calls), share)


def _fitted_calls(built: RecordedGraph) -> tuple[list[RecordedCall], float]:
    """Return calls to fit costs to, of the layers' sizes and plan that take most time, and the share they take."""
    seconds: dict[tuple, float] = defaultdict(float)
    calls: dict[tuple, dict[int, RecordedCall]] = defaultdict(dict)
    for of in built.passes:
        call = of.call
        row_bytes = call.row_bytes, call.gradient_row_bytes, call.other_row_bytes
        key = (*call.sizes.values(), *row_bytes, call.has_backward, of.work)
        calls[key][call.sequence] = call
        seconds[key] += max(one.end for one in of.of_ranks) - min(one.entered for one in of.of_ranks)
    most = max(seconds, key=lambda key: seconds[key])
    found = list(calls[most].values())
    every = max(1, len(found) // MOST_FITTED) | 1  # odd: layers follow each other
    return found[::every], seconds[most] / sum(seconds.values())
