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

from tritonmoe.diagnosis.fits import fit_relative_line, medians, weighted_median
from tritonmoe.diagnosis.recording import RankCall, RecordedCall
from tritonmoe.overlap.steps import Step, StepKind, Way
from tritonmoe.simulation.cost_model import EachLink, LinkCosts

__all__ = ["SMALLEST_RATIO", "LinkRatios", "fit_links"]

SMALLEST_RATIO = 1.15
"""A port or link that is slower than the others by less than this is taken for as fast."""
ROUNDS = 5
MAX_MESSAGES = 50_000
"""Of more messages than that only those of some passes are looked at."""
KEPT_PASSES = 1024
"""The exchanges of so many passes are kept: calls are fitted in many selections."""
START_SHARE = 0.25
"""The first guess of the rate lets so many messages of all be faster."""
SHORTEST_S = 1e-6
LEAST_BYTE_S = 1e-18
"""Of links whose bytes take no time."""
APART_S = 1e4
"""No pass takes so long."""
AGAINST = 2.0
"""With rendezvous what is sent against a slow link waits for that one's acknowledgements: a link so many times as
fast as the slow one in the other direction is not slow itself."""
LARGE_SHARE = 0.3
"""A message is large, and tells the rate, if it has so large a share of the bytes of the largest."""


@dataclass(frozen=True)
class _Messages:
    """What ranks sent each other in M exchanges, one pass after the other: (M, W, W), from rank i to rank k."""

    posted: Tensor
    """Seconds of the recording's clock: when both ranks had posted the exchange."""
    arrived: Tensor
    """When the rows of rank i were at rank k; NaN where that is not known, or nothing was sent."""
    before: Tensor
    """When those before them in the same pass were there; -inf where there are none."""
    sent_bytes: Tensor
    port_bytes: Tensor
    """Those that the busier of both ports has, which decide how long a message takes."""
    is_first: Tensor
    """(M,): whether the exchange is the first of its pass, which waits for none."""
    are_told_apart: bool
    """Whether it is known when each rank's rows arrived, and not only when all of them were there."""

    @classmethod
    def joined(cls, passes: "Sequence[_Messages]") -> "_Messages":
        """Put passes one behind the other, far apart: a selection of calls may have the same one twice."""
        shifts = [APART_S * n - float(of.posted.min()) if len(of.posted) else 0.0 for n, of in enumerate(passes)]
        shifted = list(zip(passes, shifts, strict=True))
        return cls(
            torch.cat([of.posted + shift for of, shift in shifted]),
            torch.cat([of.arrived + shift for of, shift in shifted]),
            torch.cat([of.before + shift for of, shift in shifted]),
            torch.cat([of.sent_bytes for of in passes]),
            torch.cat([of.port_bytes for of in passes]),
            torch.cat([of.is_first for of in passes]),
            any(of.are_told_apart for of in passes),
        )

    @property
    def are_known(self) -> Tensor:
        return ~self.arrived.isnan()

    def begun(self, latency_s: float, uses_rendezvous: bool) -> Tensor:
        """Give from when each message counts: both ranks had posted it, and the one before it on its link had left.

        Where a receiver's word is needed, also the message before that word, in the other direction, had come.
        """
        begin = torch.maximum(self.posted, self.before - latency_s)
        if uses_rendezvous:  # the word may also have left before those rows
            word = self.before.transpose(1, 2)
            begin = torch.where(self.arrived > word, torch.maximum(begin, word), begin)
        return begin


@dataclass(frozen=True)
class LinkRatios:
    """How many times as long as on the others a byte takes, on ports and on links beside their ports."""

    port_out: Tensor
    """(W,)."""
    port_in: Tensor
    link: Tensor
    """(W, W)."""
    are_told_apart: bool
    """Whether it is known when each rank's rows arrived; if not, all ratios are 1."""


