"""Recordings that the simulator itself makes, of known conditions: what the doctor says of them must be true."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.overlap.schedule import build_backward, build_forward
from tritonmoe.overlap.simulation.cost_model import EachLink, InsidePorts, LayerWork, LinkCosts, StepCosts, step_units
from tritonmoe.overlap.simulation.simulator import SimulatedStep, simulate
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.tools.recording.call_recording import FORMAT, SCHEMA, file_name, plain_plan

__all__ = ["HIDDEN_SIZE", "Run", "healthy", "write_run"]

HIDDEN_SIZE = 64
ENTRY_S = 5e-4
"""With noise the ranks enter a pass within so many seconds."""
LOADING = ("experts", "experts_backward")
"""The steps that wait for experts which are read from a file."""
BEHIND_RECOMPUTE_S = 1e-6
"""So soon a backward follows."""


class NoisyCosts(StepCosts):
    """Costs of which every step of every rank takes a random part more or less."""

    noise: float
    generator: torch.Generator
    loads_s: Tensor
    """(W,): for how long each rank's steps of experts wait for these."""

    def on_ranks(self, kind: str, units: Tensor) -> Tensor:
        seconds = super().on_ranks(kind, units)
        seconds = seconds * (self.noise * torch.randn(seconds.shape, generator=self.generator)).exp()
        return seconds + self.loads_s if kind in LOADING else seconds


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


