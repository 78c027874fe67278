"""Causes: what can make steps long, each a record of its excess, its words and what to do about it.

A new cause is an entry of CAUSES, whose kind stands in CauseKind, and a row of the table of docs/diagnosis.md.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from tritonmoe.tools.doctor.costs import Costs
from tritonmoe.tools.doctor.graph import Graph, Key
from tritonmoe.tools.doctor.messages import Reach
from tritonmoe.tools.doctor.recorded_graph import RecordedGraph
from tritonmoe.tools.doctor.samples import slope
from tritonmoe.tools.doctor.usual import Usual, by_key, nothing_for
from tritonmoe.tools.recording.call_recording import RecordedCall, Recording

__all__ = ["CAUSES", "CauseKind", "Culprits", "ExcessTime", "Known", "Words"]

CauseKind: TypeAlias = Literal[
    "slower compute", "slower host", "slower exchanges", "uneven micro-batches", "uneven stages",
    "slow rank", "late rank", "slow link", "late link", "slow port", "imbalance", "bandwidth", "latency",
    "chunk overhead", "host overhead", "slow loads", "exchange contention", "pause",
]  # fmt: skip
"""The keys of CAUSES."""
MOST_FACTOR = 50.0
"""Beyond that what is usual is next to nothing, and how many times as much it is says nothing."""
LEAST_FACTOR = 1.05
UNLIKE = 1.05
"""Parts of a layer tell what a part costs however small it is if the largest has so many times the smallest's pairs."""
SMALLEST_STRUCTURAL = 0.15
"""The smallest share of a step of what costs all ranks something without being a fault."""
OF_LONG_BATCHES = "if a rank has more tokens than the others, make batches of equal length"
PACK = "pack them, or divide the batch so that micro-batches have as many tokens"
MEASURE = "measure the links alone with tritonmoe doctor --probe-links"


@dataclass
class ExcessTime:
    """Seconds above (or below) what is usual, of every Run (N,) and Member (M,)."""

    run_s: Tensor
    member_s: Tensor


@dataclass(frozen=True)
class Culprits:
    """Who and where."""

    ranks: tuple[int, ...]
    """Indices of ranks, in order, of links the sender first; empty where it is all of them, or many in turn."""
    moves: bool
    """Whether it is another rank from step to step, of these where they are few."""
    phase: str
    """forward or backward, where nearly all of it is there."""
    place: Key | None
    """The one key that has most of it, where there are several."""
    factor: float
    """How many times what is usual these ranks' operations take."""
    layer: int | None = None
    """The one layer that has most of it, of several; in a recording of this package's layers."""
    links: tuple[tuple[int, int], ...] = ()
    """Sender and receiver of slow links, where they are known."""
    words: str = ""
    """Which end of a link it is, where it is known."""


@dataclass(frozen=True)
class Known:
    """What a recording of this package's layers tells beyond its graph."""

    step_s: float
    """What a step takes with what lies between its calls."""
    built: RecordedGraph
    costs: Costs
    calls: tuple[RecordedCall, ...]
    """Those that the costs are fitted to."""
    share: float
    """Which part of the time of all calls calls like those take."""

    @cached_property
    def contended_s(self) -> Tensor:
        """(N,): how much longer each Run takes since an exchange is under way beside it."""
        built, contention = self.built, self.costs.link.contention
        if not contention:
            return torch.zeros_like(built.graph.tables.busy_s)
        return torch.where(built.kind_in_pass >= 0, contention * _beside_s(built), 0.0)


@dataclass(frozen=True)
class Words:
    """What the words of a cause are made of."""

    culprits: Culprits
    num_ranks: int
    several: bool
    """Whether several are at fault."""

    @property
    def s(self) -> str:
        """The ending of a verb."""
        return "" if self.several else "s"

    @property
    def their(self) -> str:
        return "their" if self.several else "its"

    @property
    def is_beyond(self) -> bool:
        return self.culprits.factor > MOST_FACTOR

    @property
    def times(self) -> str:
        factor = self.culprits.factor
        return "longer than usual" if factor < LEAST_FACTOR else f"{factor:.2f} times as long as usual"


