"""fit_links: latency, rate and slowness of every link, from when the rows of every exchange arrived at every rank.

A message goes out when the ports of both of its ranks have turned to its exchange, and takes as long as the busier of
the two. A port that is slow delays all messages of its rank, a slow link those of one pair of ranks in one direction.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.overlap.simulation.cost_model import EachLink, InsidePorts, LinkCosts
from tritonmoe.tools.doctor.messages import Messages, Reach, messages_of, reaches
from tritonmoe.tools.doctor.samples import medians, weighted_median
from tritonmoe.tools.recording.call_recording import RecordedCall, Recording

__all__ = ["SMALLEST_RATIO", "LinkRatios", "fit_links"]

SMALLEST_RATIO = 1.15
"""A port or link that is slower than the others by less than this is taken for as fast."""
ROUNDS = 5
START_SHARE = 0.25
"""The first guess of the rate lets so many messages of all be faster."""
SHORTEST_S = 1e-6
LEAST_BYTE_S = 1e-18
"""Of links whose bytes take no time."""
AGAINST = 2.0
"""With rendezvous what is sent against a slow link waits for that one's acknowledgements: a link so many times as
fast as the slow one in the other direction is not slow itself."""
TWO_SIZES = 1.2
"""Exchanges tell latency and rate of a link apart if the bytes of some are more than so many times those of the first,
squared."""
LEAST_EXCESS_S = 1e-4
"""A link whose messages take longer than the others' by less than this, or than they take at all, is like them."""
LARGE_SHARE = 0.3
"""A message is large, and tells the rate, if it has so large a share of the bytes of the largest."""
MAX_MESSAGES = 50_000
"""Of more messages than that only those of some passes are looked at."""


def busy_times(
    sent: Messages, begun: Tensor, ended: Tensor, counts: Tensor, peers: int, is_slow: Tensor
) -> list[list[tuple[float, float]]]:
    """Return by rank the bytes and seconds of the times in which its port has messages.

    Args:
        begun, ended: (M, W, W), when the messages were under way, their latency apart.
        counts: (M, W, W), the messages that count.
        peers: the axis of the other end.
        is_slow: (W,), the ports that alone decide how long their messages take; else the busier of two decides,
            whose bytes count where all messages of an exchange are in one such time.
    """
    ended = torch.maximum(ended, begun)

    def by_port(values: Tensor, otherwise: float) -> Tensor:
        """Return (M, other end, port) of the messages that count."""
        values = torch.where(counts, values, otherwise)
        return values if peers == 1 else values.transpose(1, 2)

    begins, ends = by_port(begun, torch.inf), by_port(ended, -torch.inf)
    ordered, order = begins.flatten(0, 1).sort(0)
    reached = ends.flatten(0, 1).gather(0, order).cummax(0).values
    follows_pause = torch.ones_like(ordered, dtype=torch.bool)
    follows_pause[1:] = ordered[1:] >= reached[:-1]
    number = torch.empty_like(order).scatter_(0, order, follows_pause.cumsum(0) - 1).view(begins.shape)
    is_counted = begins < torch.inf
    first = torch.where(is_counted, number, number.numel()).amin(1, keepdim=True)
    last = torch.where(is_counted, number, -1).amax(1, keepdim=True)
    own_bytes = by_port(sent.sent_bytes, 0.0)
    own, most = own_bytes.sum(1, keepdim=True), by_port(sent.port_bytes, 0.0).amax(1, keepdim=True)
    is_of_busier = (first == last) & ~is_slow & (own > 0)
    sizes = torch.where(is_of_busier, own_bytes * (most / own.clamp(min=1)), own_bytes)

    def of_times(values: Tensor, reduce: str) -> Tensor:
        values, numbers = values.flatten(0, 1), number.flatten(0, 1)
        return torch.zeros_like(values).scatter_reduce(0, numbers, values, reduce, include_self=False)

    seconds = of_times(ends, "amax") - of_times(begins, "amin")
    lists = zip(of_times(sizes, "sum").T.tolist(), seconds.T.tolist(), strict=True)
    return [[(b, s) for b, s in zip(*of, strict=True) if b > 0] for of in lists]


