"""RowExchanges: how the rows, ids and weights of one plan travel over a transport, in either direction and pass."""

from typing import Any, Protocol

import torch
from torch import Tensor

from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.experts.tensors import NO_TENSORS, OF_ROWS, CallTensors
from tritonmoe.overlap.steps import Way
from tritonmoe.transports import PendingExchange, Transport
from tritonmoe.transports.wire import DecodedExchange, WireFormat

__all__ = ["GatherSum", "RowExchanges", "SentRows"]


class GatherSum(Protocol):
    """The operation gather_sum of a backend, as it is used for sums at home: without weights."""

    def __call__(self, y: Tensor, index: Tensor, *, out: Tensor | None = None) -> Tensor: ...


def pack(tensors: CallTensors[Tensor]) -> Tensor:
    """Return what belongs to rows, (R, columns) int32: ids, the bits of fp32 weights and, if there are any, seeds."""
    ids = tensors.topk_ids.clamp(-1, 2**31 - 1)  # an id past int32 must not come out as another expert's
    columns = [
        values.to(torch.float32).view(torch.int32) if values.is_floating_point() else values.to(torch.int32)
        for values in tensors._replace(topk_ids=ids).of_rows()
        if values is not None
    ]
    return torch.cat([bits if bits.dim() == 2 else bits.unsqueeze(1) for bits in columns], dim=1)


def unpack(packed: Tensor, like: CallTensors[Tensor]) -> CallTensors[Tensor]:
    """Return what pack() made int32 of, of rows (R, columns) that other ranks may have packed.

    like: what this rank has packed of its own rows; all ranks have the same tensors.
    """
    unpacked: dict[str, Any] = {}
    first = 0
    for name, values in zip(OF_ROWS, like.of_rows(), strict=True):
        if values is None:
            continue
        last = first + (values.shape[1] if values.dim() == 2 else 1)
        bits, first = packed[:, first:last], last
        bits = bits.contiguous().view(torch.float32) if values.is_floating_point() else bits
        unpacked[name] = bits if values.dim() == 2 else bits.flatten()
    return NO_TENSORS._replace(**unpacked)


