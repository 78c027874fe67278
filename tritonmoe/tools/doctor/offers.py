"""What would help a run of any trainer: changes that a walk of its graph says would make its steps shorter."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan, candidate_sizes
from tritonmoe.overlap.schedule import build_forward
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import simulate
from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.doctor.advice import Advice, setting_of
from tritonmoe.tools.doctor.attribution import Cost
from tritonmoe.tools.doctor.culprits import Replays
from tritonmoe.tools.doctor.graph import Graph, Key, Kind, Member, indices
from tritonmoe.tools.doctor.samples import fit_relative_line
from tritonmoe.tools.doctor.usual import usual_of
from tritonmoe.tools.doctor.walk import walker_of
from tritonmoe.tools.recording.call_recording import node_size_of

__all__ = ["Offers", "layers_of", "node_bytes", "offers_of"]

LEAST_SHARE = 0.01
"""A smaller gain is not spoken of."""
MOST_WALKED = 120
"""So many passes are simulated; of more, those of some steps, evenly spread."""
UNLIKE_ROWS = 1.2
"""What a chunk costs beside its rows is known where ranks and steps have rows so many times as many as others."""
CHUNK_SHARE = 0.0, 0.05, 0.15
"""Where it is not known, one more chunk costs at least, as expected and at most such a share of the experts' time."""
CONTENTION = 0.0, 0.0, 0.1
"""So large a share of its speed compute may lose beside an exchange."""
BEST, EXPECTED, WORST = range(3)
RATE = 1e9
FP8_SCALES = 1 + 4 / 128
"""Rows in fp8 have a scale in fp32 for each 128 numbers."""
EARLY = 0.1
"""Of the times that bound what a byte takes, all but this part are longer."""
MOVING_ALL = ("all_reduce", "all_gather", "reduce_scatter")
"""Exchanges in which every rank moves at least the bytes that a file gives it, but for its own share."""
ALIKE = 0.02
"""What comes home is what was sent, up to so small a share."""
LEAST_RATIO, MOST_RATIO = 0.24, 4.1
"""Rows may travel home in another format, but ids that go to the same ranks are no rows."""
HIDDEN = 0.2
"""An exchange beside which so large a share of its time is computed is overlapped already."""


@dataclass(frozen=True)
class LayerPass:
    """One pass of one layer in one step: an all-to-all, what ranks compute with its rows, and the all-to-all back."""

    key: Key
    """Of the first exchange."""
    step: int
    there: tuple[int, ...]
    """Members of the exchange that brings rows to the experts, by their ranks in the group."""
    back: tuple[int, ...]
    compute_s: tuple[float, ...]
    """What each rank computes between them."""
    sent: tuple[tuple[int, ...], ...]
    """Bytes from rank i of the group to rank k."""
    is_overlapped: bool
    """Whether something is computed beside the exchanges already."""

    @property
    def phase(self) -> str:
        return str(self.key[0])


@dataclass
class _Visit:
    """An exchange as one rank goes through it."""

    member: int
    beside_s: float
    """What the rank computes between handing it over and waiting for it."""
    after_s: float = 0.0
    """What it computes from when the rows are there until the next exchange of rows."""
    is_waited_for: bool = False
    is_last: bool = False
    """Whether it waits for something else before it hands over the next exchange of rows."""


def layers_of(graph: Graph) -> list[LayerPass]:
    """Return the passes of layers of which all ranks and all splits are known; none where that is not so."""
    rows = [index for index, member in enumerate(graph.members) if _has_rows(graph, index) and member.sent]
    if not rows:
        return []
    known = set(rows)
    by_rank = [list(_visits(graph, rank, known)) for rank in range(len(graph.ranks))]
    following: dict[int, int] = {}
    visits: dict[int, _Visit] = {}
    for of_rank in by_rank:
        visits |= {visit.member: visit for visit in of_rank}
        following |= {visit.member: after.member for visit, after in pairwise(of_rank)}
    found = []
    taken: set[int] = set()
    for members in _in_order(graph, by_rank):
        exchange = graph.members[members[0]].exchange
        if exchange in taken:
            continue
        back = [following.get(one, -1) for one in members]
        if min(back) < 0 or len({graph.members[one].exchange for one in back}) > 1:
            continue
        if not _comes_home(graph, members, back) or any(visits[one].is_last for one in members):
            continue
        if not all(visits[one].is_waited_for for one in members):
            continue
        taken |= {exchange, graph.members[back[0]].exchange}
        beside_s = sum(visits[one].beside_s for one in (*members, *back))
        transfers_s = sum(graph.members[one].transfer_s for one in (*members, *back))
        first = graph.members[members[0]]
        compute_s = tuple(visits[one].after_s for one in members)
        sent = tuple(graph.members[one].sent or () for one in members)
        is_overlapped = beside_s > HIDDEN * transfers_s
        found.append(LayerPass(first.key, first.step, tuple(members), tuple(back), compute_s, sent, is_overlapped))
    return found


