"""The one exchange before any row of a layer call: every rank's header and counts, checked alike on every rank.

Its size is fixed whatever the call, so that ranks that disagree can still say so.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .config import MAX_PAIRS
from .errors import CapacityOverflow, CountMismatch, NonFiniteScores, TransportError
from .overlap_config import WIRE_DTYPES, OverlapPlan
from .transports import Transport
from .transports.base import MAX_HEADER, MAX_SEGMENTS

__all__ = [
    "DTYPE_CODES",
    "CallHeader",
    "check_counts",
    "check_headers",
    "check_sizes",
    "exchange_counts",
    "in_millionths",
    "refuse_call",
]

MAGIC = 0x7417_0E
CHUNK_BY = ("tokens", "experts")
SAVES = ("hidden", "input")
DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}


@dataclass(frozen=True)
class CallHeader:
    """What one rank says of one layer call; every rank sees every rank's. All are integers on the wire."""

    magic: int
    sequence: int
    """How many layer calls this transport has seen."""
    num_chunks: int
    num_experts: int
    top_k: int
    hidden_size: int
    dtype: int
    """A code from DTYPE_CODES."""
    chunk_sizes: int
    """A checksum of the chunks' relative sizes."""
    local_first: int
    local_start: int
    window: int
    backward_window: int
    serial: int
    wire_dtype: int
    """A place in WIRE_DTYPES."""
    chunk_by: int
    """A place in CHUNK_BY."""
    grad_enabled: int
    needs_any: int
    """Whether this rank needs any gradient of the call ..."""
    needs_x: int
    needs_topk_weights: int
    error: int = 0
    """Whether this rank's arguments were refused."""
    nonfinite_rows: int = 0
    """Tokens whose router scores were not finite."""
    vote: int = 0
    """What this rank tells the other ranks' tuners: see Message in overlap/tuner.py."""
    second_vote: int = 0
    predicted_ns: int = 0
    measured_call: int = -1
    measured_ns: int = 0
    working_set: int = 0
    placement: int = 0
    """A checksum of which rank holds which experts, 0 for the contiguous placement."""
    replica_grads: int = 0
    """With replicas, a bit for each kind of weight that needs a gradient: all owners must sum the same."""
    capacity: int = 0
    """OverlapPlan.capacity in millionths, 0 for none."""
    overflowed: int = 0
    """In the exchange that ends a call with a capacity: whether this rank had rows that it has no room for."""
    replay_overflowed: int = 0
    """Whether that was so in a replay of a CUDA graph before this call."""
    compiled: int = 0
    """Whether this rank's call stands in a compiled graph, which has a backward only if this rank needs gradients."""
    layer: int = -1
    """Which of the layers made on this transport calls, in the order in which they were made; -1: a function call."""
    auto: int = 0
    """Whether the plan was chosen for calls of this kind (num_chunks="auto")."""
    save: int = 0
    """A place in SAVES."""
    deterministic: int = 0
    """torch.are_deterministic_algorithms_enabled()."""

    @classmethod
    def of(cls, overlap: OverlapPlan, **others: int) -> "CallHeader":
        """Give the header of a call that runs this plan; `others` are the fields that don't follow from it."""
        return cls(
            magic=MAGIC,
            num_chunks=overlap.num_chunks,
            chunk_sizes=zlib.crc32(str(overlap.chunk_sizes).encode()),
            local_first=int(overlap.local_first),
            local_start=overlap.local_start,
            window=overlap.window,
            backward_window=overlap.backward_window,
            serial=int(overlap.serial),
            wire_dtype=WIRE_DTYPES.index(overlap.wire_dtype),
            chunk_by=CHUNK_BY.index(overlap.chunk_by),
            capacity=in_millionths(overlap.capacity or 0),
            **others,
        )


def in_millionths(capacity: float) -> int:
    """Give a capacity as ranks compare it."""
    return round(1e6 * capacity)


