"""The header of a layer call, 3 of 3: the one exchange before any row brings headers and counts, which are checked.

The exchange has one size whatever the call, so that ranks that disagree can still tell each other so. A backward begins
with an exchange of the same size, so that its header meets the header of whatever the other ranks do.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.layer import MAX_PAIRS
from tritonmoe.dispatch.call_settings import CallSettings, decode_settings
from tritonmoe.dispatch.header import HEADER_SIZE, MAGIC, CallHeader
from tritonmoe.dispatch.header_check import AllWords, check_headers
from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.transports import Transport, fail_peers_on_error
from tritonmoe.transports.base import MAX_HEADER, MAX_SEGMENTS
from tritonmoe.transports.waiting import Doing

__all__ = [
    "BackwardAgreement",
    "CallMarks",
    "check_copy_pairs",
    "check_counts",
    "check_sizes",
    "exchange_counts",
    "post_backward",
    "refuse_call",
    "spare_header_ints",
]

assert HEADER_SIZE <= MAX_HEADER


class CallMarks(NamedTuple):
    """When a rank began a pass of a call, before its first step: time.perf_counter() of the host."""

    entered: float
    counts_posted: float
    """When it had posted its counts, or in a backward what ranks agree by."""
    counts_left: float
    """When it had heard from every rank."""


def _message(transport: Transport, header: CallHeader) -> Tensor:
    """Return what every rank is told, (W, L) int64: the header, and zeros behind it, where the counts will stand."""
    size, length = transport.size, transport.message_length
    row = header.sealed().tobytes().ljust(8 * length, b"\0")
    return torch.frombuffer(bytearray(row * size), dtype=torch.int64).view(
        size, length
    )  # of Python numbers torch.tensor takes ten times as long


def _headers(received: Tensor) -> list[CallHeader]:
    return [CallHeader._make(row) for row in received[:, :HEADER_SIZE].tolist()]


def _words_of_all(transport: Transport, header: CallHeader) -> AllWords:
    """Return the words of every rank's settings: every rank calls this, once all know that the numbers differ.

    One exchange brings the lengths, a second one the texts.
    """
    assert isinstance(header.settings, CallSettings), "this rank's own header has them"
    size, text = transport.size, header.settings.text
    try:
        with Doing(lambda: f"the exchange of what differs in the {header.place}"):
            lengths = transport.exchange_counts(torch.full((size, 1), len(text), dtype=torch.int64, device="cpu"))
            width = -(-int(lengths.max()) // 8)
            padded = torch.frombuffer(bytearray(text.ljust(8 * width)), dtype=torch.int64).repeat(size, 1)
            received = transport.exchange_counts(padded)
    except TransportError as error:
        raise TransportError(
            f"the ranks' configurations differ, and the exchange that would name the differing settings failed: {error}"
        ) from error
    words = [decode_settings(row.numpy().tobytes()) for row in received]
    damaged = [rank for rank, one in enumerate(words) if one is None]
    if damaged:
        raise CountMismatch(
            f"the ranks' configurations differ, and the settings that ranks {damaged} sent were damaged on their way, "
            "so the difference can't be named"
        )
    return [one for one in words if one is not None]


def refuse_call(transport: Transport, sequence: int) -> bool:
    """Send every rank that this rank's arguments were refused, in the place of the count exchange.

    Return whether all ranks called a layer.
    """
    with Doing(lambda: f"layer call {sequence}, whose arguments it refuses"):
        received = transport.exchange_counts(_message(transport, CallHeader(sequence=sequence, error=1)))
    return all(header.magic == MAGIC for header in _headers(received))


class BackwardAgreement:
    """The exchange in which ranks compare which backward they run: posted at construction, under way until wait().

    Rows may be posted behind wait() only: where ranks run different backwards, rows of different sizes would meet, for
    which gloo aborts the process.

    Args:
        transport: of all ranks. header: what says which backward it is. entered_at: as in CallMarks.
    """

    def __init__(self, transport: Transport, header: CallHeader, entered_at: float) -> None:
        self._transport, self._header, self._entered_at = transport, header, entered_at
        self._message = _message(transport, header)
        self._pending = transport.post_counts(self._message)
        self._posted_at = time.perf_counter()
        self.marks: CallMarks | None = None
        """Of the backward, known once wait() has returned."""

    def wait(self) -> None:
        """Return when all ranks are known to run this backward.

        Raises:
            CountMismatch: on every rank alike, where some rank runs another backward or a forward. TransportError: a
            rank didn't come, or refused the arguments of a forward.
        """
        try:
            with Doing(lambda: f"the agreement on the {self._header.place}"):
                received = self._pending.wait()
        except TransportError as error:
            raise TransportError(f"before the {self._header.place}: {error}") from error
        self.marks = CallMarks(self._entered_at, self._posted_at, time.perf_counter())
        if not torch.equal(received, self._message):  # every rank says what this one does
            check_headers(_headers(received), partial(_words_of_all, self._transport, self._header))


def post_backward(transport: Transport, header: CallHeader, entered_at: float) -> BackwardAgreement | None:
    """Start a backward's agreement, and return it; None on one rank."""
    return None if transport.size == 1 else BackwardAgreement(transport, header, entered_at)