def _has_rows(graph: Graph, index: int) -> bool:
    """Return whether this is an all-to-all of a group whose ranks are all there, with all splits."""
    member = graph.members[index]
    members = graph.exchanges[member.exchange]
    return (
        "all_to_all" in member.key
        and member.sent is not None
        and member.received is not None
        and len(members) == len(member.sent)
        and len(members) > 1
        and all(graph.members[one].sent is not None for one in members)
        and sum(member.sent) + sum(member.received) > 0
    )


def _visits(graph: Graph, rank: int, known: set[int]) -> Iterator[_Visit]:
    """Go through a rank's program; give its exchanges of rows in order."""
    open_visits: dict[int, _Visit] = {}
    last: _Visit | None = None
    computed_s = 0.0
    for kind, index in graph.programs[rank]:
        if kind == Kind.RUN:
            run = graph.runs[index]
            computed_s += run.busy_s + run.idle_s
            if last is not None and last.is_waited_for:
                last.after_s += run.busy_s + run.idle_s
        elif kind == Kind.POST and index in known:
            if last is not None:
                yield last
            last = open_visits[index] = _Visit(index, -computed_s)
        elif kind == Kind.WAIT:
            if index in open_visits:
                visit = open_visits.pop(index)
                visit.beside_s += computed_s
                visit.is_waited_for = True
            elif last is not None and last.is_waited_for:
                last.is_last = True
        elif kind == Kind.STEP and last is not None:
            last.is_last = True
    for visit in open_visits.values():
        visit.beside_s += computed_s
    if last is not None:
        yield last


def _in_order(graph: Graph, by_rank: Sequence[Sequence[_Visit]]) -> Iterator[list[int]]:
    """Yield the members of each exchange of rows, in the order in which the first of its ranks comes to them."""
    seen: set[int] = set()
    for visit in chain.from_iterable(by_rank):
        exchange = graph.members[visit.member].exchange
        if exchange not in seen:
            seen.add(exchange)
            yield sorted(graph.exchanges[exchange], key=lambda one: graph.members[one].rank)


def _comes_home(graph: Graph, there: Sequence[int], back: Sequence[int]) -> bool:
    """Return whether each rank sends back what it has received, in this or another format."""
    received = [graph.members[one].received or () for one in there]
    sent = [graph.members[one].sent or () for one in back]
    total, total_back = (sum(map(sum, of)) for of in (received, sent))
    if not total or not LEAST_RATIO <= total_back / total <= MOST_RATIO:
        return False
    pairs = zip(chain.from_iterable(sent), chain.from_iterable(received), strict=True)
    return sum(abs(own - total_back / total * of) for own, of in pairs) <= ALIKE * total_back


class NodeBytes(NamedTuple):
    """Bytes of the busiest port of a layer's exchange, as it is and on two levels.

    On two levels a token goes once to each host that has any of its experts, and from there to their ranks. No trace
    says which tokens need several experts of a host: so there are bounds. A rank sends a host no more rows than it has
    tokens, and no more than it sends there now; and no fewer than one for as many rows as a token has experts.
    """

    far: float
    """Between hosts, as it is."""
    near: float
    """Inside of hosts, as it is."""
    far_then: tuple[float, float, float]
    """Between hosts on two levels: at least, as expected with experts chosen independently, at most."""
    near_then: float
    """Inside of hosts on two levels."""