@dataclass(frozen=True)
class Cause:
    """What can make steps long.

    Its excess is found by comparison, of any graph, or is structural: it costs all ranks something in all steps, or
    would without being a fault, and is known of this package's layers alone. A cause with neither is another name of
    an excess, which its fault has where more is known of it.
    """

    kind: CauseKind
    what: Callable[[Words], str]
    """What ranks or links do, as the end of a sentence about them."""
    to_do: str
    compared: Callable[[Graph, Usual], ExcessTime] | None = None
    structural: Callable[[Known, Usual], ExcessTime] | None = None
    found_as: CauseKind | None = None
    """The cause whose excess this one is another name of; None: its own."""
    of_whom: str = ""
    """What it is that is at fault, where that is no rank and no link."""
    to_do_of_all: str = ""
    """What to do where no rank differs from the others."""
    to_do_of_layer: Callable[[Recording, int | None], str] | None = None
    """What to do of a recording's layer, or of all layers."""
    explains: frozenset[CauseKind] = frozenset()
    """Causes that are not spoken of where they cost less than a part of what this one does."""
    least_share: float = SMALLEST_STRUCTURAL
    """The smallest share of a step that a structural cause is spoken of for."""
    is_between_calls: bool = False
    """Whether it lies between the layers' calls: its share is that of the whole step, and it is spoken of last."""
    is_shared: bool = False
    """Whether all ranks have it in the same steps: it is spoken of first, and nobody asks which rank it is."""
    is_of_links: bool = False
    """Whether sender, receiver or what lies between them is at fault."""
    is_due_to_bytes: bool = False
    """Whether a rank may wait for the bytes of another one, which it is due to then."""
    ignores_others: bool = False
    """Whether its cost is what it costs beside all other causes: without these there would be less of it."""

    @property
    def excess_kind(self) -> CauseKind:
        """The kind under which its excess is found."""
        return self.found_as or self.kind


def _of_runs(run_s: Tensor, graph: Graph) -> ExcessTime:
    return ExcessTime(run_s, nothing_for(graph.tables.transfer_s))


def _of_members(member_s: Tensor, graph: Graph) -> ExcessTime:
    return ExcessTime(nothing_for(graph.tables.busy_s), member_s)


def _of_transfers(known: Known, usual: Usual, is_latency: bool) -> ExcessTime:
    """Return what exchanges take however small they are, or what they take beyond that."""
    transfers_s, graph = (usual.transfer_s - usual.of_bytes_s).clamp(min=0), known.built.graph
    latency_s = torch.minimum(transfers_s, _latency_s(graph, known.costs))
    return _of_members(latency_s if is_latency else transfers_s - latency_s, graph)


def _latency_s(graph: Graph, costs: Costs) -> Tensor:
    """Return (M,) what an exchange takes however small it is."""
    tables, each = graph.tables, costs.link.each
    is_count = torch.tensor([key[2] == "counts" for key in tables.keys])[tables.member_key]
    counts_s = tables.transfer_s[is_count]  # they are as small as any
    most_s = float(counts_s.median().clamp(min=0)) if len(counts_s) else torch.inf
    found = torch.full_like(tables.transfer_s, min(costs.link.latency_s, most_s))
    if each is not None and each.inside is not None:
        is_near = Reach.INSIDE.pairs(len(graph.ranks), each.inside.node_size)
        is_inside = torch.tensor([str(key[2]).startswith("node_") for key in tables.keys])
        found[is_inside[tables.member_key]] = float(each.latency_s[is_near].median())
    return found


def _chunks_s(built: RecordedGraph, busy_s: Tensor) -> Tensor:
    """Return (N,) how much less the parts of a layer would take if all together had the fixed cost of one."""
    tables = built.graph.tables
    found = torch.zeros_like(busy_s)
    of_kind: dict[tuple, list[int]] = defaultdict(list)
    for number, (phase, layer, name, _, work) in enumerate(tables.keys):
        of_kind[phase, layer, name, work].append(number)
    counts_here = (built.kind_in_pass >= 0) & (tables.rows > 0)
    kinds = torch.zeros(len(tables.keys), dtype=torch.int64)
    for number, keys in enumerate(of_kind.values()):
        kinds[keys] = number
    runs = counts_here.nonzero()[:, 0]
    for own in (runs[places] for places in by_key(kinds[tables.run_key[runs]])):
        in_pass, counts = built.kind_in_pass[own].unique(return_inverse=True, return_counts=True)[1:]
        units, times = tables.rows[own], busy_s[own]
        if int(counts.max()) < 2 or float(units.max()) < UNLIKE * float(units.min()):
            continue
        unit_s = slope(in_pass, torch.arange(len(own)), units, times)
        fixed_s = max(0.0, float((times - unit_s * units).median()))
        found[own] = torch.minimum(fixed_s * (1 - 1 / counts[in_pass]), times)
    return found