def exchange_counts(
    transport: Transport,
    header: CallHeader,
    counts: Tensor,
    where: str = "before any chunk",
    meanwhile: Callable[[], object] | None = None,
    extra: Tensor | None = None,
) -> tuple[list[CallHeader], Tensor, Tensor, CallMarks, Tensor | None]:
    """Exchange headers and counts, and raise what exchange_plan raises unless all ranks make the same call.

    The counts that this rank is told are for check_counts.

    Args:
        counts: (kinds, segments, W) int64, what each rank is told; kind 0 are the rows that it will be sent, kind 1 the
            pairs that it will compute.
        meanwhile: what is done while the counts travel.
        extra: (n,) int64, what every rank is told in the room that the segments leave, at most spare_header_ints().
    Returns:
        Every rank's header, rows and pairs from every rank i to every rank k (2, W, W), and the counts that each rank
        told this one, shaped as `counts`; when that was, from the start of the exchange; and every rank's `extra`,
        (W, n), None where some rank has told nothing.
    """
    entered_at = time.perf_counter()
    num_kinds, num_segments, size = counts.shape
    message, first = _message(transport, header), MAX_HEADER + 2 * size
    message[:, MAX_HEADER:first] = counts[:2].sum(1).flatten()
    in_kinds = message[:, first:].view(size, num_kinds, MAX_SEGMENTS)
    in_kinds[:, :, :num_segments] = counts.permute(2, 0, 1)
    if extra is not None:
        room = torch.zeros(num_kinds * (MAX_SEGMENTS - num_segments), dtype=torch.int64, device="cpu")
        room[0], room[1 : 1 + len(extra)] = 1, extra
        in_kinds[:, :, num_segments:] = room.view(num_kinds, -1)
    try:
        with Doing(lambda: f"the count exchange of the {header.place}"):
            pending = transport.post_counts(message)
            posted_at = time.perf_counter()
            if meanwhile is not None:
                with fail_peers_on_error(transport):
                    meanwhile()
            received = pending.wait()
    except TransportError as error:
        raise TransportError(f"count exchange of layer call {header.sequence}, {where}: {error}") from error
    marks = CallMarks(entered_at, posted_at, time.perf_counter())
    headers = _headers(received)
    check_headers(headers, partial(_words_of_all, transport, header))
    traffic = received[:, MAX_HEADER:first].reshape(size, 2, size).transpose(0, 1).contiguous()
    check_sizes(traffic[0].sum(0).tolist(), header.top_k)
    in_kinds = received[:, first:].view(size, num_kinds, MAX_SEGMENTS)
    extra_counts = None
    if extra is not None:
        rooms = in_kinds[:, :, num_segments:].reshape(size, -1)
        extra_counts = rooms[:, 1 : 1 + len(extra)] if bool(rooms[:, 0].all()) else None
    return headers, traffic, in_kinds[:, :, :num_segments].permute(1, 2, 0), marks, extra_counts


def spare_header_ints(num_segments: int) -> int:
    """Return how many integers fit behind the counts of a call with so many segments."""
    return 3 * (MAX_SEGMENTS - num_segments) - 1


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

    With wrong counts some transports would read memory that was never written, or abort.

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


def check_copy_pairs(pairs: Sequence[Sequence[int]], copy_pairs: Sequence[Sequence[int]], rank: int) -> None:
    """Raise CountMismatch unless the pairs of copies, [segment][rank], are a part of the pairs that each rank tells."""
    for segment, of_copies in zip(pairs, copy_pairs, strict=True):
        for sender, (count, of_copy) in enumerate(zip(segment, of_copies, strict=True)):
            if not 0 <= of_copy <= count:
                raise CountMismatch(
                    f"rank {rank} got counts of rank {sender} that contradict each other: {count} pairs in a segment, "
                    f"of which {of_copy} are for copies of experts: they were damaged on their way"
                )


def check_sizes(received: Sequence[int], top_k: int) -> None:
    """Raise ValueError where some rank would receive more pairs than int32 positions can number."""
    for rank, rows in enumerate(received):
        if rows * top_k > MAX_PAIRS:
            raise ValueError(
                f"rank {rank} would receive {rows} rows of {top_k} pairs, more than {MAX_PAIRS} in all, the range of "
                "the int32 positions: use smaller batches or more ranks"
            )
