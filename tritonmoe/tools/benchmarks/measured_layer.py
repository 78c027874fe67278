"""One rank's layer in the overlap benchmark: its batch, its transports, and a call of every variant."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import SimpleQueue

import torch

from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan
from tritonmoe.expert_parallel.state import state_of
from tritonmoe.layer import GroupedExperts, report_of
from tritonmoe.overlap.report import LayerReport, PassReport
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts
from tritonmoe.overlap.tuning.search import fixed_plan
from tritonmoe.overlap.tuning.tuner import PlanChooser
from tritonmoe.tools.benchmarks.overlap_variants import Variant
from tritonmoe.tools.benchmarks.ranks import slowest
from tritonmoe.tools.benchmarks.stand_ins import FixedExperts, run_passes
from tritonmoe.tools.benchmarks.timing import synchronize
from tritonmoe.tools.benchmarks.workload import Workload, draw_ids
from tritonmoe.transports import LocalTransport, Transport, TwoLevelTransport
from tritonmoe.transports.emulated.link_model import LinkModel
from tritonmoe.transports.emulated.link_replay import Port, ReplayTransport

__all__ = ["Link", "MeasuredLayer", "ReplayedPeers", "work_of_one"]


class ReplayedPeers:
    """Threads that wait, outside of any exchange, for rank 0 to ask for a call; and the port that stands for them.

    Use it as a context on rank 0: at its end the threads return.
    """

    def __init__(self, num_ranks: int, link: LinkModel) -> None:
        self.port = Port(link)
        """The port of rank 0, in every call that is not recorded."""
        self._plans: list[SimpleQueue[OverlapPlan | None]] = [SimpleQueue() for _ in range(num_ranks)]

    def ask(self, plan: OverlapPlan | None) -> None:
        """Make all peers run a call of this plan; None ends their threads."""
        for queue in self._plans[1:]:
            queue.put(plan)

    def serve(self, rank: int, run: Callable[[OverlapPlan], object]) -> None:
        """Run what rank 0 asks for until its measurement is over."""
        while (plan := self._plans[rank].get()) is not None:
            run(plan)

    def link_costs(self) -> LinkCosts:
        """Return the port's link for the simulator."""
        link = self.port.link
        return LinkCosts(link.latency_us * 1e-6, 1 / link.transfer_s(1) if link.transfer_s(1) else float("inf"))

    def __enter__(self) -> "ReplayedPeers":
        return self

    def __exit__(self, *_: object) -> None:
        self.ask(None)


def work_of_one(work: LayerWork, rank: int) -> LayerWork:
    """Return what a call is to a rank whose peers are replayed: they exchange with it, and not with each other."""
    is_own = torch.zeros_like(work.rows)
    is_own[rank] = is_own[:, rank] = 1
    return replace(work, rows=work.rows * is_own, pairs=work.pairs * is_own)


CALIBRATION_ROUNDS = 5


@dataclass
class Link:
    """What rank 0 can do with the link, and what every rank knows of it."""

    set_rate: Callable[[float], None] | None = None
    """Set every rank's link to so many bits per second."""
    read_bytes: Callable[[], tuple[int, int]] | None = None
    """This rank's interface counters: bytes received, bytes sent."""
    read_uplinks: Callable[[], list[int]] | None = None
    """Bytes that every node has sent to other nodes."""
    two_levels: TwoLevelTransport | None = None
    peers: ReplayedPeers | None = None
    """The replayed ranks, where rank 0 alone is measured."""

    def both_levels(self) -> TwoLevelTransport:
        """Return the transport of two levels, for the variants that are measured only where there is one."""
        if self.two_levels is None:
            raise ValueError("a variant on two levels needs a link of two levels")
        return self.two_levels

    def change_rate(self, rate: float) -> None:
        """Return every rank's link so many bits per second; called on rank 0."""
        if self.set_rate is None:
            raise ValueError("the rate of this link can't be changed, so no compute ratio can be chosen")
        self.set_rate(rate)

    def measured_ranks(self, transport: Transport) -> Transport:
        """Return what the ranks that are measured tell each other their figures over."""
        return transport if self.peers is None else LocalTransport()


