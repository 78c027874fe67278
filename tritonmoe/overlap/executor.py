"""Runs a schedule: computes what is on the compute lane, posts what is on the comm lane, waits where a step needs it.

The same loop serves every transport and device: the only place where it meets communication is
PendingExchange.wait(). What a step does is in LayerPass, which walks one layer call forward and backward.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..backends.reference import WeightGrads
from ..capacity import is_captured
from ..config import OverlapPlan
from ..dispatch import DispatchPlan
from ..errors import TransportError
from ..placement import ExpertPlacement, pack_replica_grads, sum_replica_grads
from ..transports import PendingExchange, Transport
from ..wire import DecodedExchange, WireFormat
from .schedule import Schedule, Step, build_backward, build_forward

__all__ = ["ExpertsPass", "LayerPass", "LayerReport", "PassReport", "StepTiming", "execute"]


def _mark(device: torch.device) -> "float | torch.cuda.Event | None":
    """A moment on the lane that computes: the host's clock, or an event of its stream; None in a CUDA graph."""
    if is_captured(device):
        return None
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))  # which need not be the current device
        return event
    return time.perf_counter()


@dataclass(frozen=True)
class StepTiming:
    """When one step ran, in seconds from the start of its pass."""

    step: Step
    start_s: float
    end_s: float
    """For an exchange: when its rows had arrived, as far as known (else when it was waited for)."""
    wait_s: float
    """For an exchange: how long the compute lane stood still for it."""
    post_s: float = 0.0
    """For an exchange: how long packing and posting it took, on the compute lane."""


class PassReport:
    """The timings of one pass over a layer; read lazily, since on CUDA that waits until the device has ended it."""

    def __init__(self, device: torch.device) -> None:
        self._origin = _mark(device)
        self._end = self._origin
        self._compute: list[tuple[Step, object, object]] = []
        self._exchanges: list[tuple[Step, object, object, object, object, float | None]] = []
        self._steps: list[StepTiming] | None = None
        self.inside: list[tuple[Step, PassReport]] = []
        """On two levels: what steps did inside the node, with times from the start of each."""

    def _seconds(self, mark: object) -> float:
        if self._origin is None:
            raise RuntimeError("a CUDA graph captured this call, and replays are not timed: time them as a whole")
        if isinstance(mark, float):
            assert isinstance(self._origin, float)
            return mark - self._origin
        return self._origin.elapsed_time(mark) / 1e3  # type: ignore[union-attr, arg-type]

    @property
    def steps(self) -> list[StepTiming]:
        """Every step, by the time at which it started or was posted."""
        if self._steps is None:
            self._wait_until_over()
            steps = [
                StepTiming(step, self._seconds(first), self._seconds(last), 0.0) for step, first, last in self._compute
            ]
            for step, started, posted, before, after, finished in self._exchanges:
                waited = self._seconds(after) - self._seconds(before)
                posting = self._seconds(posted) - self._seconds(started)
                end = self._seconds(after if finished is None else finished)
                steps.append(StepTiming(step, self._seconds(started), end, waited, posting))
            self._steps = sorted(steps, key=lambda timing: timing.start_s)
        return self._steps

    @property
    def steps_inside(self) -> list[StepTiming]:
        """On two levels: what steps did inside the node, with times from the start of this pass."""
        offsets_s = [self._seconds(report._origin) for _, report in self.inside]
        return [
            replace(timing, start_s=timing.start_s + offset_s, end_s=timing.end_s + offset_s)
            for (_, report), offset_s in zip(self.inside, offsets_s, strict=True)
            for timing in report.steps
        ]

    @property
    def is_over(self) -> bool:
        """Whether the pass has ended, so that reading it waits for nothing."""
        return not isinstance(self._end, torch.cuda.Event) or self._end.query()

    def _wait_until_over(self) -> None:
        """Wait for this pass, whose marks stand on one stream, and not for what is enqueued behind it."""
        if isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()

    @property
    def total_s(self) -> float:
        self._wait_until_over()
        return self._seconds(self._end)

    @property
    def exposed_communication_s(self) -> float:
        """How long the compute lane stood still for exchanges."""
        return sum(timing.wait_s for timing in self.steps)

    def lane_s(self, *kinds: str) -> float:
        """Give the summed duration of the steps of these kinds."""
        return sum(timing.end_s - timing.start_s for timing in self.steps if timing.step.kind in kinds)

    @property
    def compute_s(self) -> float:
        return sum(t.end_s - t.start_s for t in self.steps if t.step.lane == "compute")

    @property
    def communication_s(self) -> float:
        """Give the time during which at least one exchange was under way."""
        spans = sorted((t.start_s, t.end_s) for t in self.steps if t.step.lane == "comm")
        busy, reached = 0.0, 0.0
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return busy