def fit_links(
    calls: Sequence[RecordedCall], shares_link: bool, uses_rendezvous: bool
) -> tuple[LinkCosts, LinkRatios, tuple[str, ...]]:
    """Find what exchanges cost; the notes say what could not be found.

    shares_link: whether exchanges that are under way together share a port. uses_rendezvous: as the transport says.
    """
    size = len(calls[0].ranks)
    passes = [(call, number) for call in calls for number in range(len(call.by_pass))]
    messages = sum(step.step.lane == "comm" for step in calls[0].ranks[0].forward.steps) * size**2
    every = max(1, len(passes) * messages // MAX_MESSAGES) | 1  # odd: of forwards and backwards alike
    sent = _Messages.joined([_messages_of(call, number) for call, number in passes[::every]])
    if not bool(sent.are_known.any()):
        of_ranks = torch.ones(size, dtype=torch.float64, device="cpu")
        of_links = torch.ones(size, size, dtype=torch.float64, device="cpu")
        free = EachLink(0 * of_ranks, 0 * of_ranks, 0 * of_links, 0 * of_links)
        link = LinkCosts(0.0, 1 / LEAST_BYTE_S, shares_link, each=free)
        return link, LinkRatios(of_ranks, of_ranks, of_links, False), ("no exchange carried rows from rank to rank",)
    fit = _Fit(sent, size, uses_rendezvous)
    ratios = fit.ratios()
    byte_s = max(fit.byte_s, LEAST_BYTE_S)
    port_out_s, port_in_s = ratios.port_out * byte_s, ratios.port_in * byte_s
    # A slow link's own time is that of its messages beside the port, whose bytes are of all peers.
    link_s = torch.where(ratios.link > 1, ratios.link * torch.maximum(port_out_s[:, None], port_in_s), 0.0)
    each = EachLink(port_out_s, port_in_s, link_s * fit.port_share, torch.full_like(ratios.link, fit.latency_s))
    notes = []
    if not ratios.are_told_apart:
        notes.append("it is not known when each rank's rows arrived (NCCL): links and ports are not told apart")
    link = LinkCosts(fit.latency_s, 1 / byte_s, shares_link, each=each, is_rendezvous=uses_rendezvous)
    return link, ratios, tuple(notes)


@functools.lru_cache(maxsize=KEPT_PASSES)
def _messages_of(call: RecordedCall, number: int) -> _Messages:
    """Give the messages of a pass of a call, in the order in which all ranks posted its exchanges."""
    ranks = [of.passes[number] for of in call.ranks]
    size = len(ranks)
    steps = [{step.step: step for step in one.steps if step.step.lane == "comm"} for one in ranks]
    posted, arrived, before, sent_bytes, are_told_apart = [], [], [], [], False
    latest = torch.full((size, size), -torch.inf, dtype=torch.float64, device="cpu")
    for step in steps[0]:
        if step.kind is StepKind.REPLICA_BACKWARD:
            continue
        if not all(step in of for of in steps):
            raise ValueError(f"call {call.sequence}: not every rank has the step {step}")
        at = torch.full((size, size), torch.nan, dtype=torch.float64, device="cpu")
        for rank, one in enumerate(ranks):
            arrivals = steps[rank][step].arrivals_s
            for peer in range(size):
                if peer != rank:
                    # Where a peer's moment is not known, all its rows were there at the end of the exchange.
                    moment = steps[rank][step].end_s if arrivals is None else arrivals[peer]
                    at[peer, rank] = torch.nan if moment is None else one.origin + moment
        own = [one.origin + steps[rank][step].start_s + steps[rank][step].post_s for rank, one in enumerate(ranks)]
        sent_bytes.append(_sent_bytes(call, step, [of[step].units for of in steps]))
        at = torch.where(sent_bytes[-1] > 0, at, torch.nan)
        posted.append(torch.tensor(own, dtype=torch.float64, device="cpu"))
        arrived.append(at)
        before.append(latest)
        latest = torch.where(at.isnan(), latest, at)
        are_told_apart |= all(of[step].arrivals_s is not None for of in steps)
    if not posted:
        nothing = torch.zeros(0, size, size, dtype=torch.float64, device="cpu")
        is_first = torch.zeros(0, dtype=torch.bool, device="cpu")
        return _Messages(nothing, nothing, nothing, nothing, nothing, is_first, False)
    moments, sent = torch.stack(posted), torch.stack(sent_bytes)
    return _Messages(
        torch.maximum(moments[:, :, None], moments[:, None]),
        torch.stack(arrived),
        torch.stack(before),
        sent,
        torch.maximum(sent.sum(2, keepdim=True), sent.sum(1, keepdim=True)),
        torch.arange(len(posted), device="cpu") == 0,
        are_told_apart,
    )


def _sent_bytes(call: RecordedCall, step: Step, units: Sequence[float]) -> Tensor:
    """Give the bytes (W, W) from rank i to rank k: of all that i sends there its share in this step."""
    work = call.work
    rows = work.rows if step.kind.way is Way.TO_EXPERTS else work.rows.T
    rows = rows.clone().fill_diagonal_(0)
    if step.chunk is not None:
        of_rank = torch.tensor(units, dtype=torch.float64, device="cpu")
        travelling = torch.tensor([_travelling(of, step, call) for of in call.ranks], dtype=torch.float64, device="cpu")
        rows = rows * (of_rank / travelling.clamp(min=1))[:, None]
    return rows * work.bytes_per_row(step.kind)


def _travelling(of: RankCall, step: Step, call: RecordedCall) -> float:
    """Give the units of all chunks of a kind of step on one rank."""
    return sum(
        other.units
        for one in of.passes
        for other in one.steps
        if other.step.kind is step.kind and other.step.chunk is not None and other.step.chunk >= 0
    )


class _Fit:
    """Latency and seconds of a byte, and what each message took in terms of them."""

    def __init__(self, sent: _Messages, size: int, uses_rendezvous: bool) -> None:
        self.sent, self.size, self.uses_rendezvous = sent, size, uses_rendezvous
        self.latency_s, self.byte_s = 0.0, 0.0
        ratio = torch.ones(size, dtype=torch.float64, device="cpu")
        self.port_out, self.port_in = ratio, ratio
        self.link = torch.ones(size, size, dtype=torch.float64, device="cpu")
        self.port_share = sent.port_bytes.sum(0) / sent.sent_bytes.sum(0).clamp(min=1)
        """(W, W): how many times its own bytes the busier port of a message has."""
        self._guess()
        for _ in range(ROUNDS):
            self._refine()
        self._measure_slow_links()

    def _begun(self) -> Tensor:
        return self.sent.begun(self.latency_s, self.uses_rendezvous)

    def _seconds(self) -> Tensor:
        return self.sent.arrived - self._begun()

    def _guess(self) -> None:
        """Take the rate of the faster messages, and the latency of small ones."""
        sent = self.sent
        is_large = sent.port_bytes >= LARGE_SHARE * sent.port_bytes.max()
        seconds = self._seconds()
        ratios = (seconds / sent.port_bytes)[is_large & (seconds > 0)].sort().values
        self.byte_s = float(ratios[int(START_SHARE * len(ratios))]) if len(ratios) else 0.0
        # The first message of a pass waits for none, so that what a small one takes is latency.
        first = sent.is_first[:, None, None] & ~is_large & sent.are_known
        small = (sent.arrived - sent.posted - sent.port_bytes * self.byte_s)[first]
        self.latency_s = max(0.0, float(small.median())) if len(small) else 0.0

    def _ratios(self) -> Tensor:
        """Give how many times as long as byte_s a byte takes on each link (W, W), its median; NaN where none went."""
        sent = self.sent
        due_s = sent.port_bytes * self.byte_s
        ratios = (self._seconds().clamp(min=SHORTEST_S) - self.latency_s) / due_s
        counts = sent.are_known & (due_s > 0)
        return medians(ratios, torch.where(counts, sent.port_bytes, 0.0)).clamp(min=1e-3)

    def _ratio(self, times: Sequence[tuple[float, float]]) -> float:
        """The same of busy times, of which bytes and seconds are given; NaN of none."""
        of_byte = [((s - self.latency_s) / (b * self.byte_s), b) for b, s in times if b * self.byte_s > 0]
        return max(1e-3, weighted_median(of_byte)) if of_byte else math.nan

    def _measure_slow_links(self) -> None:
        """Give links that are taken for slow the ratios of all their bytes, which may say that they are not."""
        own = self._own_ratios()
        self.link = torch.where((self.link > 1) & (own > SMALLEST_RATIO), own, 1.0)
        if self.uses_rendezvous:
            self.link = torch.where(self.link * AGAINST < self.link.T, 1.0, self.link)

    def _own_ratios(self) -> Tensor:
        """Give how many times as long as its ports a byte takes on each link (W, W), by the sums of each pass.

        Single messages of a link that is never at rest take times that vary, and their median is less than their mean.
        """
        sent, known = self.sent, self.sent.are_known
        seconds = torch.where(known, (self._seconds() - self.latency_s).clamp(min=0), 0.0)
        sizes = torch.where(known, sent.sent_bytes, 0.0)
        number = sent.is_first.cumsum(0) - 1
        of_pass = torch.zeros(int(number[-1]) + 1, self.size, self.size, dtype=torch.float64, device="cpu")
        total_s, total = of_pass.index_add(0, number, seconds), of_pass.index_add(0, number, sizes)
        byte_s = medians(total_s / total.clamp(min=1), total)
        port = torch.maximum(self.port_out[:, None], self.port_in)
        return byte_s / (max(self.byte_s, LEAST_BYTE_S) * port * self.port_share)

    def _refine(self) -> None:
        ratio = self._ratios()
        known = ratio[~ratio.isnan()].tolist()
        if not known:
            return
        # One slow port makes all but (W - 2) / W of the links slow: the middle of those that are left is typical.
        self._tell_apart(ratio / sorted(known)[len(known) * (self.size - 2) // (2 * self.size)])
        self._measure_slow_links()
        is_slow = self.port_out > 1, self.port_in > 1
        outwards, inwards = self._by_port()
        points = [
            point
            for by_port, slow in zip((outwards, inwards), is_slow, strict=True)
            for rank, of in enumerate(by_port)
            if not slow[rank]
            for point in _typical(of)
        ]
        if points:
            self.latency_s, self.byte_s = self._line(points)
        for ports, by_port, slow in zip((self.port_out, self.port_in), (outwards, inwards), is_slow, strict=True):
            for rank in slow.nonzero()[:, 0].tolist():
                own = self._ratio(by_port[rank])
                ports[rank] = own if own > SMALLEST_RATIO else 1.0

    def _by_port(self) -> tuple[list[list[tuple[float, float]]], list[list[tuple[float, float]]]]:
        """Give bytes and seconds of the busy times of every port, on the way out of it and into it.

        The messages of a port share it, also those of one exchange and the next, in any order: only how long it is busy
        without a pause tells its rate. Messages on slow links and, of a port that is not slow, those to a slow one are
        left aside; with rendezvous also those against slow links, which wait for acknowledgements, if there are others.
        """
        is_out, is_in = (self.port_out > 1)[:, None], (self.port_in > 1)[None]
        counts = self.sent.are_known & (self.link <= 1)
        if self.uses_rendezvous and bool((counts & (self.link.T <= 1)).any()):
            counts = counts & (self.link.T <= 1)
        outwards = self._busy_times(counts & (is_out | ~is_in), 2, self.port_out > 1)
        return outwards, self._busy_times(counts & (is_in | ~is_out), 1, self.port_in > 1)

    def _busy_times(self, counts: Tensor, peers: int, is_slow: Tensor) -> list[list[tuple[float, float]]]:
        """Give by rank the bytes and seconds of the times in which its port has messages, with one latency each.

        Args:
            counts: (M, W, W), the messages that count.
            peers: the axis of the other end.
            is_slow: (W,), the ports that alone decide how long their messages take; else the busier of two decides,
                whose bytes count where all messages of an exchange are in one such time.
        """
        latency_s = self.latency_s
        begun = self._begun()
        ended = torch.maximum(self.sent.arrived - latency_s, begun)

        def by_port(values: Tensor, otherwise: float) -> Tensor:
            """Give (M, other end, port) of the messages that count."""
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
        own_bytes = by_port(self.sent.sent_bytes, 0.0)
        own, most = own_bytes.sum(1, keepdim=True), by_port(self.sent.port_bytes, 0.0).amax(1, keepdim=True)
        is_of_busier = (first == last) & ~is_slow & (own > 0)
        sizes = torch.where(is_of_busier, own_bytes * (most / own.clamp(min=1)), own_bytes)

        def of_times(values: Tensor, reduce: str) -> Tensor:
            values, numbers = values.flatten(0, 1), number.flatten(0, 1)
            return torch.zeros_like(values).scatter_reduce(0, numbers, values, reduce, include_self=False)

        seconds = of_times(ends, "amax") - of_times(begins, "amin") + latency_s
        lists = zip(of_times(sizes, "sum").T.tolist(), seconds.T.tolist(), strict=True)
        return [[(b, max(SHORTEST_S, s)) for b, s in zip(*of, strict=True) if b > 0] for of in lists]

    def _line(self, points: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """Give latency and seconds of a byte: large messages tell the rate, small ones the latency.

        A small one may be there before its receiver has asked for it, in no time: a line through both would go by it.
        """
        limit = LARGE_SHARE * float(self.sent.port_bytes.max())
        large, small = ([point for point in points if (point[0] >= limit) is is_large] for is_large in (True, False))
        if not small or not large:
            return fit_relative_line(points)
        latency_s = byte_s = 0.0
        for _ in range(ROUNDS):
            byte_s = weighted_median([(max(0.0, s - latency_s) / b, b) for b, s in large])
            latency_s = max(0.0, statistics.median_low(s - byte_s * b for b, s in small))
        return latency_s, byte_s

    def _tell_apart(self, ratio: Tensor) -> None:
        """Split the ratio (W, W) of every link to the typical one into those of ports and what is left to the link."""
        if not self.sent.are_told_apart:
            return
        if self.size == 2:
            out = into = torch.ones(2, dtype=torch.float64, device="cpu")
        else:
            # All of a slow port's messages are slow, also the fastest of them.
            filled = ratio.nan_to_num(nan=torch.inf)
            out, into = filled.amin(1), filled.amin(0)
            out, into = (torch.where(of.isfinite() & (of > SMALLEST_RATIO), of, 1.0) for of in (out, into))
        port = torch.maximum(out[:, None], into)
        left = (ratio / port).nan_to_num(nan=1.0)
        # Of a slow port's messages, which take turns, the last takes as long as all of them.
        least = torch.where(port > 1, SMALLEST_RATIO * (self.size - 1), SMALLEST_RATIO)
        self.port_out, self.port_in = out.clone(), into.clone()
        self.link = torch.where(left > least, left, 1.0)

    def ratios(self) -> LinkRatios:
        return LinkRatios(self.port_out, self.port_in, self.link, self.sent.are_told_apart)


def _typical(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Give (bytes, seconds) of busy times, those of about one size as one, with the time in the middle."""
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if groups and point[0] <= 1.1 * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [(statistics.mean(b for b, _ in group), statistics.median_low(s for _, s in group)) for group in groups]