def node_bytes(graph: Graph, layer: LayerPass) -> NodeBytes | None:
    """Return the bytes of a pass; None where hosts or tokens are not known, or the ranks are no equal nodes."""
    members = [graph.members[one] for one in layer.there]
    if not graph.hosts or not graph.routed:
        return None
    node_size = node_size_of([graph.hosts[member.rank] for member in members])
    row_bytes = max((member.row_bytes for member in members), default=0)
    if node_size is None or not row_bytes:
        return None
    tokens, chosen = (torch.tensor([graph.routed[of.rank][place] for of in members]).double() for place in (0, 1))
    # A pass that brings gradients home is the same with senders and receivers swapped.
    sent = torch.tensor(layer.sent, dtype=torch.float64, device="cpu")
    num_nodes = len(sent) // node_size
    if bool((sent.sum(1) > tokens * chosen * row_bytes).any()):
        return None  # what chooses so many of so many is not this layer's router
    by_node = sent.view(num_nodes, node_size, num_nodes, node_size)
    is_far = ~torch.eye(num_nodes, dtype=torch.bool)[:, None, :]
    to_node = by_node.sum(3) * is_far
    of_tokens, of_chosen = ((of.view(num_nodes, node_size, 1)) for of in (tokens * row_bytes, chosen))
    most = torch.minimum(to_node, of_tokens)
    least = torch.minimum(to_node / of_chosen, most)
    by_chance = of_tokens * (1 - (1 - to_node / (of_tokens * of_chosen)).clamp(min=0) ** of_chosen)
    expected = torch.minimum(torch.maximum(by_chance, least), most)
    from_hosts = (by_node * is_far[..., None]).sum((0, 1))
    inside = torch.stack([by_node[node, :, node] for node in range(num_nodes)])
    passed_on = by_node.sum(0).transpose(0, 1) * ~torch.eye(node_size, dtype=torch.bool)
    return NodeBytes(
        far=_busiest(to_node.sum(2), from_hosts),
        near=_busiest(inside.sum(2), inside.sum(1)),
        far_then=tuple(_busiest(of.sum(2), of.sum(0).T) for of in (least, expected, most)),  # type: ignore[arg-type]
        near_then=_busiest(passed_on.sum(2), passed_on.sum(1)),
    )


def _busiest(out: Tensor, into: Tensor) -> float:
    return float(torch.maximum(out, into).max())


def inside_byte_s(graph: Graph, layers: Sequence[LayerPass], sizes: Sequence[NodeBytes]) -> float:
    """Return what a byte takes inside a host at most, in seconds.

    Exchanges of ranks of one host tell it; and of those of several hosts, that what stays inside of one takes no longer
    than all.
    """
    known = []
    for layer, of in zip(layers, sizes, strict=True):
        if of.near > 0:
            known.append(max(graph.members[one].transfer_s for one in layer.there) / of.near)
    found = float(torch.tensor(known).quantile(EARLY)) if known else float("inf")
    by_key: dict[Key, list[float]] = {}
    for members in graph.exchanges:
        own = [graph.members[one] for one in members]
        moved = max(_moved(one, len(own)) for one in own)
        if moved > 0 and len({graph.hosts[one.rank] for one in own}) == 1:
            by_key.setdefault(own[0].key, []).append(max(one.transfer_s for one in own) / moved)
    return min([found, *(float(torch.tensor(times).quantile(0.5)) for times in by_key.values())])


def _moved(member: Member, num_ranks: int) -> float:
    """Return the bytes that a rank moves in an exchange at least; 0 where that is not known."""
    kind = str(member.key[1]).partition(" ")[0]
    if kind == "all_to_all":
        return float(sum(member.sent or ()))
    return (member.num_bytes or 0) * (num_ranks - 1) / num_ranks if kind in MOVING_ALL else 0.0


def offers_of(graph: Graph) -> list[Advice]:
    """Return what would help for certain, the largest gain first: nothing where the files don't tell enough."""
    found = list(Offers(graph).all())
    return sorted(found, key=lambda one: -one.gain.seconds)