class MeasuredLayer:
    """This rank's layer, batch and the ways to run them."""

    def __init__(self, transport: Transport, workload: Workload, device: torch.device, link: Link) -> None:
        self.link = link
        num_experts, top_k, model_width, inner = workload.shape
        rank, size = transport.rank, transport.size
        self.transport, self.workload, self.device = transport, workload, device
        self.measured_ranks = link.measured_ranks(transport)
        self.num_experts = num_experts
        dtype = workload.torch_dtype
        self.experts = GroupedExperts(
            MoEConfig(model_width, inner, num_experts, top_k),
            transport,
            expert_gradients="sum",  # the mean is one more pass over the gradients, which hides nothing
            generator=torch.Generator().manual_seed(workload.seed),
            device=device,
            dtype=dtype,
        ).requires_grad_(workload.backward)
        generator = torch.Generator().manual_seed(1000 * workload.seed + rank + 1)
        tokens = (workload.num_tokens, model_width)
        self.x = torch.randn(tokens, generator=generator).to(device, dtype)
        self.dout = torch.randn(tokens, generator=generator).to(device, dtype)
        self.topk_ids = draw_ids(workload, rank, size).to(device)
        self.topk_weights = torch.rand(self.topk_ids.shape, generator=generator).to(device)
        for leaf in (self.x, self.topk_weights):
            leaf.requires_grad_(workload.backward)
        self._replays: dict[Variant, ReplayTransport] = {}
        self._recordings: dict[OverlapPlan, list[torch.Tensor]] = {}
        self._at_once: dict[OverlapPlan, ReplayTransport] = {}
        self.passes: list[PassReport] = []
        """The passes of the latest run."""

    def run(self, variant: Variant) -> LayerReport | None:
        """Run one variant, forward and, with the workload's backward, backward; None of communication alone."""
        return self._run(variant, self._transport_for_next(variant))

    def run_layer(self, variant: Variant) -> LayerReport:
        """Run one variant in which the layer runs itself."""
        return self._run_layer(self._transport_for_next(variant), variant.config())

    def record(self, plan: OverlapPlan) -> list[torch.Tensor]:
        """Run a call of this plan, as all ranks do at once, and give what this rank received in it."""
        replay = ReplayTransport(self.transport)
        self._run_layer(replay, plan)
        synchronize()
        self.transport.barrier()  # from here on no other rank computes
        return replay.received

    def _transport_for_next(self, variant: Variant) -> Transport:
        """Return what the next call of this variant goes over; a call that no peer can answer is recorded first."""
        peers = self.link.peers
        if variant.kind.endswith("two levels"):
            return self.link.both_levels()
        is_free = variant.kind in ("compute", "free transport")
        if peers is None and not is_free:
            return self.transport
        if variant not in self._replays:
            self._replays[variant] = ReplayTransport(self.transport, None if is_free or peers is None else peers.port)
        replay = self._replays[variant]
        if peers is not None:
            replay.received = self._recorded(peers, self._next_plan(variant, replay))
        replay.rewind()
        return replay

    def _recorded(self, peers: ReplayedPeers, plan: OverlapPlan) -> list[torch.Tensor]:
        plan = replace(plan, wire_dtype=self.workload.torch_wire_dtype)
        if plan not in self._recordings:
            peers.ask(plan)
            self._recordings[plan] = self.record(plan)
        return self._recordings[plan]

    def _next_plan(self, variant: Variant, transport: Transport) -> OverlapPlan:
        """Return the plan of the next call; that of "auto" depends on the calls before it on this transport."""
        size = self.transport.size
        if variant.num_chunks is not None:
            return fixed_plan(variant.config(), variant.num_chunks, size)
        choosers = state_of(transport).choosers.values()
        return next(iter(choosers), PlanChooser(variant.config(), size)).plan()

    def _run(self, variant: Variant, transport: Transport) -> LayerReport | None:
        if variant.kind == "communication":
            self._communicate(variant, transport)
            return None
        return self._run_layer(transport, variant.config())

    def _run_layer(self, transport: Transport, overlap: OverlapConfig | OverlapPlan) -> LayerReport:
        experts = self.experts
        shards = experts.expert_shards
        assert shards is not None
        shards.sharding = replace(shards.sharding, transport=transport)
        experts.overlap = replace(overlap, wire_dtype=self.workload.torch_wire_dtype)
        if self.workload.backward:
            experts(self.x, self.topk_ids, self.topk_weights).backward(self.dout)
            experts.zero_grad(set_to_none=True)
            self.x.grad = self.topk_weights.grad = None
        else:
            with torch.no_grad():
                experts(self.x, self.topk_ids, self.topk_weights)
        report = report_of(experts)
        self.passes = [one for one in (report.forward, report.backward) if one is not None]
        return report

    def timed(self, variant: Variant) -> tuple[float, LayerReport | None]:
        """Run a variant when all ranks are ready, and give this rank's seconds."""
        transport = self._transport_for_next(variant)
        synchronize()
        self.measured_ranks.barrier()
        started = time.perf_counter()
        report = self._run(variant, transport)
        synchronize()
        seconds = time.perf_counter() - started
        for layer_pass in self.passes:
            _ = layer_pass.steps  # read now: until then they hold on to the device's events
        return seconds, report

    def run_at_once(self, plan: OverlapPlan) -> LayerReport:
        """Run a call of this plan whose rows are there at once, when all ranks are ready: its steps, with no exchange.

        Every rank makes the same calls: what the rows are is recorded in a call before the first one of a plan.
        """
        replay = self._at_once.get(plan)
        if replay is None:
            replay = self._at_once[plan] = ReplayTransport(self.transport)
            if self.link.peers is not None:
                replay.received = self._recorded(self.link.peers, plan)
            replay.rewind()
            self._run_layer(replay, plan)
        replay.rewind()
        synchronize()
        self.measured_ranks.barrier()
        return self._run_layer(replay, plan)

    def median_s(self, variant: Variant) -> float:
        """Return the slowest rank's median over a few runs."""
        self.run(variant)
        samples = slowest(self.measured_ranks, [self.timed(variant)[0] for _ in range(CALIBRATION_ROUNDS)])
        return statistics.median(samples)

    @torch.no_grad()
    def _communicate(self, variant: Variant, transport: Transport) -> None:
        plan = fixed_plan(variant.config(), variant.num_chunks or 1, self.transport.size)
        self.passes = run_passes(
            transport,
            replace(plan, wire_dtype=self.workload.torch_wire_dtype),
            self.x,
            self.topk_ids,
            self.topk_weights,
            self.num_experts,
            lambda rows, plan: FixedExperts(0.0, plan.receive_offsets, rows, self.topk_ids.shape[1]),
            self.dout if self.workload.backward else None,
        ).reports