HEADER_SIZE = len(fields(CallHeader))
assert HEADER_SIZE <= MAX_HEADER
SAME_CALL = ("sequence", "layer", "num_experts", "top_k", "hidden_size", "dtype", "placement")
CHOSEN = ("num_chunks", "chunk_sizes", "local_start", "window", "backward_window", "chunk_by")
"""What num_chunks="auto" chooses."""
SAME_PLAN = (*CHOSEN, "local_first", "serial", "wire_dtype", "capacity", "replica_grads")
KINDS = {
    "auto": ("num_chunks", ("given", '"auto"')),
    "grad_enabled": ("grad mode", ("torch.no_grad()", "torch.enable_grad()")),
    "save": ("save", SAVES),
    "deterministic": ("torch.use_deterministic_algorithms", ("not set", "set")),
}
"""What may differ between ranks, and makes them choose differently: its name, and the words for its values."""


def refuse_call(transport: Transport, sequence: int) -> None:
    """Tell every rank that this rank's arguments were refused, in the place of the count exchange."""
    counts = torch.zeros(transport.size, transport.message_length, dtype=torch.int64, device="cpu")
    names = [field.name for field in fields(CallHeader)]
    counts[:, names.index("magic")] = MAGIC
    counts[:, names.index("sequence")] = sequence
    counts[:, names.index("error")] = 1
    transport.exchange_counts(counts)


def exchange_counts(
    transport: Transport, header: CallHeader, counts: Tensor, where: str = "before any chunk"
) -> tuple[list[CallHeader], Tensor, Tensor]:
    """Exchange headers and counts, and raise what exchange_plan raises unless all ranks make the same call.

    The counts that this rank is told are for check_counts.

    Args:
        counts: (kinds, segments, W) int64, what each rank is told; kind 0 are the rows that it will be sent, kind 1 the
            pairs that it will compute.
    Returns:
        Every rank's header, rows and pairs from every rank i to every rank k (2, W, W), and the counts that each rank
        told this one, shaped as `counts`.
    """
    num_kinds, num_segments, size = counts.shape
    message = torch.zeros(size, transport.message_length, dtype=torch.int64, device="cpu")
    message[:, :HEADER_SIZE] = torch.tensor([getattr(header, field.name) for field in fields(header)], device="cpu")
    first = MAX_HEADER + 2 * size
    message[:, MAX_HEADER:first] = counts[:2].sum(1).flatten()
    message[:, first:].view(size, num_kinds, MAX_SEGMENTS)[:, :, :num_segments] = counts.permute(2, 0, 1)
    try:
        received = transport.exchange_counts(message)
    except TransportError as error:
        raise TransportError(f"count exchange of layer call {header.sequence}, {where}: {error}") from error
    headers = [CallHeader(*row) for row in received[:, :HEADER_SIZE].tolist()]
    check_headers(headers)
    traffic = received[:, MAX_HEADER:first].reshape(size, 2, size).transpose(0, 1).contiguous()
    check_sizes(traffic[0].sum(0).tolist(), header.top_k)
    told = received[:, first:].view(size, num_kinds, MAX_SEGMENTS)[:, :, :num_segments].permute(1, 2, 0)
    return headers, traffic, told


def check_headers(headers: Sequence[CallHeader]) -> None:
    """Raise the same error on every rank unless all ranks make the same call."""
    strangers = [rank for rank, h in enumerate(headers) if h.magic != MAGIC]
    if strangers:
        raise CountMismatch(
            f"ranks {strangers} sent something that is not a layer call: every rank must make the same "
            "expert-parallel calls, in the same order, on this transport"
        )
    refused = [rank for rank, h in enumerate(headers) if h.error]
    if refused:
        raise TransportError(f"ranks {refused} refused the arguments of this layer call; see the error raised there")
    _check_agreement(headers, SAME_CALL)
    if any(h.needs_any for h in headers) and not all(h.grad_enabled for h in headers):
        without = [rank for rank, h in enumerate(headers) if not h.grad_enabled]
        raise CountMismatch(
            f"ranks {without} run under torch.no_grad() while other ranks need gradients of this layer call: "
            "every rank must run its backward, so use one grad mode on all"
        )
    without = [rank for rank, h in enumerate(headers) if h.compiled and not h.needs_any]
    if without and any(h.needs_any for h in headers):
        raise CountMismatch(
            f"ranks {without} run this layer call in a compiled graph in which it needs no gradient, while other ranks "
            "need gradients of it: every rank must run its backward, so train something there too, or leave this layer "
            "out of the graph on those ranks (torch.compiler.disable)"
        )
    _check_agreement(headers, SAME_PLAN)
    poisoned = [rank for rank, h in enumerate(headers) if h.replay_overflowed]
    if poisoned:
        raise CapacityOverflow(
            f"ranks {poisoned} heard of a replay of a CUDA graph in which rows of some rank didn't fit into "
            "OverlapConfig.capacity or its router scores weren't finite: outputs and gradients of that replay are NaN. "
            "Use a larger capacity, or leave these layers out of the graph"
        )
    bad = {rank: h.nonfinite_rows for rank, h in enumerate(headers) if h.nonfinite_rows}
    if bad:
        said = ", ".join(f"rank {rank}: {count}" for rank, count in bad.items())
        raise NonFiniteScores(
            f"router scores or weights of some tokens are NaN or infinite ({said}): "
            "look for an overflow in the activations before the router"
        )