@dataclass
class LayerReport:
    """What the last call of a layer did: traffic, and the time of every step."""

    rank: int
    traffic_rows: Tensor
    """(W, W) int64: the size of S_ik, the tokens of rank i (row) that need an expert of rank k (column); with a
    capacity the room for them, which is what travels."""
    traffic_pairs: Tensor
    """The same for the pairs of rank i that rank k computes."""
    row_bytes: int
    """Bytes of one row of the forward's dispatch (D columns of the layer's dtype, or of its wire format)."""
    overlap: OverlapPlan
    """What ran; give it as a layer's `overlap` to run the same again."""
    top_k: int
    home_offsets: tuple[int, ...]
    """Where this rank's rows for each segment (local rows, then chunks) start when sent, and the end."""
    receive_offsets: tuple[int, ...]
    """The same for the rows that came here, when they return."""
    pair_offsets: tuple[int, ...]
    """The same for their routed pairs."""
    forward: PassReport
    backward: PassReport | None = None
    other_row_bytes: int | None = None
    """Bytes of one row of the other exchanges of rows; None where it is row_bytes."""
    choice: str = "as given"
    """Why this plan was chosen, in one sentence."""
    wire_squares: Tensor | None = None
    """(2,) fp32: summed squares of what the wire format changed in the dispatched rows, and of the rows."""
    first_run: "LayerReport | None" = None
    """Where rows of some rank didn't fit into the capacity, so that the call ran again without one: the report of the
    run before. All else here is of the second run, whose results are the call's."""
    rows_between_nodes: int | None = None
    """On a TwoLevelTransport: the rows that this rank sends to other nodes in the forward's dispatch."""

    @property
    def overflowed(self) -> bool:
        """Whether rows of some rank didn't fit into the capacity."""
        return self.first_run is not None

    @property
    def wire_error(self) -> float:
        """Give the relative error (root mean square) that the wire format made in the dispatched rows; 0 without one.

        Reads the device.
        """
        if self.wire_squares is None:
            return 0.0
        changed, total = self.wire_squares.tolist()
        return (changed / total) ** 0.5 if total else 0.0

    @property
    def num_chunks(self) -> int:
        return self.overlap.num_chunks

    @property
    def traffic_bytes(self) -> Tensor:
        """(W, W) int64: bytes that rank i sends to rank k in the forward's dispatch; own rows: 0."""
        off_diagonal = 1 - torch.eye(self.traffic_rows.shape[0], dtype=torch.int64)
        return self.traffic_rows * off_diagonal * self.row_bytes


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
                before = _mark(device)
                try:
                    pending.wait()
                except TransportError as error:
                    raise _at_step(schedule[earlier], error) from error
                after = _mark(device)
                # Only the time is kept: the exchange itself would keep its buffers.
                finished = pending.finished_at() if device.type == "cpu" else None
                report._exchanges.append((schedule[earlier], started, posted_at, before, after, finished))
        started = _mark(device)
        try:
            pending_or_none = actions[step.kind](step.chunk)
        except TransportError as error:
            raise _at_step(step, error) from error
        if step.lane == "comm":
            assert pending_or_none is not None
            posted[position] = (started, _mark(device), pending_or_none)
        else:
            report._compute.append((step, started, _mark(device)))
    report._end = _mark(device)
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


MakeExperts = Callable[[DispatchPlan, Tensor, Tensor, Tensor], ExpertsPass]
"""(the plan, which knows by now where received rows lie, rows (R, D), topk_ids (R, K) int32 global, topk_weights (R, K)
fp32) -> the experts of one call."""

Combine = Callable[..., Tensor]
"""The combine op of the layer's backend."""


@dataclass
class LayerPass:
    """One layer call on one rank: the buffers, and what each kind of step does with them.

    forward() and backward() may be used on different objects, as long as the second is given the first one's
    `experts`, `rows` and `received_weights`.
    """

    plan: DispatchPlan
    """The backward of chunks of experts needs the plan as the forward has left it here."""
    transport: Transport
    combine: Combine
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
            ids, self.received_weights = self.receive_metadata(metadata_in[0], topk_ids.shape[1])
            assert self.make_experts is not None
            self.experts = self.make_experts(self.plan, rows, ids, self.received_weights)

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
        self, dout: Tensor, needs_weights: tuple[bool, bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, WeightGrads, PassReport]:
        """Give dx (T, D) and dtopk_weights (T, K) fp32, where some rank needs them, the weight gradients, timings."""
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
            dtopk_weights.append(self.combine(dweights_home[0], tokens.home_index))

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
        report = execute(schedule, actions, dout.device)
        return dx, dtopk_weights[0] if dtopk_weights else None, weight_grads[0], report

    def send_metadata(self, topk_ids: Tensor, topk_weights: Tensor) -> tuple[PendingExchange, list[Tensor]]:
        """Send the ids (T, K) and weights (T, K) of all chunks; what arrives is for receive_metadata."""
        plan = self.plan
        pairs = _pack_metadata(topk_ids, topk_weights).index_select(0, plan.tokens.home_tokens)
        if plan.tokens.padding is not None:
            pairs[:, : topk_ids.shape[1]].masked_fill_(plan.tokens.padding[:, None], -1)
        received = [pairs.new_empty(plan.num_received, pairs.shape[1])]
        received[0][: plan.num_local] = pairs[: plan.num_local]
        return self._exchange_all(pairs.index_select(0, plan.send_order()), received), received

    def receive_metadata(self, received: list[Tensor], top_k: int) -> tuple[Tensor, Tensor]:
        """Give the ids (R, K) int32 and weights (R, K) fp32 of the received rows, once the exchange has ended."""
        self.plan = self.plan.place_received(received[1][:, :top_k])
        received[0][self.plan.receive_order()] = received[1]
        return _unpack_metadata(received[0], top_k)

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
        self.combine(home, self.plan.tokens.home_index[tokens], out=out[tokens])

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