@dataclass(frozen=True)
class Run:
    """A run of equal layers; healthy as it stands: the experts take longer than the exchanges, which they hide."""

    size: int = 4
    num_chunks: int = 4
    rows: float = 200.0
    """From every rank to every rank."""
    top_k: int = 1
    """With uniform routing; a row has a pair for each of its experts on the rank."""
    pair_s: float = 1e-4
    fixed_s: float = 2e-4
    byte_s: float = 1e-7
    latency_s: float = 1e-4
    host_s: float = 1e-4
    """Before the counts, and again before the first step."""
    slow_link: tuple[int, int, float] | None = None
    slow_port: tuple[int, float] | None = None
    slow_rank: tuple[int, float] | None = None
    late_rank: tuple[int, float] | None = None
    hot_rank: tuple[int, float] | None = None
    """So many times the pairs, and rows, of every other rank, of as many in all."""
    capacity: float | None = None
    """So many times the rows of uniform routing travel then, whatever the routing, and experts skip what is padding."""
    contention: float = 0.0
    """The share of its speed that compute loses while an exchange is under way."""
    late_link: tuple[int, int, float] | None = None
    """Every message from the first to the second rank takes so many seconds longer."""
    slow_disk: tuple[tuple[int, ...], float] | None = None
    """On these ranks each step of experts waits for so many seconds until they are read."""
    node_size: int | None = None
    """So many ranks on each host, which reach each other at inside_byte_s; None: all on one host, at byte_s."""
    inside_byte_s: float = 2e-8
    has_two_levels: bool = False
    """Whether a row goes once to each node, and from there on to its ranks."""
    records_arrivals: bool = True
    """Whether it is known when each rank's rows arrived, as it is not over NCCL."""
    uses_rendezvous: bool = False
    """As Transport.uses_rendezvous says."""
    num_layers: int = 1
    is_chained: bool = False
    """Whether a rank enters a pass when it has itself ended the one before, as in a model; else all enter together."""
    recomputes: bool = False
    """Whether a forward runs again before each backward, as under activation checkpointing, and is recorded alone."""
    filler_s: float = 0.0
    """What each of two fillers in a forward takes: a shared expert's halves, say."""
    beside_s: tuple[float, float] = (1e-3, 1e-3)
    """What the rest of the model takes before each layer's forward, and its backward; before a recompute both."""
    noise: float = 0.0
    """By so large a part times differ from step to step, from exchange to exchange and from entry to entry."""

    @property
    def plan(self) -> tm.OverlapPlan:
        return tm.OverlapPlan((1,) * self.num_chunks, capacity=self.capacity)

    def work(self) -> LayerWork:
        rows = self.rows * ones(self.size, self.size)
        if self.hot_rank is not None:
            rank, times = self.hot_rank
            rows[:, rank] *= times
            rows *= self.rows * self.size**2 / rows.sum()
        pairs = rows * self.pairs_per_row
        if self.capacity is not None:
            rows = self.capacity * self.rows * ones(self.size, self.size)
        return LayerWork(rows, pairs, 4 * HIDDEN_SIZE, self.top_k)

    def recorded_work(self) -> LayerWork:
        """Return the work as a report has it, with a capacity the room."""
        work = self.work()
        return replace(work, pairs=work.rows * self.pairs_per_row)

    @property
    def pairs_per_row(self) -> float:
        return self.tokens * self.top_k / self.size / self.rows

    @property
    def tokens(self) -> float:
        """Of each rank, so that uniform routing sends so many rows to each rank."""
        return self.rows / self._reached(self.size)

    def _reached(self, number: int) -> float:
        """Return the share of tokens that need any of the experts of one of so many ranks, or nodes."""
        return 1 - (1 - 1 / number) ** self.top_k

    def walked_work(self) -> LayerWork | TwoLevelWork:
        """Return the work on the levels that there are."""
        if not self.has_two_levels:
            return self.work()
        assert self.node_size is not None
        each = self.link().each
        assert each is not None
        assert each.inside is not None
        each = replace(each, port_out_s=each.inside.out_s, port_in_s=each.inside.in_s, inside=None)
        inside = replace(self.link(), each=each, contention=0.0)
        return TwoLevelWork.of(self.work(), self.rows_to_nodes(), inside)

    def walked_link(self) -> LinkCosts:
        """Return the link of walked_work, of two levels the one between nodes."""
        link = self.link()
        assert link.each is not None
        return replace(link, each=replace(link.each, inside=None)) if self.has_two_levels else link

    def rows_to_nodes(self) -> Tensor:
        """Return (W, nodes): the tokens of each rank that need any rank of each node."""
        assert self.node_size is not None
        by_node = self.work().rows.view(self.size, -1, self.node_size).sum(2)
        share = self._reached(self.size // self.node_size) / self._reached(self.size) / self.node_size
        return (share * by_node).round()

    def steps(self) -> StepCosts:
        kinds = {"experts": 1.0, "experts_backward": 2.0, "weight_grad": 1.0}
        slowness = ones(self.size)
        if self.slow_rank is not None:
            slowness[self.slow_rank[0]] = self.slow_rank[1]
        fixed = {kind: self.fixed_s * times for kind, times in kinds.items()}
        units = {kind: self.pair_s * times for kind, times in kinds.items()}
        units["filler"] = self.filler_s / (self.size * self.rows)
        return StepCosts(fixed, units, slowness=dict.fromkeys(kinds, slowness))

    def link(self) -> LinkCosts:
        port, link_s = self.byte_s * ones(self.size), torch.zeros(self.size, self.size, dtype=torch.float64)
        if self.slow_port is not None:
            port[self.slow_port[0]] *= self.slow_port[1]
        if self.slow_link is not None:
            sender, receiver, times = self.slow_link
            link_s[sender, receiver] = self.byte_s * times
        latency_s = self.latency_s * ones(self.size, self.size)
        if self.late_link is not None:
            sender, receiver, seconds = self.late_link
            latency_s[sender, receiver] += seconds
        inside = None
        if self.node_size is not None:
            near = port * (self.inside_byte_s / self.byte_s)
            inside = InsidePorts(self.node_size, near, near)
        each = EachLink(port, port, link_s, latency_s, inside)
        return LinkCosts(
            self.latency_s,
            1 / self.byte_s,
            contention=self.contention,
            each=each,
            is_rendezvous=self.uses_rendezvous,
        )

    def late_s(self) -> Tensor:
        late = 0 * ones(self.size)
        if self.late_rank is not None:
            late[self.late_rank[0]] = self.late_rank[1]
        return late

    def loads_s(self) -> Tensor:
        ranks, seconds = self.slow_disk or ((), 0.0)
        found = 0 * ones(self.size)
        found[list(ranks)] = seconds
        return found

    def seconds(self) -> float:
        """Return what a call takes, from when most ranks come to its forward, and to its backward."""
        quiet = replace(self, noise=0.0)
        return sum(_walk(quiet, number, 0.0, torch.Generator())[1] for number in range(2))


def _walk(
    run: Run, number: int, at: float, generator: torch.Generator, late: Tensor | float = 0.0
) -> tuple[list[dict], float]:
    """Return a forward (0) or backward (1) on every rank as it is recorded, and what it takes.

    Ranks enter it at that time, or so much later (W,), and a late rank its forward later still.
    """
    plan, work = run.plan, run.walked_work()
    outer = work.outer if isinstance(work, TwoLevelWork) else run.recorded_work()
    sizes = [[part.tolist() for part in of] for of in outer.segments(plan)]
    late = late + (run.late_s() if number == 0 else 0 * run.late_s())
    costs = NoisyCosts(**{of.name: getattr(run.steps(), of.name) for of in fields(StepCosts)})
    costs.__dict__.update(noise=run.noise, generator=generator, loads_s=run.loads_s())

    def noisy(seconds: Tensor | float) -> Tensor:
        return seconds * (run.noise * torch.randn(run.size, dtype=torch.float64, generator=generator)).exp()

    schedule = build_forward(plan, 2 if run.filler_s else 0)
    if number == 1:
        schedule = build_backward(plan, needs_x=True, needs_topk_weights=True)
    entered = at + late
    if run.noise:
        entered = entered + ENTRY_S * torch.rand(run.size, dtype=torch.float64, generator=generator)
    posted = entered + noisy(run.host_s)
    left = posted.max() + noisy(run.latency_s)
    origin = left + noisy(run.host_s)
    rate = float((run.noise * torch.randn(1, generator=generator)).exp())
    found = simulate(schedule, plan, work, costs, replace(run, byte_s=run.byte_s * rate).walked_link(), origin - at)
    ranks = []
    for rank in range(run.size):
        own = [[part[rank] for part in of] for of in sizes]
        since = float(origin[rank]) - at

        def plain(
            one: SimulatedStep, rank: int = rank, own: list[list[float]] = own, since: float = since
        ) -> dict[str, object]:
            start, posted = float(one.start_s[rank]), one.posted_s
            return {
                "kind": str(one.step.kind),
                "chunk": one.step.chunk,
                "start_s": start - since,
                "end_s": float(one.end_s[rank]) - since,
                "wait_s": 0.0 if one.wait_s is None else float(one.wait_s[rank]),
                "post_s": 0.0 if posted is None else float(posted[rank]) - start,
                "units": step_units(one.step, plan.num_local_slices, *own),
                "arrivals_s": _arrivals(run, one, rank, since),
                **({"load_s": float(costs.loads_s[rank])} if one.step.kind in LOADING else {}),
            }

        steps = [plain(one) for one in found.steps]
        ranks.append(
            {
                "marks": {
                    "entered": float(entered[rank]),
                    "counts_posted": float(posted[rank]),
                    "counts_left": float(left[rank]),
                },
                "origin": float(origin[rank]),
                "total_s": float(found.end_s[rank]) + at - float(origin[rank]),
                "steps": steps,
                "steps_inside": [plain(inside) for one in found.steps for inside in one.inside],
            }
        )
    return ranks, found.total_s


def _arrivals(run: Run, one: SimulatedStep, rank: int, since: float) -> list[float | None] | None:
    """Return when the rows of each rank that takes part had arrived at this one, None of its own."""
    if one.arrivals_s is None or not run.records_arrivals:
        return None
    arrivals = [None if peer == rank else float(one.arrivals_s[peer, rank]) - since for peer in range(run.size)]
    if not run.has_two_levels:
        return arrivals
    assert run.node_size is not None
    node, place = divmod(rank, run.node_size)
    if one.step.kind.is_inside_node:
        return arrivals[node * run.node_size : (node + 1) * run.node_size]
    return arrivals[place :: run.node_size]


def _order(run: Run) -> Iterator[tuple[int, int, int, float]]:
    """Return the passes of a step: the call's number in it, the layer, 0 or 1, and what the model takes before them."""
    forward_s, backward_s = run.beside_s
    for layer in range(run.num_layers):
        yield layer, layer, 0, forward_s
    for number, layer in enumerate(reversed(range(run.num_layers)), run.num_layers):
        if run.recomputes:
            yield number, layer, 0, forward_s + backward_s
        yield layer, layer, 1, BEHIND_RECOMPUTE_S if run.recomputes else backward_s


def write_run(folder: Path, runs: Sequence[Run], seed: int = 0) -> Path:
    """Write a recording of one step of each run, which are of one size."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[list[dict]] = []
    size = runs[0].size
    for rank in range(size):
        header = {
            "format": FORMAT,
            "schema": SCHEMA,
            "rank": rank,
            "size": size,
            "transport": "Synthetic",
            "node_size": runs[0].node_size if runs[0].has_two_levels else None,
            "shares_link": False,
            "uses_rendezvous": runs[0].uses_rendezvous,
            "host": f"node{rank // (runs[0].node_size or size)}",
            "wall_clock": 0.0,
            "perf_counter": 0.0,
        }
        lines.append([header])
    at, late, num_calls = 100.0, 0 * ones(size), 0
    generator = torch.Generator().manual_seed(seed)
    for run in runs:
        work, recorded = run.work(), run.recorded_work()
        passes: dict[tuple[int, int], list[list[dict]]] = {}
        for number, layer, of_pass, before_s in _order(run):
            ranks, _ = _walk(run, of_pass, at + before_s, generator, late)
            passes.setdefault((number, layer), []).append(ranks)
            ends = torch.tensor([of["origin"] + of["total_s"] for of in ranks], dtype=torch.float64)
            at = float(ends.min() if run.is_chained else ends.max())
            late = (ends - at).clamp(min=0)
        for (number, layer), rank in itertools.product(passes, range(size)):
            forward, *backward = passes[number, layer]
            lines[rank].append(
                {
                    "call": num_calls + number,
                    "layer": layer,
                    "recomputed": number >= run.num_layers,
                    "half": 0,
                    "plan": plain_plan(run.plan),
                    "sizes": {"num_experts": 2 * size, "hidden_size": HIDDEN_SIZE, "intermediate_size": 8},
                    "top_k": run.top_k,
                    "row_bytes": 4 * HIDDEN_SIZE,
                    "other_row_bytes": 4 * HIDDEN_SIZE,
                    "rows": recorded.rows[rank].to(torch.int64).tolist(),
                    "rows_to_nodes": run.rows_to_nodes()[rank].to(torch.int64).tolist() if run.has_two_levels else None,
                    "pairs": recorded.pairs[rank].to(torch.int64).tolist(),
                    "pairs_per_expert": [int(work.pairs[:, rank].sum()) - 1, 1],
                    "forward": forward[rank],
                    "backward": backward[0][rank] if backward else None,
                }
            )
        num_calls += len(passes)
    for rank, of in enumerate(lines):
        (folder / file_name(rank)).write_text("".join(json.dumps(line) + "\n" for line in of))
    return folder


def healthy(run: Run) -> Run:
    """Return the run without what is wrong with it."""
    run = replace(run, slow_link=None, slow_port=None, slow_rank=None, late_rank=None, hot_rank=None, late_link=None)
    return replace(run, contention=0.0, slow_disk=None)
