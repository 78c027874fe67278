"""Runs a schedule: computes what is on the compute lane, posts what is on the comm lane, waits where a step needs it.

The same loop serves every transport and device: the only place where it meets communication is
PendingExchange.wait(). What a step does is in LayerPass, which walks one layer call forward and backward.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tritonmoe.backends.ops import WeightGrads
from tritonmoe.dispatch.count_exchange import BackwardAgreement
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.placement import ExpertPlacement, pack_replica_grads, sum_replica_grads
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.errors import TransportError
from tritonmoe.overlap.report import PassReport, mark
from tritonmoe.overlap.schedule import Schedule, Step, build_backward, build_forward
from tritonmoe.transports import PendingExchange, Transport
from tritonmoe.transports.wire import DecodedExchange, WireFormat

__all__ = ["ExpertsPass", "LayerPass", "MakeExperts", "execute"]


def execute(
    schedule: Schedule, actions: Mapping[str, Callable[[int | None], PendingExchange | None]], device: torch.device
) -> PassReport:
    """Run the steps in order; actions[kind](chunk) computes, or posts an exchange and gives it back."""
    report = PassReport(device)
    posted: dict[int, tuple[object, object, PendingExchange]] = {}
    for position, step in enumerate(schedule):
        for earlier in step.after:
            if earlier in posted:
                started, posted_at, pending = posted.pop(earlier)
                before = mark(device)
                try:
                    pending.wait()
                except TransportError as error:
                    raise _at_step(schedule[earlier], error) from error
                after = mark(device)
                # Only the time is kept: the exchange itself would keep its buffers.
                finished = pending.finished_at() if device.type == "cpu" else None
                report._exchanges.append((schedule[earlier], started, posted_at, before, after, finished))
        started = mark(device)
        try:
            pending_or_none = actions[step.kind](step.chunk)
        except TransportError as error:
            raise _at_step(step, error) from error
        if step.lane == "comm":
            assert pending_or_none is not None
            posted[position] = (started, mark(device), pending_or_none)
        else:
            report._compute.append((step, started, mark(device)))
    report._end = mark(device)
    return report


def _at_step(step: Step, error: TransportError) -> TransportError:
    """Say where in the layer an exchange failed; the error itself says on which rank."""
    where = "all chunks" if step.chunk is None else "local rows" if step.chunk < 0 else f"chunk {step.chunk}"
    return TransportError(f"step {step.kind}, {where}: {error}")


class ExpertsPass(Protocol):
    """What the executor needs of the experts of one call (experts.ExpertsRun, or a stand-in of fixed duration)."""

    def forward(self, chunk: int, out: Tensor | None = None) -> Tensor: ...

    def backward(
        self, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]: ...

    def weight_grad(self, dout: Tensor, needs: tuple[bool, bool, bool, bool]) -> WeightGrads: ...


MakeExperts = Callable[[DispatchPlan, Tensor, Tensor, Tensor, RowPlaces], ExpertsPass]
"""(the plan, rows (R, D), topk_ids (R, K) int32 global, topk_weights (R, K) fp32, where the rows lie) -> the experts of
one call."""

GatherSum = Callable[..., Tensor]
"""The gather_sum op of the layer's backend."""


