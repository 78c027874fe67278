"""fit_links: latency, rate and slowness of every link, from when the rows of every exchange arrived at every rank.

A message goes out when the ports of both of its ranks have turned to its exchange, and takes as long as the busier of
the two. A port that is slow delays all messages of its rank, a slow link those of one pair of ranks in one direction.
"""

import functools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.diagnosis.fits import fit_relative_line, weighted_quantile
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
FASTER_SHARE = 0.25
"""With rendezvous the slowest of this share of a link's messages tells its rate: what is sent against a slow link waits
for that one's acknowledgements, too."""
LARGE_SHARE = 0.3
"""A message is large, and tells the rate, if it has so large a share of the bytes of the largest."""


@dataclass(frozen=True)
class _Exchange:
    """One exchange of all ranks."""

    posted: Tensor
    """(W,) seconds of the recording's clock."""
    arrived: Tensor
    """(W, W): when the rows of rank i were at rank k; NaN where that is not known, or nothing was sent."""
    sent_bytes: Tensor
    """(W, W)."""
    are_told_apart: bool
    """Whether it is known when each rank's rows arrived, and not only when all of them were there."""

    @property
    def out_bytes(self) -> Tensor:
        return self.sent_bytes.sum(1)

    @property
    def in_bytes(self) -> Tensor:
        return self.sent_bytes.sum(0)

    @property
    def port_bytes(self) -> Tensor:
        """(W, W): those that the busier of both ports has, which decide how long a message takes."""
        return torch.maximum(self.out_bytes[:, None], self.in_bytes)


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
    passes = [(call, number) for call in calls for number in range(len(call.ranks[0].passes))]
    messages = sum(step.step.lane == "comm" for step in calls[0].ranks[0].forward.steps) * size**2
    every = max(1, len(passes) * messages // MAX_MESSAGES) | 1  # odd: of forwards and backwards alike
    exchanges = [_exchanges_of(call, number) for call, number in passes[::every]]
    known = any(bool((~one.arrived.isnan()).any()) for of in exchanges for one in of)
    if not known:
        link = LinkCosts(0.0, 1e18, shares_link)
        ones = torch.ones(size, dtype=torch.float64, device="cpu")
        nothing = LinkRatios(ones, ones, torch.ones(size, size, dtype=torch.float64, device="cpu"), False)
        return link, nothing, ("no exchange carried rows from rank to rank",)
    fit = _Fit(exchanges, size, uses_rendezvous)
    ratios = fit.ratios()
    byte_s = max(fit.byte_s, 1e-18)
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
def _exchanges_of(call: RecordedCall, number: int) -> tuple[_Exchange, ...]:
    return tuple(_read_exchanges(call, number))


def _read_exchanges(call: RecordedCall, number: int) -> Iterator[_Exchange]:
    """Give the exchanges of a pass of a call in the order in which all ranks posted them."""
    ranks = [of.passes[number] for of in call.ranks]
    steps = [{step.step: step for step in one.steps if step.step.lane == "comm"} for one in ranks]
    for step in steps[0]:
        if step.kind is StepKind.REPLICA_BACKWARD:
            continue
        if not all(step in of for of in steps):
            raise ValueError(f"call {call.sequence}: not every rank has the step {step}")
        arrived = torch.full((len(ranks), len(ranks)), torch.nan, dtype=torch.float64, device="cpu")
        for rank, one in enumerate(ranks):
            arrivals = steps[rank][step].arrivals_s
            for peer in range(len(ranks)):
                if peer != rank:
                    # Where a peer's moment is not known, all its rows were there at the end of the exchange.
                    at = steps[rank][step].end_s if arrivals is None else arrivals[peer]
                    arrived[peer, rank] = torch.nan if at is None else one.origin + at
        posted = [one.origin + steps[rank][step].start_s + steps[rank][step].post_s for rank, one in enumerate(ranks)]
        units = [of[step].units for of in steps]
        sent_bytes = _sent_bytes(call, step, units)
        yield _Exchange(
            torch.tensor(posted, dtype=torch.float64, device="cpu"),
            torch.where(sent_bytes > 0, arrived, torch.nan),
            sent_bytes,
            all(of[step].arrivals_s is not None for of in steps),
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

    def __init__(self, passes: Sequence[Sequence[_Exchange]], size: int, uses_rendezvous: bool) -> None:
        self.passes, self.size, self.uses_rendezvous = passes, size, uses_rendezvous
        self.latency_s, self.byte_s = 0.0, 0.0
        self.typical_share = FASTER_SHARE if uses_rendezvous else 0.5
        ratio = torch.ones(size, dtype=torch.float64, device="cpu")
        self.port_out, self.port_in = ratio, ratio
        self.link = torch.ones(size, size, dtype=torch.float64, device="cpu")
        self.port_share = self._port_share()
        self._guess()
        for _ in range(ROUNDS):
            self._refine()
        # A slow link keeps its own seconds, whatever line the others' messages gave at last.
        own = self._ratios(self._by_link(), 0.5) / torch.maximum(self.port_out[:, None], self.port_in)
        self.link = torch.where(self.link > 1, own.nan_to_num(nan=1.0).clamp(min=SMALLEST_RATIO), 1.0)

    def _port_share(self) -> Tensor:
        """(W, W): how many times its own bytes the busier port of a message has."""
        port, own = (torch.zeros(self.size, self.size, dtype=torch.float64, device="cpu") for _ in range(2))
        for of in self.passes:
            for one in of:
                port, own = port + one.port_bytes, own + one.sent_bytes
        return port / own.clamp(min=1)

    def _messages(self) -> Iterator[tuple[_Exchange, Tensor]]:
        """Give every exchange with the seconds (W, W) that each of its messages took.

        They count from when both ranks had posted it, and the message before it on the same link had left; where a
        receiver's word is needed, also from when the message before that word, in the other direction, had come.
        """
        for of in self.passes:
            before = torch.full((self.size, self.size), -torch.inf, dtype=torch.float64, device="cpu")
            for one in of:
                begin = torch.maximum(torch.maximum(one.posted[:, None], one.posted), before - self.latency_s)
                if self.uses_rendezvous:  # the word may also have left before those rows
                    begin = torch.where(one.arrived > before.T, torch.maximum(begin, before.T), begin)
                yield one, one.arrived - begin
                before = torch.where(one.arrived.isnan(), before, one.arrived)

    def _largest(self) -> float:
        return max(float(one.port_bytes.max()) for of in self.passes for one in of)

    def _guess(self) -> None:
        """Take the rate of the faster messages, and the latency of small ones."""
        large = LARGE_SHARE * self._largest()
        ratios = [
            float(seconds[i, k] / one.port_bytes[i, k])
            for one, seconds in self._messages()
            for i, k in (one.port_bytes >= large).nonzero().tolist()
            if seconds[i, k] > 0
        ]
        self.byte_s = sorted(ratios)[int(START_SHARE * len(ratios))] if ratios else 0.0
        # The first message of a pass waits for none, so that what a small one takes is latency.
        first = [
            float(seconds[i, k] - one.port_bytes[i, k] * self.byte_s)
            for of in self.passes
            for one in of[:1]
            for seconds in (one.arrived - torch.maximum(one.posted[:, None], one.posted),)
            for i, k in ((one.port_bytes < large) & ~seconds.isnan()).nonzero().tolist()
        ]
        self.latency_s = max(0.0, statistics.median_low(first)) if first else 0.0

    def _by_link(self) -> dict[tuple[int, int], list[tuple[float, float]]]:
        """Give bytes and seconds of every message, by its link."""
        by_link: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for one, seconds in self._messages():
            port_bytes = one.port_bytes
            for i, k in (~seconds.isnan()).nonzero().tolist():
                point = float(port_bytes[i, k]), max(SHORTEST_S, float(seconds[i, k]))
                by_link.setdefault((i, k), []).append(point)
        return by_link

    def _ratios(self, by_link: dict[tuple[int, int], list[tuple[float, float]]], share: float) -> Tensor:
        """Give how many times as long as byte_s a byte takes on each link (W, W), NaN where nothing went.

        share: of each link's bytes, so many are as fast or faster.
        """
        ratio = torch.full((self.size, self.size), torch.nan, dtype=torch.float64, device="cpu")
        for (i, k), of in by_link.items():
            ratio[i, k] = self._ratio(of, share)
        return ratio

    def _ratio(self, messages: Sequence[tuple[float, float]], share: float) -> float:
        """The same of these messages, of which bytes and seconds are given."""
        of_byte = [((s - self.latency_s) / (b * self.byte_s), b) for b, s in messages if b * self.byte_s > 0]
        return max(1e-3, weighted_quantile(of_byte, share)) if of_byte else math.nan

    def _refine(self) -> None:
        ratio = self._ratios(self._by_link(), self.typical_share)
        known = ratio[~ratio.isnan()].tolist()
        if not known:
            return
        # One slow port makes all but (W - 2) / W of the links slow: the middle of those that are left is typical.
        self._tell_apart(ratio / sorted(known)[len(known) * (self.size - 2) // (2 * self.size)])
        is_slow = self.port_out > 1, self.port_in > 1
        outwards, inwards = self._by_port()
        points = [
            point
            for by_port, slow in zip((outwards, inwards), is_slow, strict=True)
            for rank, of in by_port.items()
            if not slow[rank]
            for point in _typical(of, self.typical_share)
        ]
        if points:
            self.latency_s, self.byte_s = self._line(points)
        # A slow port's own time is that of the last of its messages.
        for ports, by_port, slow in zip((self.port_out, self.port_in), (outwards, inwards), is_slow, strict=True):
            for rank in slow.nonzero()[:, 0].tolist():
                ports[rank] = max(SMALLEST_RATIO, self._ratio(by_port.get(rank, []), 0.5))

    def _by_port(self) -> tuple[dict[int, list[tuple[float, float]]], dict[int, list[tuple[float, float]]]]:
        """Give, for the way out of and into every port, bytes and seconds of the last message of each exchange.

        The messages of a port come one after the other, in any order, so that only the last one tells its rate. Those
        on slow links and, of a port that is not slow, those to a slow one are left aside.
        """
        is_out, is_in, is_link = self.port_out > 1, self.port_in > 1, self.link > 1
        outwards: dict[int, list[tuple[float, float]]] = {}
        inwards: dict[int, list[tuple[float, float]]] = {}
        for one, seconds in self._messages():
            counts = ~seconds.isnan() & ~is_link
            port_bytes = one.port_bytes
            for rank in range(self.size):
                to = counts[rank] & (is_out[rank] | ~is_in)
                of = counts[:, rank] & (is_in[rank] | ~is_out)
                for by_port, took, sent in (
                    (outwards, seconds[rank][to], port_bytes[rank][to]),
                    (inwards, seconds[:, rank][of], port_bytes[:, rank][of]),
                ):
                    if len(took):
                        by_port.setdefault(rank, []).append((float(sent.max()), max(SHORTEST_S, float(took.max()))))
        return outwards, inwards

    def _line(self, points: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """Give latency and seconds of a byte: large messages tell the rate, small ones the latency.

        A small one may be there before its receiver has asked for it, in no time: a line through both would go by it.
        """
        limit = LARGE_SHARE * max(b for b, _ in points)
        large, small = ([point for point in points if (point[0] >= limit) is is_large] for is_large in (True, False))
        if not small:
            return fit_relative_line(points)
        latency_s = byte_s = 0.0
        for _ in range(ROUNDS):
            byte_s = statistics.median_low(max(0.0, s - latency_s) / b for b, s in large)
            latency_s = max(0.0, statistics.median_low(s - byte_s * b for b, s in small))
        return latency_s, byte_s

    def _tell_apart(self, ratio: Tensor) -> None:
        """Split the ratio (W, W) of every link to the typical one into those of ports and what is left to the link."""
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
        are_told_apart = any(one.are_told_apart for of in self.passes for one in of)
        return LinkRatios(self.port_out, self.port_in, self.link, are_told_apart)


def _typical(points: Sequence[tuple[float, float]], share: float) -> list[tuple[float, float]]:
    """Give (bytes, seconds) of messages, those of about one size as one, with the time in which this share has come."""
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if groups and point[0] <= 1.1 * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [
        (statistics.mean(b for b, _ in group), weighted_quantile([(s, 1.0) for _, s in group], share))
        for group in groups
    ]