def _check_agreement(headers: Sequence[CallHeader], names: Sequence[str]) -> None:
    """Raise CountMismatch unless these fields are the same on all ranks."""
    for name in names:
        values = [getattr(h, name) for h in headers]
        if len(set(values)) > 1:
            said = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            why = _other_kinds(headers) if name in CHOSEN else ""
            raise CountMismatch(
                f"the ranks disagree on {name} of this layer call ({said}): "
                + (why or "give every rank the same configuration and make the same calls in the same order")
            )


def _other_kinds(headers: Sequence[CallHeader]) -> str:
    """Say what makes ranks choose another plan for this call, and the way out; "" where none chose, or all alike."""
    said = []
    for name, (words, words_of_value) in KINDS.items():
        ranks: dict[int, list[int]] = {}
        for rank, h in enumerate(headers):
            ranks.setdefault(getattr(h, name), []).append(rank)
        if len(ranks) > 1:
            said.append(f"{words} is " + ", ".join(f"{words_of_value[v]} on ranks {r}" for v, r in ranks.items()))
    if not said or not any(h.auto for h in headers):
        return ""
    return (
        'num_chunks="auto" learns a plan for each kind of call, and this one is of another kind on some ranks: '
        f"{'; '.join(said)}. Make it the same on every rank, or give every rank the same num_chunks"
    )


def check_counts(
    rows: Sequence[Sequence[int]],
    pairs: Sequence[Sequence[int]],
    return_rows: Sequence[Sequence[int]],
    traffic: Tensor,
    traffic_pairs: Tensor,
    top_k: int,
    rank: int,
) -> None:
    """Raise CountMismatch unless what every rank says of its segments is what it says of the whole call.

    Some transports would read memory that was never written, or abort, where counts are wrong.

    Args:
        rows, pairs, return_rows: [segment][rank]: rows that come to this rank, their pairs that it computes, rows that
            it returns. traffic, traffic_pairs: (W, W), of rows and of pairs.
    """
    totals = zip(traffic[:, rank].tolist(), traffic_pairs[:, rank].tolist(), strict=True)
    for sender, (total, total_pairs) in enumerate(totals):
        row_counts, pair_counts, return_counts = (
            [segment[sender] for segment in counts] for counts in (rows, pairs, return_rows)
        )
        here, is_right = 0, sum(row_counts) == sum(return_counts) == total and sum(pair_counts) == total_pairs
        for r, p, back in zip(row_counts, pair_counts, return_counts, strict=True):
            here += r  # rows that have come and not gone back
            is_right &= 0 <= r <= p and 0 <= back <= p <= top_k * here
            here -= back
        if not is_right:
            returning = "" if return_counts == row_counts else f", of which {return_counts} return,"
            raise CountMismatch(
                f"rank {rank} got counts of rank {sender} that contradict each other: {total} rows in all, by segment "
                f"{row_counts} rows{returning} with {pair_counts} pairs of at most {top_k} a row, {total_pairs} in "
                "all: they were damaged on their way"
            )


def check_sizes(received: Sequence[int], top_k: int) -> None:
    """Raise ValueError where some rank would receive more pairs than int32 positions can number."""
    for rank, rows in enumerate(received):
        if rows * top_k > MAX_PAIRS:
            raise ValueError(
                f"rank {rank} would receive {rows} rows of {top_k} pairs, more than {MAX_PAIRS} in all, the range of "
                "the int32 positions: use smaller batches or more ranks"
            )