@dataclass
class LayerPass:
    """One layer call on one rank: the buffers, and what each kind of step does with them.

    forward() and backward() may be used on different objects, as long as the second is given the first one's
    `experts`, `rows` and `received_weights`.
    """

    plan: DispatchPlan
    transport: Transport
    gather_sum: GatherSum
    make_experts: MakeExperts | None
    experts: ExpertsPass | None = None
    rows: Tensor | None = None
    """(R, D) received rows."""
    received_weights: Tensor | None = None
    """(R, K) fp32."""
    wire_squares: Tensor | None = None
    """As in LayerReport."""
    placement: ExpertPlacement | None = None
    """Where replicas are, whose gradients backward sums."""
    fillers: Sequence[Callable[[], None]] = ()
    """The caller's work, as in expert_parallel_mlp."""

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, PassReport]:
        """Give y (T, D) of x (T, D), and the timings."""
        plan, tokens = self.plan, self.plan.tokens
        width = x.shape[1]
        self.rows = rows = x if plan.is_identity else x.new_empty(plan.num_received, width)
        home = x.new_empty(plan.num_home, width)
        out = home if plan.is_identity else x.new_empty(x.shape[0], width)
        metadata_in: list[list[Tensor]] = []
        dispatch_wire = WireFormat(x.dtype, plan.overlap.wire_dtype)
        if not dispatch_wire.is_exact:
            self.wire_squares = torch.zeros(2, dtype=torch.float32, device=x.device)

        def metadata(_: int | None) -> PendingExchange:
            pending, received = self.send_metadata(topk_ids, topk_weights)
            metadata_in.append(received)
            return pending

        def dispatch(chunk: int | None) -> PendingExchange:
            assert chunk is not None
            return self.send_chunk(x, chunk, rows, dispatch_wire, self.wire_squares)

        def group(_: int | None) -> None:
            if not plan.is_identity:
                torch.index_select(x, 0, tokens.home_tokens[: plan.num_local], out=rows[: plan.num_local])
            ids, self.received_weights, places = self.receive_metadata(metadata_in[0], topk_ids.shape[1])
            assert self.make_experts is not None
            self.experts = self.make_experts(plan, rows, ids, self.received_weights, places)

        partials: dict[int, Tensor] = {}

        def experts(chunk: int | None) -> None:
            assert self.experts is not None
            assert chunk is not None
            if chunk < 0:
                self.experts.forward(plan.segment(chunk), out=home[plan.home_slice(chunk)])
            else:
                partials[chunk] = self.experts.forward(plan.segment(chunk))

        def combine(chunk: int | None) -> PendingExchange:
            assert chunk is not None
            return self.return_chunk(partials.pop(chunk), chunk, home, self._wire(home.dtype))

        def reduce(chunk: int | None) -> None:
            assert chunk is not None
            self._sum_at_home(home, chunk, out)

        def filler(number: int | None) -> None:
            assert number is not None
            self.fillers[number]()

        schedule = build_forward(plan.overlap, len(self.fillers))
        actions = {
            "metadata": metadata,
            "filler": filler,
            "dispatch": dispatch,
            "group": group,
            "experts": experts,
            "combine": combine,
            "reduce": reduce,
        }
        return out, execute(schedule, actions, x.device)

    def backward(
        self,
        dout: Tensor,
        needs_weights: tuple[bool, bool, bool, bool],
        agreement: BackwardAgreement | None = None,
    ) -> tuple[Tensor | None, Tensor | None, WeightGrads, PassReport]:
        """Give dx (T, D) and dtopk_weights (T, K) fp32, where some rank needs them, the weight gradients, timings.

        agreement: under way while the buffers are made; no row is posted before it has ended.
        """
        plan, tokens, experts_pass = self.plan, self.plan.tokens, self.experts
        assert experts_pass is not None
        assert self.received_weights is not None
        width = dout.shape[1]
        dout_rows = dout if plan.is_identity else dout.new_empty(plan.num_received, width)
        home = dout.new_empty(plan.num_home, width)
        dx = None
        if plan.needs_x:
            dx = home if plan.is_identity else dout.new_empty(dout.shape[0], width)
        dweights = torch.zeros_like(self.received_weights)
        dweights_home: list[Tensor] = []
        dtopk_weights: list[Tensor] = []
        weight_grads: list[WeightGrads] = []
        replica_grads: list[Tensor] = []
        partials: dict[int, Tensor] = {}

        def combine_backward(chunk: int | None) -> PendingExchange:
            assert chunk is not None
            return self.send_chunk(dout, chunk, dout_rows, self._wire(dout.dtype))

        def experts_backward(chunk: int | None) -> None:
            assert chunk is not None
            if chunk < 0:
                stays = plan.home_slice(chunk)  # both buffers start with these rows
                if not plan.is_identity:
                    torch.index_select(dout, 0, tokens.home_tokens[stays], out=dout_rows[stays])
                _, dweights[stays] = experts_pass.backward(
                    plan.segment(chunk), dout_rows, plan.needs_x, out=home[stays] if plan.needs_x else None
                )
                return
            segment = plan.segment(chunk)
            partial, dweights[plan.return_slice(chunk)] = experts_pass.backward(segment, dout_rows, plan.needs_x)
            if partial is not None:
                partials[chunk] = partial

        def dispatch_backward(chunk: int | None) -> PendingExchange:
            assert chunk is not None
            return self.return_chunk(partials.pop(chunk), chunk, home, self._wire(home.dtype))

        def routing_backward(_: int | None) -> PendingExchange:
            grads = dweights.new_empty(plan.num_home, dweights.shape[1])
            grads[: plan.num_local] = dweights[: plan.num_local]
            dweights_home.append(grads)
            return self._exchange_all(dweights.index_select(0, plan.return_order()), dweights_home, is_return=True)

        def weight_grad(_: int | None) -> None:
            weight_grads.append(experts_pass.weight_grad(dout_rows, needs_weights))

        def reduce_backward(chunk: int | None) -> None:
            assert chunk is not None
            assert dx is not None
            self._sum_at_home(home, chunk, dx)

        def reduce_routing_backward(_: int | None) -> None:
            dweights_home[0][plan.home_order()] = dweights_home[1]
            # Every pair is computed by one rank only: the other ranks' terms are zero.
            dtopk_weights.append(self.gather_sum(dweights_home[0], tokens.home_index))

        def replica_backward(_: int | None) -> PendingExchange:
            assert self.placement is not None
            packed, splits = pack_replica_grads(weight_grads[0], self.placement, plan.rank)
            replica_grads.append(torch.empty_like(packed))
            return self.transport.exchange(packed, splits, splits, replica_grads[0])

        def reduce_replica_backward(_: int | None) -> None:
            assert self.placement is not None
            weight_grads[0] = sum_replica_grads(weight_grads[0], replica_grads[0], self.placement, plan.rank)

        schedule = build_backward(
            plan.overlap,
            needs_x=plan.needs_x,
            needs_topk_weights=plan.needs_topk_weights,
            sums_replicas=self.placement is not None and self.placement.has_replicas and any(needs_weights),
        )
        actions = {
            "combine_backward": combine_backward,
            "experts_backward": experts_backward,
            "dispatch_backward": dispatch_backward,
            "routing_backward": routing_backward,
            "weight_grad": weight_grad,
            "reduce_backward": reduce_backward,
            "reduce_routing_backward": reduce_routing_backward,
            "replica_backward": replica_backward,
            "reduce_replica_backward": reduce_replica_backward,
        }
        if agreement is not None:
            agreement.wait()
        report = execute(schedule, actions, dout.device)
        return dx, dtopk_weights[0] if dtopk_weights else None, weight_grads[0], report

    def send_metadata(self, topk_ids: Tensor, topk_weights: Tensor) -> tuple[PendingExchange, list[Tensor]]:
        """Send the ids (T, K) and weights (T, K) of all chunks; what arrives is for receive_metadata."""
        plan = self.plan
        pairs = _pack_metadata(topk_ids, topk_weights).index_select(0, plan.tokens.home_tokens)
        if plan.tokens.has_padding:
            pairs[:, : topk_ids.shape[1]].masked_fill_(plan.tokens.padding()[:, None], -1)
        received = [pairs.new_empty(plan.num_received, pairs.shape[1])]
        received[0][: plan.num_local] = pairs[: plan.num_local]
        return self._exchange_all(pairs.index_select(0, plan.send_order()), received), received

    def receive_metadata(self, received: list[Tensor], top_k: int) -> tuple[Tensor, Tensor, RowPlaces]:
        """Give ids (R, K) int32, weights (R, K) fp32 and places of the received rows, once the exchange has ended."""
        places = self.plan.place_received(received[1][:, :top_k])
        received[0][places.received] = received[1]
        return *_unpack_metadata(received[0], top_k), places

    def other_row_bytes(self, x: Tensor) -> int:
        """Give the bytes of one travelling row that is not one of the forward's dispatch of x (T, D)."""
        return self._wire(x.dtype).row_bytes(x.shape[1])

    def _wire(self, dtype: torch.dtype) -> WireFormat:
        """Give how rows travel that are not the forward's dispatch: fp8 is too coarse for sums and gradients."""
        wire_dtype = self.plan.overlap.wire_dtype
        return WireFormat(dtype, None if wire_dtype == torch.float8_e4m3fn else wire_dtype)

    def _exchange_rows(
        self,
        rows: Tensor,
        splits: tuple[list[int], list[int]],
        out: Tensor,
        wire: WireFormat,
        squares: Tensor | None = None,
    ) -> PendingExchange:
        if wire.is_exact:
            return self.transport.exchange(rows, *splits, out)
        encoded = wire.encode(rows)
        if squares is not None:
            squares += wire.squares(rows, encoded)
        arriving = wire.empty(out.shape[0], out.shape[1], out.device)
        return DecodedExchange(self.transport.exchange(encoded, *splits, arriving), wire, out)

    def send_chunk(
        self, values: Tensor, chunk: int, received: Tensor, wire: WireFormat, squares: Tensor | None = None
    ) -> PendingExchange:
        """Replicate rows of values (T, D) to every rank that needs them: dispatch, and the adjoint of combine."""
        plan = self.plan
        packed = values.index_select(0, plan.tokens.home_tokens[plan.send_slice(chunk)])
        out = packed if plan.is_identity else received[plan.receive_slice(chunk)]  # none travel: 0 rows
        return self._exchange_rows(packed, (plan.send_splits(chunk), plan.receive_splits(chunk)), out, wire, squares)

    def return_chunk(self, partial: Tensor, chunk: int, home: Tensor, wire: WireFormat) -> PendingExchange:
        """Bring the chunk's finished rows home, one per received row: combine, and the adjoint of dispatch."""
        plan = self.plan
        out = home[plan.home_slice(chunk)]
        splits = plan.return_splits(chunk), plan.home_splits(chunk)
        return self._exchange_rows(partial, splits, out, wire)

    def _sum_at_home(self, home: Tensor, chunk: int, out: Tensor) -> None:
        """Sum the partial rows of the tokens that are whole with this chunk, in rank order, in fp32."""
        if self.plan.is_identity:
            return
        tokens = self.plan.token_slice(chunk)
        self.gather_sum(home, self.plan.tokens.home_index[tokens], out=out[tokens])

    def _exchange_all(self, packed: Tensor, received: list[Tensor], is_return: bool = False) -> PendingExchange:
        """Exchange rows of all chunks at once, by (rank, token); what arrives is appended to `received`."""
        splits = self.plan.all_send_splits, self.plan.all_receive_splits
        if is_return:
            splits = splits[1], splits[0]
        received.append(packed.new_empty(sum(splits[1]), packed.shape[1]))
        return self.transport.exchange(packed, *splits, received[-1])


def _pack_metadata(topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """(T, 2K) int32: ids, then the bits of the fp32 weights."""
    ids = topk_ids.clamp(-1, 2**31 - 1).to(torch.int32)  # an id past int32 must not come out as another expert's
    return torch.cat([ids, topk_weights.to(torch.float32).view(torch.int32)], dim=1)


def _unpack_metadata(packed: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return packed[:, :top_k], packed[:, top_k:].contiguous().view(torch.float32)