def _beside_s(built: RecordedGraph) -> Tensor:
    """Return (N,) for how long of each Run an exchange was under way."""
    tables = built.graph.tables
    found = torch.zeros_like(tables.busy_s)
    for rank in range(len(built.graph.ranks)):
        members, runs = ((of == rank).nonzero()[:, 0] for of in (tables.member_rank, tables.run_rank))
        since, order = built.since[members].sort()
        end = torch.maximum(built.end[members][order], since)
        since = torch.maximum(since, torch.cat([since[:1], end.cummax(0).values[:-1]]))
        end = torch.maximum(end, since)
        sums = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), (end - since).cumsum(0)])
        begin = built.run_begin[runs]
        until = []
        for moment in (begin, begin + tables.busy_s[runs]):
            at = torch.searchsorted(since, moment, right=True)
            until.append(torch.where(at > 0, sums[at] - (end[(at - 1).clamp(min=0)] - moment).clamp(min=0), 0.0))
        found[runs] = (until[1] - until[0]).clamp(min=0)
    return found


def _balance_to_do(recording: Recording, layer: int | None) -> str:
    """Return what to do about the balance of a layer's router; None: of all layers."""
    weights = {
        of.load_balance_loss_weight
        for call in recording.calls
        if call.layer == layer or layer is None or call.layer < 0
        for of in call.ranks
    }
    known = sorted(weight for weight in weights if weight)
    named = f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g}" if known else ""
    to_do = f"raise load_balance_loss_weight above {named}"
    if None in weights:
        beside = f" ({named} in the layers that recorded it)" if known else ""
        to_do = (
            f"switch the router's auxiliary loss or bias on, or raise its weight{beside}: the recording doesn't have "
            "the weight"
        )
    elif not known:
        to_do = (
            "set load_balance_loss_weight, which is 0, and add the layers' aux_loss to the loss; or set selection_bias"
        )
    elif 0.0 in weights:
        to_do = f"set load_balance_loss_weight in the layers where it is 0, or raise it above {named}"
    return f"{to_do}; or move experts with tritonmoe.rebalance; {OF_LONG_BATCHES}"


def _late_words(of: Words) -> str:
    late = f"come{of.s} late to exchanges, and run{of.s} no operation meanwhile"
    return "runs no operation for longer than usual" if of.num_ranks == 1 else late


def _times_others(of: Words) -> str:
    return f"{of.culprits.factor:.2f} times as long as in other steps"


def _link_words(of: Words) -> str:
    if of.culprits.words:
        return of.culprits.words
    if of.culprits.links:
        return "bytes take time, and over other links next to none" if of.is_beyond else f"bytes take {of.times}"
    if of.is_beyond:
        return f"need{of.s} time for {of.their} bytes, and other ranks need next to none"
    return f"need{of.s} {of.times} for {of.their} bytes"


