"""TwoLevelCall: what is otherwise in a call whose rows go over nodes first, and then inside a node."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.dispatch.two_level import TwoLevelPlan
from tritonmoe.errors import TransportError
from tritonmoe.expert_parallel.agreed_call import AgreedCall, group_received
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.grouping import Grouping
from tritonmoe.overlap.experts import BackwardExperts, ForwardExperts, MakeExperts
from tritonmoe.overlap.node_pass import NodeBackward, NodeForward
from tritonmoe.overlap.report import PassReport
from tritonmoe.overlap.row_exchanges import RowExchanges
from tritonmoe.transports import Transport

__all__ = ["TwoLevelCall"]


@dataclass(kw_only=True)
class TwoLevelCall(AgreedCall):
    """One call on a TwoLevelTransport. `plan` is the outer one: its rows go between nodes, to relays.

    What stands for the experts in the outer plan spreads a relay's rows inside the node: NodeForward, NodeBackward.
    """

    two_level: TwoLevelPlan
    inside_node: Transport

    def make_experts(self, own_experts: MakeExperts[ForwardRun]) -> MakeExperts[ForwardExperts]:
        return partial(self._spread, own_experts)

    def _spread(
        self,
        own_experts: MakeExperts[ForwardRun],
        plan: DispatchPlan,
        relayed: CallTensors[Tensor],
        places: RowPlaces,
    ) -> NodeForward[ForwardRun]:
        """Send what came with the relayed rows to the experts of this node."""
        exchanges = self._exchanges_inside(self.two_level.inner(relayed.topk_ids))
        return NodeForward(exchanges, plan.overlap.num_local_slices, relayed, own_experts)

    def group(self, plan: DispatchPlan, places: RowPlaces, local_ids: Tensor, num_local_experts: int) -> Grouping:
        sources = self.two_level.row_sources()
        return group_received(self.settings, plan, places, local_ids, num_local_experts, sources, True)

    def after_forward(self, experts: ForwardExperts, timings: PassReport) -> tuple[ForwardRun, DispatchPlan | None]:
        assert isinstance(experts, NodeForward)
        timings.inside = experts.reports
        return experts.experts, experts.plan

    def experts_of_backward(
        self, run: BackwardRun, plan: DispatchPlan, inner_plan: DispatchPlan | None
    ) -> tuple[BackwardExperts, Tensor]:
        assert inner_plan is not None
        node = NodeBackward(self._exchanges_inside(inner_plan), plan.overlap.num_local_slices, run, run.rows)
        return node, run.topk_weights.new_empty(plan.num_received, run.topk_weights.shape[1])

    def after_backward(self, experts: BackwardExperts, timings: PassReport) -> None:
        assert isinstance(experts, NodeBackward)
        timings.inside = experts.reports

    def _exchanges_inside(self, inner: DispatchPlan) -> RowExchanges:
        return RowExchanges(inner, self.inside_node, self.settings.ops.gather_sum)

    @property
    def pair_offsets(self) -> tuple[int, ...]:
        return self.two_level.pair_offsets

    @property
    def rows_to_nodes(self) -> tuple[int, ...] | None:
        return tuple(map(sum, zip(*self.plan.tokens.rows, strict=True)))

    def located(self, error: TransportError) -> TransportError:
        """Say which rank of all it is of: exchanges count the ranks of their level."""
        return TransportError(f"rank {self.all_ranks.rank} of {len(self.plan.headers)} on two levels: {error}")