class Offers:
    """Walks a graph with changes of its layers' exchanges."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.layers = layers_of(graph)
        self.run_s, self.transfer_s = graph.tables.run_s, graph.tables.transfer_s
        by_key: dict[Key, list[float]] = defaultdict(list)
        for member in graph.members:
            by_key[member.key].append(member.transfer_s)
        self.latency_s = max(0.0, min((statistics.median(times) for times in by_key.values()), default=0.0))
        """What the smallest exchange takes: no fewer bytes make one faster."""

    def all(self) -> Iterator[Advice]:
        """Return all that helps for certain."""
        if not self.layers:
            return
        self.walker = walker_of(self.graph)
        self.as_it_was = self.walker.step_times(self.run_s, self.transfer_s)
        for offer in (self._chunks(), self._two_levels(), self._balance(), *self._narrower()):
            step_s = statistics.fmean(self.as_it_was)
            if offer is not None and offer.gain.low_s > 0 and offer.gain.seconds >= LEAST_SHARE * step_s:
                yield offer

    def _gained(self, transfer_s: Tensor, steps: Sequence[int] | None = None) -> list[float]:
        now = self.walker.step_times(self.run_s, transfer_s)
        gained = [was - less for was, less in zip(self.as_it_was, now, strict=True)]
        return gained if steps is None else [gained[step] for step in steps]

    def _balance(self) -> Advice | None:
        """Offer that all ranks get the same rows."""
        replays = Replays(self.graph, usual_of(self.graph))
        if replays.is_nothing("imbalance"):
            return None
        (even,) = replays.without([{"imbalance": None}])
        gain = Cost.of([was - now for was, now in zip(replays.as_it_was, even, strict=True)])
        words = "rows spread evenly over the ranks (the router's balance, or a placement of its experts)"
        return Advice(words, "", gain)

    def _narrower(self) -> Iterator[Advice | None]:
        """Offer rows of fewer bytes, where it is known how wide their numbers are."""
        rows = [one for layer in self.layers for one in (*layer.there, *layer.back)]
        dispatched = [one for layer in self.layers if layer.phase == "forward" for one in layer.there]
        widths = {self.graph.members[one].element_bytes for one in rows}
        if widths == {4}:
            yield self._with_bytes("rows sent as bfloat16", rows, 0.5, "all rows are rounded")
        if widths in ({2}, {4}) and dispatched:
            ratio = FP8_SCALES / (2 if widths == {2} else 4)
            words = "dispatched rows sent as fp8, in forward"
            yield self._with_bytes(words, dispatched, ratio, "dispatched rows are rounded")

    def _with_bytes(self, words: str, rows: Sequence[int], ratio: float, price: str) -> Advice:
        transfer_s = self.transfer_s.clone()
        members = indices(rows)
        transfer_s[members] -= (1 - ratio) * (transfer_s[members] - self.latency_s).clamp(min=0)
        price = f"{price}; the gain doesn't include the time to convert them"
        return Advice(words, price, Cost.of(self._gained(transfer_s)))

    def _chunks(self) -> Advice | None:
        """Offer chunks of which one travels while another is computed, as this package's layers run them."""
        layers = [layer for layer in self.layers if not layer.is_overlapped]
        steps = sorted({layer.step for layer in layers})
        if not layers:
            return None
        most = max(1, MOST_WALKED * len(steps) // len(layers))
        if most < len(steps):
            steps = [steps[len(steps) * n // most] for n in range(most)]
        chosen = set(steps)
        layers = [layer for layer in layers if layer.step in chosen]
        fixed_s = self.fixed_of(layers)
        plan = self.best_plan([layer for layer in layers if layer.step == steps[len(steps) // 2]], fixed_s)
        gains = []
        for which in (BEST, EXPECTED, WORST):
            ratios = torch.ones_like(self.transfer_s)
            for layer in layers:
                saved_s = self.saved(layer, plan, fixed_s[layer.key][which], CONTENTION[which])
                if saved_s <= 0:
                    continue
                there_s, back_s = self._transfers_s(layer)
                ratios[[*layer.there, *layer.back]] = 1 - saved_s / (there_s + back_s)
            gains.append(Cost.of(self._gained(self.transfer_s * ratios, steps)))
        words = f"{setting_of(plan)}: of {plan.num_chunks} chunks one travels while the experts compute another"
        price = "layers are needed that can run chunks, such as tritonmoe's; rows that stay on their rank may hide more"
        return Advice(words, price, Cost(gains[EXPECTED].seconds, gains[WORST].low_s, gains[BEST].high_s))

    def _two_levels(self) -> Advice | None:
        """Offer that rows go once to each host, and from there to its ranks."""
        known = [(layer, of) for layer in self.layers if (of := node_bytes(self.graph, layer)) is not None]
        layers, sizes = [layer for layer, _ in known], [of for _, of in known]
        near_s = inside_byte_s(self.graph, layers, sizes) if known else float("inf")
        if near_s == float("inf"):
            return None
        gains = []
        for which in (BEST, EXPECTED, WORST):
            ratios = torch.ones_like(self.transfer_s)
            for layer, of in known:
                for members, took_s in zip((layer.there, layer.back), self._transfers_s(layer), strict=True):
                    if took_s > 0 and of.far > 0:
                        latency_s = 0.0 if which == BEST else min(self.latency_s, took_s)
                        inside_s = latency_s + (0.0 if which == BEST else near_s * of.near_then)
                        between_s = latency_s + (took_s - latency_s) * of.far_then[which] / of.far
                        ratios[list(members)] = (between_s + inside_s) / took_s
            gains.append(Cost.of(self._gained(self.transfer_s * ratios)))
        words = (
            f"two levels: rows travel once to each of {len(set(self.graph.hosts))} hosts, and from there to its ranks"
        )
        price = "rows are packed and summed a second time; the gain doesn't include that time"
        return Advice(words, price, Cost(gains[EXPECTED].seconds, gains[WORST].low_s, gains[BEST].high_s))

    def best_plan(self, layers: Sequence[LayerPass], fixed_s: Mapping[Key, Sequence[float]]) -> OverlapPlan:
        """Return the plan that saves most in these passes."""
        plans = [OverlapPlan(sizes, local_first=False) for sizes in candidate_sizes() if len(sizes) > 1]
        return max(plans, key=lambda plan: sum(self.saved(of, plan, fixed_s[of.key][EXPECTED]) for of in layers))

    def fixed_of(self, layers: Sequence[LayerPass]) -> dict[Key, tuple[float, float, float]]:
        """Return what one more chunk costs, by the key of the pass: at least, as expected, and at most."""
        points: dict[Key, list[tuple[float, float]]] = defaultdict(list)
        for layer in layers:
            for place, seconds in enumerate(layer.compute_s):
                points[layer.key].append((float(sum(one[place] for one in layer.sent)), seconds))
        found = {}
        for key, of in points.items():
            compute_s = statistics.median(seconds for _, seconds in of)
            sizes = sorted(size for size, _ in of)
            is_known = sizes[0] > 0 and sizes[-1] >= UNLIKE_ROWS * sizes[0]
            shares = CHUNK_SHARE[0] * compute_s, CHUNK_SHARE[1] * compute_s, CHUNK_SHARE[2] * compute_s
            fitted = min(fit_relative_line(of)[0], shares[WORST])  # ranks of other speeds make it anything
            found[key] = (min(shares[EXPECTED], fitted), fitted, max(shares[EXPECTED], fitted)) if is_known else shares
        return found

    def _transfers_s(self, layer: LayerPass) -> tuple[float, float]:
        """Return what its exchanges take, those of the slowest ranks."""
        members = self.graph.members
        return (max(members[one].transfer_s for one in layer.there), max(members[one].transfer_s for one in layer.back))

    def saved(self, layer: LayerPass, plan: OverlapPlan, fixed_s: float, contention: float = 0.0) -> float:
        """Return by how much a pass is shorter with a plan, by the simulator, if one more chunk costs fixed_s."""
        sent = torch.tensor(layer.sent, dtype=torch.float64, device="cpu")
        port = float(torch.maximum(sent.sum(0), sent.sum(1)).max())
        there_s, back_s = self._transfers_s(layer)
        if port <= 0 or there_s + back_s <= 0:
            return 0.0
        latency_s = max(0.0, min(self.latency_s, there_s, back_s))
        # One row is what the busiest port sends, and a byte takes a nanosecond: so an exchange takes what it took.
        bytes_there, bytes_back = (max(0, round((seconds - latency_s) * RATE)) for seconds in (there_s, back_s))
        work = LayerWork(sent / port, sent / port, bytes_there, 0, bytes_back)
        received = (sent / port).sum(0)
        fixed_s = min(fixed_s, 0.9 * min(layer.compute_s, default=0.0))
        unit_s = max(1e-12, statistics.fmean(layer.compute_s) - fixed_s) / max(1e-12, float(received.mean()))
        computed = torch.tensor(layer.compute_s, dtype=torch.float64, device="cpu")
        slowness = computed / (fixed_s + unit_s * received)
        kind = StepKind.EXPERTS
        costs = StepCosts({kind: fixed_s}, {kind: unit_s}, slowness={kind: slowness})
        link = LinkCosts(latency_s, RATE, contention=contention)
        serial = OverlapPlan((1,), local_first=False, serial=True)
        serial_s, plan_s = (simulate(build_forward(of), of, work, costs, link).total_s for of in (serial, plan))
        return min(serial_s - plan_s, there_s + back_s)