_OfLinks = partial(Cause, explains=frozenset({"bandwidth", "latency"}), is_of_links=True)
CAUSES: Mapping[CauseKind, Cause] = {
    cause.kind: cause
    for cause in (
        Cause(
            "slower compute",
            lambda of: f"compute{of.s} {_times_others(of)} for the same work",
            "check what came over all machines then: clocks and power limits, temperature, other programs; and whether "
            "sequences were longer there, which is more work and no fault",
            compared=lambda graph, usual: _of_runs(usual.shared.busy_s, graph),
            is_shared=True,
        ),
        Cause(
            "slower host",
            lambda of: f"run{of.s} no operation for longer than in other steps",
            "check what all hosts did then outside of operations: data loading, logging, memory that grows",
            compared=lambda graph, usual: _of_runs(usual.shared.idle_s, graph),
            is_shared=True,
        ),
        Cause(
            "slower exchanges",
            lambda of: f"exchange{of.s} {_times_others(of)} for the same bytes",
            f"check what else used the network then, such as another job on the same switches; {MEASURE}",
            compared=lambda graph, usual: _of_members(usual.shared.transfer_s, graph),
            is_shared=True,
        ),
        Cause(
            "uneven micro-batches",
            lambda of: f"differ: those above the mean of their step are computed for {of.culprits.factor:.2f} times it",
            f"sequences have unlike lengths, and no machine is at fault: {PACK}",
            compared=lambda graph, usual: _of_runs(usual.shared.batch_s, graph),
            of_whom="micro-batches",
            is_shared=True,
        ),
        Cause(
            "uneven stages",
            lambda of: f"compute{of.s} {of.culprits.factor:.2f} times as long as the mean of the stages",
            "divide the layers so that all stages compute for as long: the last one has the loss, the first one the "
            "embedding",
            compared=lambda graph, usual: _of_runs(usual.shared.stage_s, graph),
            of_whom="stage",
        ),
        Cause(
            "slow rank",
            lambda of: f"compute{of.s} " + ("where other ranks compute next to nothing" if of.is_beyond else of.times),
            "check the machine's clocks, its temperature and its other programs; else leave the machine out",
            compared=lambda graph, usual: _of_runs(graph.tables.busy_s - usual.shared.work_s - usual.busy_s, graph),
            to_do_of_all="check what else ran on these machines, and whether sequences were longer then",
        ),
        Cause(
            "late rank",
            _late_words,
            "check what the rank does outside of operations: data loading, logging, checkpoints, garbage collection",
            compared=lambda graph, usual: _of_runs(graph.tables.idle_s - usual.shared.idle_s - usual.idle_s, graph),
            to_do_of_all="check what the ranks do outside of operations: data loading, logging, checkpoints, garbage "
            "collection",
        ),
        _OfLinks(
            "slow link",
            _link_words,
            f"check cable, port, switch and route; {MEASURE}",
            compared=lambda graph, usual: _of_members(
                graph.tables.transfer_s - usual.shared.transfer_s - usual.transfer_s, graph
            ),
        ),
        _OfLinks(
            "late link",
            lambda of: "every message, even a small one, comes later than over other links",
            "check the route, and what may delay messages on it: a switch, a proxy, a busy core",
            found_as="slow link",
        ),
        _OfLinks(
            "slow port",
            lambda of: of.culprits.words or f"move{of.s} {of.their} bytes more slowly than other ranks",
            f"check the network card of that rank, its cable and its driver; {MEASURE}",
            found_as="slow link",
        ),
        Cause(
            "imbalance",
            lambda of: f"get{of.s} more rows than other ranks",
            "balance the router: switch its auxiliary loss or bias on, or raise the weight (the files don't have the "
            f"weight); or spread hot experts over ranks; {OF_LONG_BATCHES}",
            compared=lambda graph, usual: ExcessTime(usual.of_rows_s, usual.of_bytes_s),
            to_do_of_layer=_balance_to_do,
            is_due_to_bytes=True,
        ),
        Cause(
            "bandwidth",
            lambda of: f"wait{of.s} for the bytes of exchanges, at the links' usual rate",
            "send fewer bytes (a narrower wire_dtype, two levels), or hide exchanges behind compute (chunks)",
            structural=lambda known, usual: _of_transfers(known, usual, is_latency=False),
        ),
        Cause(
            "latency",
            lambda of: f"wait{of.s} for the fixed time of exchanges, which even the smallest exchange takes",
            "make fewer and larger exchanges (fewer chunks), or use a network with less delay",
            structural=lambda known, usual: _of_transfers(known, usual, is_latency=True),
        ),
        Cause(
            "chunk overhead",
            lambda of: f"pay{of.s} the fixed cost of a chunk, which even the smallest chunk has, once for every chunk",
            "use fewer chunks",
            structural=lambda known, usual: _of_runs(
                _chunks_s(known.built, usual.busy_s - known.contended_s), known.built.graph
            ),
        ),
        Cause(
            "host overhead",
            lambda of: f"wait{of.s} for the host (Python), before the first operation of a pass and between operations",
            "use a faster host or fewer other threads; check what Python does between the steps of the layer",
            structural=lambda known, usual: _of_runs(
                known.built.graph.tables.overhead_s - known.built.graph.tables.load_s - known.built.pause_s,
                known.built.graph,
            ),
        ),
        Cause(
            "slow loads",
            lambda of: f"wait{of.s} for experts, which are read from {of.their} file more slowly than they are used",
            "compute more tokens a step, pack experts in fewer bits (quantize_experts), keep more of them in memory "
            "(resident_bytes of offload_experts), or use a faster disk; chunks of experts, "
            'OverlapConfig(chunk_by="experts", local_first=False), read each expert once in a pass',
            compared=lambda graph, usual: _of_runs(graph.tables.load_s, graph),
        ),
        Cause(
            "exchange contention",
            lambda of: f"compute{of.s} more slowly while an exchange is under way",
            "keep some cores for the exchanges alone (on a GPU: num_sms of the layer)",
            structural=lambda known, usual: _of_runs(known.contended_s, known.built.graph),
            ignores_others=True,
        ),
        Cause(
            "pause",
            lambda of: (
                f"do{'' if of.several else 'es'} something else at the same time between calls, for longer than usual"
            ),
            "check what all ranks do at the same time between calls: checkpoints, evaluation, logging",
            structural=lambda known, usual: _of_runs(known.built.pause_s, known.built.graph),
            least_share=0.05,
            is_between_calls=True,
        ),
    )
}
"""By kind, in the order in which they are asked for."""
