"""TwoLevelCall: what is otherwise in a call whose rows go over nodes first, and then inside a node."""

from dataclasses import dataclass

from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.dispatch.two_level import TwoLevelPlan
from tritonmoe.errors import TransportError
from tritonmoe.expert_parallel.call import ExpertParallelCall, Kept, ReceivedExperts, group_received
from tritonmoe.experts.run import ExpertsRun
from tritonmoe.grouping import Grouping
from tritonmoe.overlap.layer_pass import ExpertsPass, MakeExperts
from tritonmoe.overlap.node_pass import NodePass
from tritonmoe.overlap.report import PassReport
from tritonmoe.overlap.row_exchanges import RowExchanges, RowMetadata
from tritonmoe.transports import Transport

__all__ = ["TwoLevelCall"]


@dataclass(kw_only=True)
class TwoLevelCall(ExpertParallelCall):
    """One call on a TwoLevelTransport. `plan` is the outer one: its rows go between nodes, to relays.

    What stands for the experts in the outer plan is a NodePass, which spreads a relay's rows inside the node.
    """

    two_level: TwoLevelPlan
    inside_node: Transport

    def make_experts(self, weights: PerWeight[Tensor], keep_hidden: bool) -> MakeExperts:
        return _RelayedExperts(self, ReceivedExperts(self, weights, keep_hidden))

    def group(self, plan: DispatchPlan, places: RowPlaces, local_ids: Tensor, num_local_experts: int) -> Grouping:
        sources = self.two_level.row_sources()
        return group_received(self.settings, plan, places, local_ids, num_local_experts, sources, True)

    def after_forward(self, experts: ExpertsPass, timings: PassReport) -> tuple[ExpertsRun, DispatchPlan | None]:
        assert isinstance(experts, NodePass)
        assert isinstance(experts.experts, ExpertsRun)
        timings.inside = experts.reports
        return experts.experts, experts.plan

    def experts_of_backward(self, run: ExpertsRun, kept: Kept) -> tuple[ExpertsPass, Tensor]:
        assert kept.inner_plan is not None
        exchanges = RowExchanges(kept.inner_plan, self.inside_node, self.settings.ops.gather_sum)
        no_relayed_rows, num_slices = run.rows.new_empty(0), kept.plan.overlap.num_local_slices
        node = NodePass(exchanges, num_slices, no_relayed_rows, run, run.rows)
        return node, run.topk_weights.new_empty(kept.plan.num_received, run.topk_weights.shape[1])

    def after_backward(self, experts: ExpertsPass, timings: PassReport) -> None:
        assert isinstance(experts, NodePass)
        timings.inside = experts.reports

    @property
    def pair_offsets(self) -> tuple[int, ...]:
        return self.two_level.pair_offsets

    @property
    def rows_to_nodes(self) -> tuple[int, ...] | None:
        return tuple(map(sum, zip(*self.plan.tokens.rows, strict=True)))

    def located(self, error: TransportError) -> TransportError:
        """Say which rank of all it is of: exchanges count the ranks of their level."""
        return TransportError(f"rank {self.all_ranks.rank} of {len(self.plan.headers)} on two levels: {error}")


@dataclass(frozen=True)
class _RelayedExperts:
    """Makes what stands for the experts of the rows that came to this relay: the pass inside its node."""

    call: TwoLevelCall
    make_experts: ReceivedExperts

    def __call__(self, plan: DispatchPlan, rows: Tensor, metadata: RowMetadata, places: RowPlaces) -> NodePass:
        call = self.call
        inner = call.two_level.inner(metadata.topk_ids)
        exchanges = RowExchanges(inner, call.inside_node, call.settings.ops.gather_sum)
        num_slices = plan.overlap.num_local_slices
        return NodePass.receive(exchanges, num_slices, rows, metadata, self.make_experts)