def typical_times(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return (bytes, seconds) of busy times, those of about one size as one, with the time in the middle."""
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if groups and point[0] <= 1.1 * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [(statistics.fmean(b for b, _ in group), statistics.median_low(s for _, s in group)) for group in groups]


@dataclass(frozen=True)
class LinkRatios:
    """How links differ from the typical one: (W, W), from rank i to rank k."""

    of_byte: Tensor
    """How many times as long as on like links a byte takes, ports included."""
    link: Tensor
    """The same of links beside their ports."""
    excess_s: Tensor
    """By how much each message takes longer than others, however small; mostly 0."""
    are_told_apart: bool
    """Whether it is known when each rank's rows arrived; if not, all ratios are 1."""


class LinkFit:
    """Latency and seconds of a byte, and what each message took in terms of them."""

    def __init__(self, sent: Messages, size: int, uses_rendezvous: bool) -> None:
        self.sent, self.size, self.uses_rendezvous = sent, size, uses_rendezvous
        self.latency_s, self.byte_s = 0.0, 0.0
        ratio = torch.ones(size, dtype=torch.float64, device="cpu")
        self.port_out, self.port_in = ratio, ratio
        self.link = torch.ones(size, size, dtype=torch.float64, device="cpu")
        self.excess_s = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        """(W, W): by how much every message of a link takes longer than latency_s and its bytes."""
        self.port_share = sent.port_bytes.sum(0) / sent.sent_bytes.sum(0).clamp(min=1)
        """(W, W): how many times its own bytes the busier port of a message has."""
        if not bool(sent.are_known.any()):
            return
        self._guess()
        self._measure_latencies()
        for _ in range(ROUNDS):
            self._refine()
        self._measure_slow_links()

    def _begun(self) -> Tensor:
        return self.sent.begun(self._latencies_s, self.uses_rendezvous)

    @property
    def _latencies_s(self) -> Tensor:
        return self.latency_s + self.excess_s

    def _seconds(self) -> Tensor:
        return self.sent.arrived - self._begun()

    def _guess(self) -> None:
        """Take the rate of the faster messages, and the latency of small ones."""
        sent = self.sent
        is_large = sent.port_bytes >= LARGE_SHARE * sent.port_bytes.max()
        seconds = self._seconds()
        ratios = (seconds / sent.port_bytes)[is_large & (seconds > 0)].sort().values
        self.byte_s = float(ratios[int(START_SHARE * len(ratios))]) if len(ratios) else 0.0
        self.latency_s = self._latency(self.byte_s)

    def _latency(self, byte_s: float) -> float:
        """Return what is left of small messages without their bytes: of those that wait for none, the first of a pass.

        A small one may be there before its receiver has asked for it, in no time: a line through both would go by it.
        """
        small = self._is_small_first
        known = self.sent.are_known[small].to(torch.float64)
        seconds = (self.sent.arrived - self.sent.posted)[small]
        left = medians(seconds - self.sent.port_bytes[small] * byte_s, known)
        return max(0.0, self._middle_link(left) or 0.0)

    def _middle_link(self, of_links: Tensor) -> float | None:
        """Return the typical one of numbers of links (W, W), NaN where there is none; None of no number.

        One slow port makes all but (W - 2) / W of the links slow: the middle of those that are left is typical.
        """
        known = sorted(of_links[~of_links.isnan()].tolist())
        return known[len(known) * (self.size - 2) // (2 * self.size)] if known else None

    @functools.cached_property
    def _is_small_first(self) -> Tensor:
        """(M,): exchanges that wait for none and are about as small as any such."""
        sizes = self.sent.port_bytes.amax((1, 2))
        return self.sent.is_first & (
            sizes <= TWO_SIZES * float(torch.where(self.sent.is_first, sizes, torch.inf).min())
        )

    def _measure_latencies(self) -> None:
        """Find the links on which a message takes longer however small it is: by small messages that wait for none.

        What their bytes take is known from large ones of the same link, which may be slow as well.
        """
        sent = self.sent
        if not sent.are_told_apart:
            return
        sizes, is_small = sent.port_bytes.amax((1, 2)), self._is_small_first
        small = sent.are_known & is_small[:, None, None]
        large = sent.are_known & (sizes > TWO_SIZES * sizes[is_small].amax())[:, None, None]
        if not bool(large.any()):
            return
        seconds = sent.arrived - sent.posted
        small_s, small_bytes = (medians(of, small.to(torch.float64)) for of in (seconds, sent.sent_bytes))
        large_s, large_bytes = (medians(of, large.to(torch.float64)) for of in (self._seconds(), sent.sent_bytes))
        byte_s = ((large_s - small_s) / (large_bytes - small_bytes)).nan_to_num(nan=0.0).clamp(min=0)
        latency_s = (small_s - byte_s * small_bytes).clamp(min=0)
        known = latency_s[~latency_s.isnan()]
        if not len(known):
            return
        typical = float(known.quantile(0.5, interpolation="lower"))
        # Of a link that is late at all times, the earliest quarter is late too.
        early = torch.where(small, seconds - byte_s * sent.sent_bytes, torch.nan).nanquantile(0.25, dim=0)
        excess = latency_s - typical
        is_late = (excess > max(LEAST_EXCESS_S, typical)) & (early - typical > 0.5 * excess)
        self.excess_s = torch.where(is_late, excess, 0.0)
        if bool(is_late.any()):
            self.latency_s = typical

    def _ratios(self) -> Tensor:
        """Return how many times as long as byte_s a byte takes on each link (W, W), its median; NaN where none went."""
        sent = self.sent
        due_s = sent.port_bytes * self.byte_s
        ratios = (self._seconds().clamp(min=SHORTEST_S) - self._latencies_s) / due_s
        counts = sent.are_known & (due_s > 0)
        return medians(ratios, torch.where(counts, sent.port_bytes, 0.0)).clamp(min=1e-3)

    def _ratio(self, times: Sequence[tuple[float, float]]) -> float:
        """The same of busy times, of which bytes and seconds are given; NaN of none."""
        of_byte = [((s - self.latency_s) / (b * self.byte_s), b) for b, s in times if b * self.byte_s > 0]
        return max(1e-3, weighted_median(of_byte)) if of_byte else math.nan

    def _measure_slow_links(self) -> None:
        """Return links that are taken for slow the ratios of all their bytes, which may say that they are not."""
        own = self._own_ratios()
        self.link = torch.where((self.link > 1) & (own > SMALLEST_RATIO), own, 1.0)
        if self.uses_rendezvous:
            self.link = torch.where(self.link * AGAINST < self.link.T, 1.0, self.link)

    def _own_ratios(self) -> Tensor:
        """Return how many times as long as its ports a byte takes on each link (W, W), by the sums of each pass.

        Single messages of a link that is never at rest take times that vary, and their median is less than their mean.
        """
        sent, known = self.sent, self.sent.are_known
        seconds = torch.where(known, (self._seconds() - self._latencies_s).clamp(min=0), 0.0)
        sizes = torch.where(known, sent.sent_bytes, 0.0)
        number = sent.is_first.cumsum(0) - 1
        of_pass = torch.zeros(int(number[-1]) + 1, self.size, self.size, dtype=torch.float64, device="cpu")
        total_s, total = of_pass.index_add(0, number, seconds), of_pass.index_add(0, number, sizes)
        byte_s = medians(total_s / total.clamp(min=1), total)
        port = torch.maximum(self.port_out[:, None], self.port_in)
        return byte_s / (max(self.byte_s, LEAST_BYTE_S) * port * self.port_share)

    def _refine(self) -> None:
        ratio = self._ratios()
        typical = self._middle_link(ratio)
        if typical is None:
            return
        self._tell_apart(ratio / typical)
        self._measure_slow_links()
        is_slow = self.port_out > 1, self.port_in > 1
        outwards, inwards = self._by_port()
        points = [
            point
            for by_port, slow in zip((outwards, inwards), is_slow, strict=True)
            for rank, of in enumerate(by_port)
            if not slow[rank]
            for point in typical_times(of)
        ]
        if points:
            self.latency_s, self.byte_s = self._line(points)
        for ports, by_port, slow in zip((self.port_out, self.port_in), (outwards, inwards), is_slow, strict=True):
            for rank in slow.nonzero()[:, 0].tolist():
                own = self._ratio(by_port[rank])
                ports[rank] = own if own > SMALLEST_RATIO else 1.0

    def _by_port(self) -> tuple[list[list[tuple[float, float]]], list[list[tuple[float, float]]]]:
        """Return bytes and seconds of the busy times of every port, on the way out of it and into it.

        The messages of a port share it, also those of one exchange and the next, in any order: only how long it is busy
        without a pause tells its rate. Messages on slow links and, of a port that is not slow, those to a slow one are
        left aside; with rendezvous also those against slow links, which wait for acknowledgements, if there are others.
        """
        is_out, is_in = (self.port_out > 1)[:, None], (self.port_in > 1)[None]
        counts = self.sent.are_known & (self.link <= 1)
        if self.uses_rendezvous and bool((counts & (self.link.T <= 1)).any()):
            counts = counts & (self.link.T <= 1)
        begun, ended = self._begun(), self.sent.arrived - self._latencies_s
        outwards = busy_times(self.sent, begun, ended, counts & (is_out | ~is_in), 2, self.port_out > 1)
        inwards = busy_times(self.sent, begun, ended, counts & (is_in | ~is_out), 1, self.port_in > 1)
        outwards, inwards = (  # with one latency each
            [[(size, max(SHORTEST_S, seconds + self.latency_s)) for size, seconds in of] for of in times]
            for times in (outwards, inwards)
        )
        return outwards, inwards

    def _line(self, points: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """Return latency, by small messages, and seconds of a byte, by busy times with many bytes."""
        limit = LARGE_SHARE * float(self.sent.port_bytes.max())
        large = [point for point in points if point[0] >= limit] or points
        latency_s, byte_s = self.latency_s, self.byte_s
        for _ in range(ROUNDS):
            byte_s = weighted_median([(max(0.0, s - latency_s) / b, b) for b, s in large])
            latency_s = self._latency(byte_s)
        return latency_s, byte_s

    def _tell_apart(self, ratio: Tensor) -> None:
        """Split the ratio (W, W) of every link to the typical one into those of ports and what is left to the link."""
        if not self.sent.are_told_apart:
            return
        if self.sent.num_peers == 1:
            out = into = torch.ones(self.size, dtype=torch.float64, device="cpu")
        else:
            # All of a slow port's messages are slow, also the fastest of them.
            filled = ratio.nan_to_num(nan=torch.inf)
            out, into = filled.amin(1), filled.amin(0)
            out, into = (torch.where(of.isfinite() & (of > SMALLEST_RATIO), of, 1.0) for of in (out, into))
        port = torch.maximum(out[:, None], into)
        left = (ratio / port).nan_to_num(nan=1.0)
        # Of a slow port's messages, which take turns, the last takes as long as all of them.
        least = torch.where(port > 1, SMALLEST_RATIO * self.sent.num_peers, SMALLEST_RATIO)
        self.port_out, self.port_in = out.clone(), into.clone()
        self.link = torch.where(left > least, left, 1.0)

    def found(self) -> tuple[EachLink, LinkRatios]:
        """Return what a byte and a message cost on every port and link, and how they differ from the typical ones."""
        byte_s = max(self.byte_s, LEAST_BYTE_S) if bool(self.sent.are_known.any()) else 0.0
        out_s, in_s = self.port_out * byte_s, self.port_in * byte_s
        # A slow link's own time is that of its messages beside the port, whose bytes are of all peers.
        link_s = torch.where(self.link > 1, self.link * torch.maximum(out_s[:, None], in_s), 0.0)
        each = EachLink(out_s, in_s, link_s * self.port_share, self._latencies_s)
        of_byte = torch.maximum(self.port_out[:, None], self.port_in) * self.link
        return each, LinkRatios(of_byte, self.link, self.excess_s, self.sent.are_told_apart)


def fit_links(calls: Sequence[RecordedCall], recording: Recording) -> tuple[LinkCosts, LinkRatios, tuple[str, ...]]:
    """Find what exchanges cost, in these of its calls; the notes say what could not be found."""
    size, node_size = recording.size, recording.node_size
    passes = [(call, number) for call in calls for number in range(len(call.by_pass))]
    messages = sum(step.step.lane == "comm" for step in calls[0].ranks[0].forward.steps) * size**2
    every = max(1, len(passes) * messages // MAX_MESSAGES) | 1  # odd: of forwards and backwards alike
    fits = {}
    for reach in reaches(node_size):
        sent = Messages.joined([messages_of(call, number, reach, node_size) for call, number in passes[::every]])
        fits[reach] = LinkFit(sent, size, recording.uses_rendezvous)
    notes = []
    if not any(bool(fit.sent.are_known.any()) for fit in fits.values()):
        notes.append("no exchange carried rows from rank to rank")
    elif not any(fit.sent.are_told_apart for fit in fits.values()):
        notes.append("NCCL doesn't tell when each rank's rows arrived: which link or port is slow is not known")
    far = fits[reaches(node_size)[0]]
    each, ratios = far.found()
    if node_size is not None:
        near, near_ratios = fits[Reach.INSIDE].found()
        is_near = Reach.INSIDE.pairs(size, node_size)
        each = EachLink(
            each.port_out_s,
            each.port_in_s,
            torch.where(is_near, near.link_s, each.link_s),
            torch.where(is_near, near.latency_s, each.latency_s),
            InsidePorts(node_size, near.port_out_s, near.port_in_s),
        )
        ratios = LinkRatios(
            torch.where(is_near, near_ratios.of_byte, ratios.of_byte),
            torch.where(is_near, near_ratios.link, ratios.link),
            torch.where(is_near, near_ratios.excess_s, ratios.excess_s),
            ratios.are_told_apart or near_ratios.are_told_apart,
        )
    link = LinkCosts(
        *(far.latency_s, 1 / max(far.byte_s, LEAST_BYTE_S), recording.shares_link),
        each=each,
        is_rendezvous=recording.uses_rendezvous,
    )
    return link, ratios, tuple(notes)