class RowExchanges:
    """The exchanges of one pass on one level, and the sums of what they bring home."""

    _stored: Tensor
    """What comes with received rows, packed as pack() does, one row for each, from send_metadata() to
    receive_metadata(); while the exchange is under way it has the rows that stay on this rank."""
    _arriving: Tensor
    """The rows of it that travel, by (rank, token)."""

    def __init__(self, plan: DispatchPlan, transport: Transport, gather_sum: GatherSum) -> None:
        self.plan, self.transport, self.gather_sum = plan, transport, gather_sum

    def send_metadata(self, tensors: CallTensors[Tensor]) -> PendingExchange:
        """Send what belongs to the T rows of all chunks; receive_metadata() gives what arrives."""
        plan = self.plan
        pairs = pack(tensors).index_select(0, plan.tokens.home_tokens)
        if plan.tokens.has_padding:
            pairs[:, : tensors.topk_ids.shape[1]].masked_fill_(plan.tokens.padding()[:, None], -1)
        self._stored = pairs.new_empty(plan.num_received, pairs.shape[1])
        self._stored[: plan.num_local] = pairs[: plan.num_local]
        pending, self._arriving = self.exchange_all(pairs.index_select(0, plan.send_order()), Way.TO_EXPERTS)
        return pending

    def receive_metadata(self, like: CallTensors[Tensor]) -> tuple[CallTensors[Tensor], RowPlaces]:
        """Return what came with the received rows, and their places, once the exchange has ended; like: as in unpack().

        These are int32 and fp32.
        """
        stored, arrived = self._stored, self._arriving
        del self._stored, self._arriving
        places = self.plan.place_received(arrived[:, : like.topk_ids.shape[1]])
        stored[places.received] = arrived
        return unpack(stored, like), places

    def pack(self, values: Tensor, chunk: int) -> Tensor:
        """Copy the rows of `values` (T, D) that a chunk sends, rank by rank; what two ranks need is copied twice."""
        return values.index_select(0, self.plan.tokens.home_tokens[self.plan.send_slice(chunk)])

    def send_chunk(
        self, packed: Tensor, chunk: int, received: Tensor, wire: WireFormat, sums: Tensor | None = None
    ) -> PendingExchange:
        """Send the packed rows of a chunk to every rank that needs them: dispatch, and the adjoint of combine.

        Args:
            received: (R, D), where the rows of the chunk arrive. wire: how they travel.
            sums: to which what the wire format did to the rows is added (rounding_sums() of transports/wire.py).
        """
        plan, segment = self.plan, self.plan.segment(chunk)
        out = packed if plan.is_identity else received[plan.receive_slice(chunk)]  # none travel: 0 rows
        return self._exchange_rows(packed, (plan.tokens.rows[segment], plan.receive_rows[segment]), out, wire, sums)

    def return_chunk(self, partial: Tensor, chunk: int, home: Tensor, wire: WireFormat) -> PendingExchange:
        """Bring the chunk's finished rows home, one per received row: combine, and the adjoint of dispatch."""
        plan, segment = self.plan, self.plan.segment(chunk)
        splits = plan.return_rows[segment], plan.tokens.return_rows[segment]
        return self._exchange_rows(partial, splits, home[plan.home_slice(chunk)], wire)

    def sum_at_home(self, home: Tensor, chunk: int, out: Tensor) -> None:
        """Sum the rows at home (S, D) of the tokens that are whole with this chunk, in rank order, in fp32.

        The sums are written to the rows of those tokens in `out` (T, D).
        """
        if self.plan.is_identity:
            return
        tokens = self.plan.token_slice(chunk)
        self.gather_sum(home, self.plan.tokens.home_index[tokens], out=out[tokens])

    def exchange_all(self, packed: Tensor, way: Way) -> tuple[PendingExchange, Tensor]:
        """Exchange rows of all chunks at once, by (rank, token); the second result is where they arrive."""
        splits = self.plan.all_send_splits, self.plan.all_receive_splits
        if way is Way.HOME:
            splits = splits[1], splits[0]
        arriving = packed.new_empty(sum(splits[1]), packed.shape[1])
        return self.transport.exchange(packed, *splits, arriving), arriving

    def _exchange_rows(
        self,
        rows: Tensor,
        splits: tuple[list[int], list[int]],
        out: Tensor,
        wire: WireFormat,
        sums: Tensor | None = None,
    ) -> PendingExchange:
        if wire.is_plain:
            return self.transport.exchange(rows, *splits, out)
        encoded = wire.encode(rows)
        if sums is not None:
            sums += wire.rounding_sums(rows, encoded)
        arriving = wire.empty(out.shape[0], out.shape[1], out.device)
        return DecodedExchange(self.transport.exchange(encoded, *splits, arriving), wire, out)


class SentRows:
    """Rows (T, D) on their way to experts: x in a forward, gradients of outputs in a backward.

    In an ExpertPrecision they are encoded once, whichever ranks need them; they travel as codes, arrive as codes, and
    are decoded by decode() before a chunk is computed. Other wire formats encode what is sent, and decode what arrives.
    """

    arrived: Tensor
    """(R, columns): the received rows as they travel."""
    received: Tensor
    """(R, D): the same as the experts take them, of a chunk from decode() on."""

    def __init__(self, exchanges: RowExchanges, rows: Tensor, wire: WireFormat) -> None:
        plan = exchanges.plan
        self.exchanges, self.wire = exchanges, wire
        self.travel_as_codes = wire.precision is not None
        self.sent = wire.encode(rows) if self.travel_as_codes else rows
        self.arrived = self.sent
        if not plan.is_identity:
            self.arrived = self.sent.new_empty(plan.num_received, self.sent.shape[1])
        self.received = self.arrived
        if self.travel_as_codes:
            self.received = rows.new_empty(self.arrived.shape[0], rows.shape[1])

    def send(self, chunk: int, sums: Tensor | None = None, packed: Tensor | None = None) -> PendingExchange:
        """Send a chunk's rows, packed already or not; sums: as in RowExchanges.send_chunk()."""
        wire = WireFormat(self.sent.dtype) if self.travel_as_codes else self.wire
        if packed is None:
            packed = self.exchanges.pack(self.sent, chunk)
        return self.exchanges.send_chunk(packed, chunk, self.arrived, wire, sums)

    def keep_home(self, stays: slice) -> None:
        """Copy rows that stay on this rank: where they lie at home they lie among the received ones too."""
        if self.arrived is not self.sent:
            home_tokens = self.exchanges.plan.tokens.home_tokens
            torch.index_select(self.sent, 0, home_tokens[stays], out=self.arrived[stays])

    def decode(self, places: slice) -> None:
        """Decode received rows that travel as codes."""
        if self.travel_as_codes:
            self.wire.decode(self.arrived[places], self.received[places])
